"""`python -m convert export`: what others read, and our own reader again."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from taca_jax.formats.tensor_files import TensorFiles, open_tensors
from taca_jax.weights.folders import save_model
from tests.convert.commands import original_t5, refused, run
from tests.models import FLUX
from tests.random_models import random_model
from tests.shared import shared_path

PARTS = ("transformer", "vae")


def assert_same(ours: TensorFiles, theirs: TensorFiles) -> None:
    """The same names, types, shapes and bytes."""
    assert ours.dtypes == theirs.dtypes
    assert ours.shapes == theirs.shapes
    for name in theirs.shapes:
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name


@pytest.mark.parametrize("kind", ["flux", pytest.param("sd3", marks=pytest.mark.slow)])
def test_there_and_back(tmp_path, capsys, kind):
    """A whole pipeline's folder, in shards, its settings too."""
    src, made, back = shared_path(f"golden/{kind}"), tmp_path / "made", tmp_path / "back"
    run(kind, "--src", src, "--dst", made)
    capsys.readouterr()
    run("export", "--src", made, "--dst", back, "--shard-gb", "0.001")
    said = capsys.readouterr().out
    for part in PARTS:
        assert f"{back / part}: a" in said
        settings = [json.loads((each / part / "config.json").read_text()) for each in (src, back)]
        # In whose pictures tiling begins: of no meaning to us.
        assert all(
            settings[0][name] == value
            for name, value in settings[1].items()
            if (part, name) != ("vae", "sample_size")
        )
        assert_same(open_tensors(back / part), open_tensors(src / part))
    index = json.loads((back / "transformer" / "diffusion_pytorch_model.safetensors.index.json")
                       .read_text())  # fmt: skip
    sizes = [(back / "transformer" / name).stat().st_size for name in index["weight_map"].values()]
    assert max(sizes) < 1_200_000
    assert index["metadata"]["total_size"] < sum(sizes)
    run("verify", "--src", back / "transformer", "--dst", made / "transformer")
    assert " 0 rounded" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("flux", "flux_bfl/flux1-dev"),
        pytest.param("vae", "flux_bfl/ae", marks=pytest.mark.slow),
        ("sd3", "sd35_native/sd3.5_medium"),
    ],
)
def test_single_files_there_and_back(tmp_path, kind, file):
    """In the original's names; of Stability's file the transformer."""
    src = shared_path(f"golden/{file}.safetensors")
    options = ("--latents", "flux") if kind == "vae" else ()
    run(kind, "--src", src, "--dst", tmp_path / "made", *options)
    made = tmp_path / "made"
    back = tmp_path / "back.safetensors"
    run("export", "--src", made, "--dst", back, "--to", "original")
    ours, theirs = open_tensors(back), open_tensors(src)
    assert ours.shapes.items() <= theirs.shapes.items()
    for name in ours.shapes:
        assert ours.read(name).tobytes() == theirs.read(name).tobytes(), name
    if kind != "sd3":
        assert ours.shapes == theirs.shapes


def test_dtypes_and_permissions(tmp_path):
    """A model in one safetensors file, as it comes with the package; read by whom the user lets."""
    save_model(tmp_path / "made", random_model(FLUX))
    run("export", "--src", tmp_path / "made", "--dst", tmp_path / "back", "--dtype", "bfloat16")
    file = tmp_path / "back" / "diffusion_pytorch_model.safetensors"
    assert set(open_tensors(file).dtypes.values()) == {np.dtype(ml_dtypes.bfloat16)}
    assert open_tensors(file).metadata == {"format": "pt"}
    umask = os.umask(0)
    os.umask(umask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def test_what_is_not_exported(tmp_path, capsys):
    original_t5(tmp_path / "src")
    run("t5", "--src", tmp_path / "src", "--dst", tmp_path / "made")
    where = ("--src", tmp_path / "made", "--dst", tmp_path / "back")
    assert "is a t5; export writes flux, sd3, flux2, vae" in refused(capsys, "export", *where)
    assert "--shard-gb is 0" in refused(capsys, "export", *where, "--shard-gb", "0")
    where = ("--src", tmp_path / "src", "--dst", tmp_path / "back")
    assert "original weights need" in refused(capsys, "export", *where)
    where = ("--src", tmp_path / "src", "--dst", tmp_path / "made")
    assert "exists and is not empty" in refused(capsys, "export", *where)
    assert sorted(each.name for each in Path(tmp_path).iterdir()) == ["made", "src"]
