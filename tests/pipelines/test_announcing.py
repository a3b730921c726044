"""What a drawing says of itself at its start, and the values that its metadata holds."""

import json

import pytest
from PIL import Image

from taca_jax.pipelines.announcing import describe_base
from taca_jax.pipelines.generate import generate
from taca_jax.weights.pipeline_folders import open_pipeline
from tests.pipelines.test_generate import config

OWN = open_pipeline("shapes_base").settings
"""What the small model itself says."""


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The settings that were given, and the files that were written."""
    out = tmp_path_factory.mktemp("drawn") / "x.png"
    given = config(
        out, steps=None, seed=7, num_images=2, batch_size=1, lora="shapes_taca.safetensors:0.5"
    )
    return given, generate(given)


def test_metadata_holds_the_values_that_were_used(drawn):
    for seed, path in zip((7, 8), drawn[1], strict=True):
        with Image.open(path) as picture:
            used = json.loads(picture.text["taca_jax"])
        assert used["seed"] == seed
        assert (used["steps"], used["guidance"]) == (20, OWN.guidance)
        assert (used["height"], used["width"]) == (40, 40)
        assert used["lora"] == "shapes_taca.safetensors@taca:0.5"
        assert None not in [used[name] for name in ("steps", "guidance", "height", "width", "seed")]


def test_a_start_is_a_few_lines_of_80_columns(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    generate(config("x.png", steps=1, lora="shapes_taca.safetensors"))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines)
    whats = [line.split(":")[0] for line in lines if not line.startswith("  ")]
    assert whats[:2] == ["base", "LoRA"]
    assert whats[3:5] == ["devices", "draws"]
    assert lines[0].startswith("base: shapes_base (FLUX.1): transformer 2.32 M and text encoder")


def test_a_bases_memory_depends_on_its_formats():
    stored = open_pipeline("shapes_base", None)
    said = [
        describe_base("b", stored, *formats)
        for formats in (("float32",), ("bfloat16",), ("bfloat16", "int8"))
    ]
    assert [line.rpartition(", ")[2] for line in said][:2] == [
        "10.6 MB in memory",
        "5.3 MB in memory",
    ]
    assert float(said[2].rpartition(", ")[2].split()[0]) < 5
