"""Models of the hub are described and checked by headers, before their weights are fetched."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

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
from tests.hub.stand_in import Hub
from tests.refusals import refusal
from tests.shared import shared_path
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
    run += ["data.source=generated:shapes/64"]
    line = refusal(monkeypatch, train.main, *run, "lora.targets=nothing")
    assert line == "error: lora.targets match no layer of this model: nothing"
    counts = {name: n for name, n in shapes.sent.items() if name.endswith(".safetensors")}
    assert set(counts.values()) == {3 * FIRST}


def taef1() -> dict[str, bytes]:
    names = ("taef1_encoder.safetensors", "taef1_decoder.safetensors")
    return {name: shared_path(f"assets/tae/{name}").read_bytes() for name in names}


@pytest.fixture
def crowd(shapes, tmp_path):
    """A hub with a base, a LoRA for it, one of another model, and autoencoders."""
    lora = Path(find_weights("shapes_taca.safetensors")).read_bytes()
    layer = "transformer.transformer_blocks.0.attn.to_q"
    factors = {"A": np.zeros((64, 3072), np.float32), "B": np.zeros((3072, 64), np.float32)}
    other = save({f"{layer}.lora_{name}.weight": array for name, array in factors.items()})
    shapes.add("our/lora", {"ours.safetensors": lora, "other.safetensors": other})
    shapes.add("our/tae", taef1())
    return shapes


def whole(hub: Hub) -> list[str]:
    """The files with weights that were asked for whole, in their order."""
    asked = [path for how, path, part in hub.asked if how == "GET" and part is None]
    return [
        path.rpartition("/resolve/")[2].partition("/")[2]
        for path in asked
        if path.endswith(".safetensors")
    ]


DRAWING = [
    ({"out": "nowhere/x.png"}, "the folder nowhere does not exist"),
    ({"image": "nowhere.png"}, "image=nowhere.png cannot be read"),
    ({"preview": "nowhere"}, "nowhere is not there; give an autoencoder's folder"),
    ({"lora": "our/lora:ours.safetensors,nowhere.safetensors"}, "nowhere.safetensors is not there"),
]
TRAINING = [
    ({"data.source": "folder:nowhere"}, "nowhere does not exist"),
    ({"data.source": "webdataset:no/{0..3}.tar"}, "of which 4 are not there"),
    ({"data.source": "img2dataset:nowhere"}, "nowhere is not there"),
    ({"validation.source": "folder:nowhere"}, "nowhere does not exist"),
    ({"out_dir": "file/run"}, "file is a file"),
]


@pytest.mark.parametrize(("changes", "said"), DRAWING)
def test_what_is_on_this_machine_is_checked_before_the_hub_is_asked_for_a_drawing(
    crowd, monkeypatch, tmp_path, changes, said
):
    usual = {
        "out": str(tmp_path / "x.png"),
        "lora": "our/lora:ours.safetensors",
        "prompt": "a square",
    }
    words = [f"{key}={value}" for key, value in (usual | {"base": REPO} | changes).items()]
    assert said in refusal(monkeypatch, generate.main, "--config", "shapes_taca", *words)
    assert crowd.asked == []


@pytest.mark.parametrize(("changes", "said"), TRAINING)
def test_what_is_on_this_machine_is_checked_before_the_hub_is_asked_for_a_run(
    crowd, monkeypatch, tmp_path, changes, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    usual = {"out_dir": "run", "base": REPO, "lora.init": "our/lora:ours.safetensors"}
    usual |= {"data.source": "generated:shapes/64", "evaluate": "none"}
    words = [f"{key}={value}" for key, value in (usual | changes).items()]
    assert said in refusal(monkeypatch, train.main, "--config", "shapes_taca", *words)
    assert crowd.asked == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"negative_prompt": "a dragon", "guidance": "2"}, "the word 'dragon' is unknown"),
        ({"lora": "our/lora:other.safetensors"}, "our/lora/other.safetensors is a LoRA of another"),
        ({"preview": "our/tae"}, "our/tae/taef1 has 16 latent channels, the transformer expects 3"),
        ({"preview": "our/tae:taef1"}, "our/tae/taef1 has 16 latent channels, the transformer"),
    ],
)
def test_a_drawing_is_refused_before_a_lora_or_a_previewer_is_fetched(
    crowd, monkeypatch, tmp_path, changes, said
):
    usual = {
        "out": str(tmp_path / "x.png"),
        "lora": "our/lora:ours.safetensors",
        "prompt": "a square",
    }
    words = [f"{key}={value}" for key, value in (usual | {"base": REPO} | changes).items()]
    assert said in refusal(monkeypatch, generate.main, "--config", "shapes_taca", *words)
    assert whole(crowd) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.source": "folder:silent"}, "without a caption"),
        ({"data.resolution": "42"}, "data.resolution is 42; this model takes multiples of 4"),
        ({"lora.init": "our/lora:other.safetensors"}, "our/lora/other.safetensors is a LoRA of an"),
        ({"autoencoder": "our/tae"}, "the autoencoder has 16 latent channels, the transformer"),
        ({"sample_every": "1", "sample_prompts": "a dragon"}, "the word 'dragon' is unknown"),
        ({"validation.pictures": "64"}, "would hold out all 64 pictures"),
    ],
)
def test_a_run_is_refused_before_a_lora_or_an_autoencoder_is_fetched(
    crowd, monkeypatch, tmp_path, changes, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "silent").mkdir()
    Image.new("RGB", (48, 48)).save(tmp_path / "silent" / "0.png")
    usual = {"out_dir": "run", "base": REPO, "lora.init": "our/lora:ours.safetensors"}
    usual |= {"data.source": "generated:shapes/64", "evaluate": "none"}
    words = [f"{key}={value}" for key, value in (usual | changes).items()]
    assert said in refusal(monkeypatch, train.main, "--config", "shapes_taca", *words)
    assert whole(crowd) == []


def test_what_is_small_is_fetched_first(crowd, tmp_path):
    shapes_taca = importlib.import_module("configs.shapes_taca").CONFIG
    data = replace(shapes_taca.data, source=("generated:shapes/64",))
    lora = replace(shapes_taca.lora, init="our/lora:ours.safetensors")
    run = str(tmp_path / "run")
    config = replace(shapes_taca, base=REPO, out_dir=run, data=data, lora=lora)
    checked = check_run(config)
    assert checked.models.config == config
    assert checked.models.start is not None
    assert whole(crowd)[0] == "ours.safetensors"
    assert len(whole(crowd)) > 1


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
