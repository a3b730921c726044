"""Downloads from a stand-in of the hub, into a cache of the library's own layout."""

import sys

import pytest

from taca_jax.errors import UserError
from taca_jax.hub.fetching import fetch
from taca_jax.hub.ids import HubId, Selection
from tests.hub.stand_in import MAIN

REPO = HubId("owner/repo")


def everything(found: HubId, names) -> Selection:
    return Selection(tuple(names), found.inside)


def only(*files: str):
    return lambda found, names: Selection(files, found.inside)


def refused(found: HubId, select=everything, **options) -> str:
    with pytest.raises(UserError) as error:
        fetch(found, select, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_selected_is_fetched_once_and_linked(hub, cache, caplog):
    hub.add("owner/repo", {"config.json": b"{}", "a/w[1].safetensors": b"12", "w.bin": b"123"})
    folder = fetch(REPO, only("config.json", "a/w[1].safetensors"))
    assert (folder / "a/w[1].safetensors").read_bytes() == b"12"
    assert (folder / "config.json").is_symlink()
    assert folder.is_relative_to(cache / "models--owner--repo" / "snapshots")
    assert hub.fetched == {"config.json", "a/w[1].safetensors"}
    assert "fetching 2 files (4 bytes) of owner/repo" in caplog.text
    asked = len(hub.asked)
    assert fetch(REPO, everything) != fetch(HubId("owner/repo", None, "a"), everything)
    del hub.asked[:asked]
    assert hub.fetched == {"w.bin"}


def test_revisions(hub):
    hub.add("owner/repo", {"a": b"new"})
    hub.add("owner/repo", {"a": b"old"}, revision="v1")
    assert (fetch(REPO, everything) / "a").read_bytes() == b"new"
    assert (fetch(HubId("owner/repo", "v1"), everything) / "a").read_bytes() == b"old"
    commit = hub.repos["owner/repo"].commit("v1")
    assert (fetch(HubId("owner/repo", commit), everything) / "a").read_bytes() == b"old"
    said = refused(HubId("owner/repo", "v2"))
    assert "owner/repo has no revision v2" in said


def test_a_download_that_breaks_off_goes_on_where_it_stopped(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    content = bytes(range(256)) * 4096
    hub.add("owner/repo", {"w.safetensors": content})
    hub.cut["w.safetensors"] = 300_000
    folder = fetch(REPO, everything)
    assert (folder / "w.safetensors").read_bytes() == content
    assert [part for method, _, part in hub.asked if method == "GET" and part] == ["bytes=300000-"]


def test_a_gated_repository_says_where_its_licence_is_and_a_token_opens_it(hub, monkeypatch):
    hub.add("owner/repo", {"a": b"1"}, token="hf_right")
    said = refused(REPO)
    assert f"owner/repo is gated: accept its licence at {hub.url}/owner/repo, then log in" in said
    assert "`hf auth login`, or set HF_TOKEN" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "owner/repo is gated: accept its licence" in refused(REPO)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert (fetch(REPO, everything) / "a").read_bytes() == b"1"


def test_what_the_hub_does_not_know(hub, monkeypatch):
    said = refused(HubId("no/where"))
    assert said.startswith("no/where is not here, and no public model of the hub")
    assert "owner/repo, owner/repo@revision, owner/repo:file" in said
    assert "private: log in" in said
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "it has refused your token" in refused(HubId("no/where"))


def test_offline_the_cache_is_read_and_what_it_lacks_is_said(hub, offline, caplog):
    hub.add("owner/repo", {"a": b"1", "b": b"2"})
    folder = fetch(REPO, only("a"))
    offline()
    asked = len(hub.asked)
    assert fetch(REPO, only("a")) == folder
    assert "owner/repo is taken from the cache: HF_HUB_OFFLINE is set" in caplog.text
    said = refused(REPO)
    assert "the cache lacks 1 files of owner/repo: b; HF_HUB_OFFLINE is set" in said
    said = refused(HubId("owner/other"))
    assert said.startswith("owner/other is not here, nor as a model of the hub in its cache (")
    assert len(hub.asked) == asked


def test_a_hub_that_is_not_reached(hub, monkeypatch):
    hub.add("owner/repo", {"a": b"1"})
    folder = fetch(REPO, everything)
    fetch.cache_clear()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    assert fetch(REPO, everything) == folder
    said = refused(HubId("owner/other"))
    assert "http://127.0.0.1:1 could not be reached (" in said


def test_without_download_nothing_is_asked(hub):
    hub.add("owner/repo", {"a": b"1"})
    assert "nothing is fetched here" in refused(REPO, download=False)
    assert hub.asked == []
    folder = fetch(REPO, everything)
    asked = len(hub.asked)
    assert fetch(REPO, everything, download=False) == folder
    assert len(hub.asked) == asked


@pytest.fixture
def older(cache):
    """A cache that another program filled: links to blobs, and no listing of the repository."""
    root = cache / "models--owner--repo"
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = {
        "model_index.json": '{"_class_name": "P", "vae": ["d", "V"], "scheduler": ["d", "S"]}',
        "text/model.safetensors.index.json": '{"weight_map": {"x": "model-00001-of-00002.st"}}',
    }
    for i, (name, content) in enumerate(files.items()):
        blob, link = root / "blobs" / f"blob{i}", root / "snapshots" / commit / name
        for each in (blob, link):
            each.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text(content)
        link.symlink_to(blob)
    (root / "refs").mkdir()
    (root / "refs" / MAIN).write_text(commit)
    return root / "snapshots" / commit


def test_an_older_cache_is_read_and_its_indices_tell_what_it_lacks(older):
    assert fetch(REPO, only("model_index.json")) == older
    said = refused(REPO)
    assert "the cache lacks 3 files of owner/repo: scheduler/scheduler_config.json, text/" in said
    assert "model-00001-of-00002.st, vae/config.json; HF_HUB_OFFLINE is set" in said
    (older / "model_index.json").unlink()
    (older / "model_index.json").write_text("{")
    fetch.cache_clear()
    assert "model_index.json is no index; remove it" in refused(REPO)


@pytest.mark.parametrize("terminal", [True, False])
def test_bars_are_drawn_on_a_terminal_alone(hub, capsys, monkeypatch, terminal):
    hub.add("owner/repo", {"a": b"1"})
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    fetch(REPO, everything)
    said = capsys.readouterr()
    assert said.out == ""
    assert ("Fetching 1 files" in said.err) == terminal
