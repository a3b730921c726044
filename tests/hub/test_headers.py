"""Models of the hub are described and checked by headers, before their weights are fetched."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import generate
import train
from taca_jax.convert.cli import main
from taca_jax.errors import UserError
from taca_jax.hub.fetching import fetch_headers
from taca_jax.hub.ids import HubId
from taca_jax.training.checks import check_run
from taca_jax.weights.hub_files import pipeline_files
from taca_jax.weights.pipeline_folders import open_pipeline
from taca_jax.weights.shipped import find_weights
from tests.refusals import refusal
from tests.weights.small_flux import write_diffusers

REPO = "our/shapes"
FIRST = 100_001
"""Bytes of a file that the library asks for at first."""


@pytest.fixture
def shapes(hub):
    hub.add_folder(REPO, find_weights("shapes_base"))
    return hub


def said(capsys, *words: str) -> str:
    main(["inspect", *words])
    return capsys.readouterr().out


def test_only_headers_are_fetched(shapes, capsys, cache):
    local = find_weights("shapes_base")
    assert said(capsys, REPO) == said(capsys, str(local)).replace(str(local), REPO)
    weights = {name: count for name, count in shapes.sent.items() if name.endswith(".safetensors")}
    assert set(weights.values()) == {FIRST}
    size = (local / "transformer" / "model.safetensors").stat().st_size
    assert size > 10 * FIRST
    assert not list(cache.rglob("*.safetensors"))  # half a file would be taken for a whole one
    # What the cache has is read there.
    open_pipeline(REPO)
    shapes.sent.clear()
    assert said(capsys, REPO).startswith(f"{REPO}: a pipeline folder")
    assert not shapes.sent


def test_mistakes_are_found_before_weights_are_fetched(shapes, monkeypatch, tmp_path):
    drawing = ["--config", "shapes_taca", f"base={REPO}", "lora=none", f"out={tmp_path / 'x.png'}"]
    line = refusal(monkeypatch, generate.main, *drawing, "prompt=a red circle", "height=41")
    assert line == "error: 41 x 40 pixels: both must be multiples of 4"
    line = refusal(monkeypatch, generate.main, *drawing, "prompt=a red dragon")
    assert "the word 'dragon' is unknown" in line
    run = ["--config", "shapes_taca", f"base={REPO}", f"out_dir={tmp_path}", "evaluate=none"]
    line = refusal(monkeypatch, train.main, *run, "data.source=folder:nowhere")
    assert line.startswith("error: nowhere does not exist")
    run += ["data.source=generated:shapes/64"]
    line = refusal(monkeypatch, train.main, *run, "lora.targets=nothing")
    assert line == "error: lora.targets match no layer of this model: nothing"
    counts = {name: n for name, n in shapes.sent.items() if name.endswith(".safetensors")}
    assert set(counts.values()) == {4 * FIRST}


def test_what_a_repository_lacks_is_said_by_its_id(hub, monkeypatch, tmp_path):
    folder = write_diffusers(tmp_path / "flux")
    shutil.rmtree(folder / "text_encoder_2")
    hub.add_folder("some/flux", folder)
    words = ["--config", "flux_taca", "base=some/flux", "lora=none", "prompt=x", "height=64"]
    line = refusal(monkeypatch, generate.main, *words, "width=64", f"out={tmp_path / 'x.png'}")
    assert "this pipeline lacks a text encoder" in line
    shutil.rmtree(folder / "vae")
    hub.add_folder("other/flux", folder)
    words[2] = "base=other/flux"
    line = refusal(monkeypatch, generate.main, *words, "width=64", f"out={tmp_path / 'x.png'}")
    assert line.startswith("error: other/flux has no autoencoder")


def test_a_checked_run_is_of_the_fetched_files(shapes, tmp_path):
    shapes_taca = importlib.import_module("configs.shapes_taca").CONFIG
    data = replace(shapes_taca.data, source=("generated:shapes/64",))
    config = replace(shapes_taca, base=REPO, out_dir=str(tmp_path / "run"), data=data)
    run = check_run(config)
    assert run.models.config == config
    assert run.models.stored.where == find_weights(REPO)
    assert run.models.stored.where.is_dir()


def test_a_long_header_is_fetched_whole(hub, tmp_path):
    """Such as that of a transformer with a name for each tensor of each block."""
    header = b'{"a": {"dtype": "F32", "shape": [250], "data_offsets": [0, 1000]}'
    header += b"}".rjust(150_000)
    content = len(header).to_bytes(8, "little") + header + bytes(1000)
    hub.add("one/file", {"x.safetensors": content})
    made = fetch_headers(HubId("one/file"), pipeline_files, tmp_path)
    assert made == tmp_path / "one/file/x.safetensors"
    assert made.read_bytes().endswith(bytes(1000))
    assert hub.sent["x.safetensors"] == FIRST + len(header)


def test_a_diffusers_pipeline_and_one_of_its_models(hub, tmp_path, capsys):
    folder = write_diffusers(tmp_path / "flux")
    hub.add_folder("some/flux", folder)
    lines = said(capsys, "some/flux")
    assert lines == said(capsys, str(folder)).replace(str(folder), "some/flux")
    assert "some/flux/vae: " in lines
    lines = said(capsys, "some/flux@main:text_encoder_2")
    assert lines.startswith("some/flux/text_encoder_2: a T5 v1.1 encoder")


def test_a_lora_is_fetched_whole(hub, capsys):
    content = Path(find_weights("shapes_taca.safetensors")).read_bytes()
    hub.add("one/lora", {"it.safetensors": content})
    assert "rank 16, strength 1, on double_blocks" in said(capsys, "one/lora")


def test_what_the_hub_does_not_give(shapes, tmp_path, capsys):
    shapes.repos[REPO].token = "hf_right"
    with pytest.raises(SystemExit, match=f"error: {REPO} is gated: accept its licence"):
        main(["inspect", REPO])
    shapes.add("not/weights", {"x.safetensors": b"version https://git-lfs.github.com/spec/v1"})
    with pytest.raises(SystemExit, match=r"not/weights:x\.safetensors is no safetensors file"):
        main(["inspect", "not/weights"])
    with pytest.raises(SystemExit, match="other/thing is not here, and no public model of the hub"):
        main(["inspect", "other/thing"])
    with pytest.raises(UserError, match="has no nowhere"):
        fetch_headers(HubId(REPO, None, "nowhere"), pipeline_files, tmp_path)


def test_offline_the_cache_is_described(shapes, offline, capsys):
    open_pipeline(REPO)
    online = said(capsys, REPO)
    offline()
    assert said(capsys, REPO).count("parameters in") == online.count("parameters in")
    with pytest.raises(SystemExit, match="HF_HUB_OFFLINE is set"):
        main(["inspect", "our/other"])
