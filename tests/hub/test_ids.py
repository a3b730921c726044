"""What is an id of the hub and what is a path."""

import pytest

from taca_jax.hub.ids import HubId, hint, hub_id


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("black-forest-labs/FLUX.1-dev", HubId("black-forest-labs/FLUX.1-dev")),
        ("owner/repo@v1.0", HubId("owner/repo", "v1.0")),
        ("owner/repo@refs/pr/3", HubId("owner/repo", "refs/pr/3")),
        ("owner/repo:a.safetensors", HubId("owner/repo", None, "a.safetensors")),
        ("owner/repo@main:unet/a.safetensors", HubId("owner/repo", "main", "unet/a.safetensors")),
        ("owner/repo:vae/", HubId("owner/repo", None, "vae")),
    ],
)
def test_the_forms_of_an_id(text, expected):
    assert hub_id(text) == expected
    assert str(expected) == text.rstrip("/")


@pytest.mark.parametrize(
    "text",
    [
        "shapes_base",
        "runs/foo/model",
        "./owner/repo",
        "../repo",
        "/owner/repo",
        "~/repo",
        "runs/lora.safetensors",
        "owner/repo:../secret",
        "owner/repo:/etc/passwd",
        "owner/repo@",
        "owner/re po",
        "",
    ],
)
def test_what_is_a_path(text):
    assert hub_id(text) is None


def test_a_folder_of_the_owners_name_makes_it_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub_id("runs/foo") is None
    assert hint("runs/foo").endswith("if runs/foo is a model of the hub, write runs/foo@main")
    assert hub_id("runs/foo@main") == HubId("runs/foo", "main")
    assert hint("runs/foo/model") == "a model of the hub is given as owner/repo"
