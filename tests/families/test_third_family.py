"""A family that lives in these tests alone goes all the ways that the package's own go.

What it had to provide is in `mini/`: a model and a record. Nothing of `taca_jax` knows of it.
"""

import ast
import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from taca_jax.autoencoders.pixels import Pixels
from taca_jax.config.fields import update
from taca_jax.config.json_text import from_json, to_json
from taca_jax.convert.cli import main as convert
from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.families import registry
from taca_jax.formats.engine import exported
from taca_jax.formats.tensor_files import ArrayTensors, write_streamed
from taca_jax.nn import kinds
from taca_jax.nn.kinds import flat_params
from taca_jax.nn.lora import LoRAConfig
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.generate import generate
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.text.encoders import T5Text
from taca_jax.training.config import TrainConfig
from taca_jax.training.models import open_models
from taca_jax.training.optimizer import OptimizerConfig
from taca_jax.training.run import train
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests.processes import NOT_KEPT, OPTIMISED, last_line, run_python
from tests.random_models import random_model
from tests.training.tiny import T5, tiny_pipeline

PROMPT = "a red circle"
TACA = TacaConfig(gamma=1.5, threshold=500)
FROM_SCRATCH = {"base": None, "lora": None, "taca": None}


@pytest.fixture(scope="module")
def mini():
    """The family's module, whose family is known as long as these tests run."""
    from tests.families.mini import family

    registry.register(family.MINI)
    yield family
    del registry._FAMILIES["mini"]
    del kinds._KINDS["mini"]


@pytest.fixture(scope="module")
def base(mini, tmp_path_factory):
    """A pipeline's folder with random weights."""
    folder = tmp_path_factory.mktemp("mini") / "base"
    Pipeline(
        random_model(mini.TINY),
        text_encoder=T5Text(random_model(T5), pad_id=0),
        tokenizer=tiny_pipeline().tokenizer,
        autoencoder=Pixels(),
        settings=tiny_pipeline().settings,
    ).save(folder)
    return folder


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    """The configuration of a LoRA run that has been trained."""
    config = lora_config(base, tmp_path_factory.mktemp("run") / "run")
    train(config)
    return config


def lora_config(base, out_dir, **changes):
    values = {
        "name": "mini",
        "steps": 2,
        "base": str(base),
        "lora": LoRAConfig(rank=2, alpha=2),
        "taca": TACA,
        "data": DataConfig(source="generated:shapes/64", batch_size=8, resolution=40),
        "optimizer": OptimizerConfig(learning_rate=1e-2),
        "log_every": 1,
        "out_dir": str(out_dir),
    }
    return TrainConfig(**(values | changes))


def losses(run_dir):
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_it_is_drawn_with_taca(base):
    pipeline = Pipeline.from_pretrained(base, "float32")
    assert pipeline.family.title == "Mini"
    plain, same = (pipeline(PROMPT, output="array").images for _ in range(2))
    warm = pipeline(PROMPT, output="array", taca=TACA).images
    assert np.array_equal(plain, same)
    assert np.abs(plain - warm).max() > 1e-3
    with pytest.raises(UserError, match="this model has no skip-layer guidance"):
        pipeline(PROMPT, guidance=2.0, skip_layers=(0,))


def test_its_lora_is_trained_drawn_with_and_renamed(run, tmp_path, capsys):
    lora = run.run_dir / "lora.safetensors"
    out = tmp_path / "out.png"
    generate(
        GenerateConfig(
            base=run.base, prompt=PROMPT, lora=str(lora), taca=TACA, compare=True, out=str(out)
        )
    )
    said = " ".join(capsys.readouterr().out.split())  # lines are wrapped
    assert "PEFT LoRA of 16 layers, rank 2" in said
    assert re.search(r"TACA acts on steps 1( to \d)? of 3 \(t >= 500\)", said)
    with Image.open(out) as picture:
        assert picture.width > picture.height  # three columns
    for name, to in (("k", "kohya"), ("n", "native"), ("p", "peft")):
        convert(["lora", "--src", str(lora), "--dst", str(tmp_path / name), "--to", to])
        lora = tmp_path / name
    pipeline = Pipeline.from_pretrained(run.base, "float32")
    drawn = []
    for file in (run.run_dir / "lora.safetensors", lora):
        pipeline.unload_lora()
        pipeline.load_lora(file)
        drawn.append(pipeline(PROMPT, output="array", taca=TACA).images)
    np.testing.assert_allclose(*drawn, atol=1e-6)


def test_one_is_trained_from_scratch_and_its_configuration_survives(mini, tmp_path):
    text = TextConfig(tokenizer="shapes", length=16, encoder=T5)
    config = replace(
        lora_config("unused", tmp_path / "run"), model=mini.TINY, text=text, **FROM_SCRATCH
    )
    assert from_json(TrainConfig, to_json(config)) == config
    assert update(config, {"model.num_blocks": "1"}).model == replace(mini.TINY, num_blocks=1)
    train(config)
    drawn = Pipeline.from_pretrained(tmp_path / "run" / "model", "float32")(PROMPT)
    assert drawn.images[0].size == (40, 40)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_it_is_quantised(base, quantize):
    pipeline = Pipeline.from_pretrained(base, "float32", quantize=quantize, quantize_text="int8")
    whole = Pipeline.from_pretrained(base, "float32")
    close, exact = (each(PROMPT, output="latents").latents for each in (pipeline, whole))
    error = np.linalg.norm(close - exact) / np.linalg.norm(exact)
    assert 0 < error < {"int8": 0.05, "nf4": 0.5}[quantize]


def test_it_is_trained_over_eight_devices_as_on_one(run, tmp_path):
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    config = replace(run, mesh=mesh, out_dir=str(tmp_path / "run"))
    file = tmp_path / "config.json"
    file.write_text(to_json(config))
    done = run_python("-m", "tests.families.mini.run_on_mesh", str(file), devices=8)
    np.testing.assert_allclose(json.loads(last_line(done)), losses(run.run_dir), rtol=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_it_is_planned(base):
    config = lora_config(base, "unused", plan="v5e-4")
    models = open_models(config)
    assert models.tokens == {"image": 100, "text": 16}
    script = (
        "import sys; from taca_jax.families.registry import register;"
        "from tests.families.mini.family import MINI; register(MINI);"
        "from taca_jax.config.json_text import from_json;"
        "from taca_jax.planning.plan import plan;"
        "from taca_jax.training.config import TrainConfig;"
        "plan(from_json(TrainConfig, sys.argv[1]))"
    )
    done = run_python("-c", script, to_json(config), environment=OPTIMISED | NOT_KEPT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "v5e-4 (v5e:2x2), fsdp 4: 8 pictures of 40 px a step" in done.stdout.replace(
        "data", "fsdp"
    )
    with pytest.raises(UserError, match=r"plan for .*flux2-dev, mini-tiny needs no folder"):
        open_models(replace(config, base="nothing"), published=True)


def test_its_weights_are_converted_compared_inspected_and_written_back(mini, tmp_path, capsys):
    model = random_model(mini.TINY)
    params = {name: np.asarray(param.get_value()) for name, param in flat_params(model).items()}
    folder, file = tmp_path / "diffusers", tmp_path / "mini.safetensors"
    folder.mkdir()
    ours = ArrayTensors("the model", params)
    write_streamed(folder / "weights.safetensors", exported(mini.DIFFUSERS, ours))
    (folder / "config.json").write_text(json.dumps(mini.settings_of(mini.TINY)))
    written = {f"model.{key}": tensor for key, tensor in exported(mini.ORIGINAL, ours).items()}
    write_streamed(file, written)
    for src, words in ((folder, []), (file, ["--axes-dim", "4", "6", "6"])):
        made = tmp_path / f"made of {src.name}"
        convert(["mini", "--src", str(src), "--dst", str(made), *words])
        convert(["verify", "--src", str(src), "--dst", str(made)])
        convert(["inspect", str(src)])
        found = flat_params(load_model(made, LoadOptions(dtype=np.float32)))
        for name, value in params.items():
            assert np.array_equal(found[name].get_value(), value), name
    said = capsys.readouterr().out
    tensors = len(mini.DIFFUSERS.rules) * mini.TINY.num_blocks
    assert f"{tensors - 12} equal" in said or " equal, 0 rounded" in said
    assert "a mini transformer in its authors' layout" in said
    for to, back in (("diffusers", tmp_path / "back"), ("original", tmp_path / "back.safetensors")):
        convert(["export", "--src", str(made), "--dst", str(back), "--to", to])
        again = tmp_path / f"again of {back.name}"
        convert(["mini", "--src", str(back), "--dst", str(again)])
        assert (again / "model.safetensors").read_bytes() == (
            made / "model.safetensors"
        ).read_bytes()


# Two autoencoders are named after families by their authors.
FAMILY = re.compile(r"(?<!autoencoderkl)flux|(?<!tae)sd3|stable.?diffusion", re.IGNORECASE)
ROOT = Path(__file__).resolve().parents[2]


def named_families(tree: ast.AST) -> set[str]:
    """Names and strings of a module's code that name a family; docstrings and help are prose."""
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                found.add(name)
            case ast.alias(name=name, asname=other):
                found |= {name, other or ""}
            case ast.ImportFrom(module=str(name)):
                found.add(name)
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.keyword(arg=str(name)):
                found.add(name)
            case ast.Constant(value=str(text)) if id(node) not in prose:
                found.add(text)
    return {name for name in found if FAMILY.search(name)}


@pytest.mark.parametrize("package", ["taca_jax", "convert"])
def test_no_module_outside_of_the_families_names_one(package):
    named = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        if file.is_relative_to(ROOT / "taca_jax" / "families"):
            continue
        if names := named_families(ast.parse(file.read_text())):
            named[str(file.relative_to(ROOT))] = sorted(names)
    assert not named


def test_every_family_is_named_in_one_place(mini):
    names = [family.name for family in registry.families()]
    assert names[-1] == "mini"
    assert len(set(names)) == len(names)
    with pytest.raises(ValueError, match="there is a family called mini already"):
        registry.register(replace(mini.MINI))
    assert jax.tree.leaves(mini.TINY) == [mini.TINY]
