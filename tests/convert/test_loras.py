"""`python -m convert lora`: between layouts, with and without a model."""

import numpy as np
import pytest
from flax import nnx

from taca_jax.convert.cli import main
from taca_jax.families.sd3.family import SD3 as FAMILY
from taca_jax.families.sd3.lora import ATTENTION_TARGETS
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.weights.lora_files import load_adapter, read_lora, write_lora
from tests.convert.commands import only, refused, run
from tests.models import SD3
from tests.random_models import random_model, randomise
from tests.shared import shared_path


def test_lora_there_and_back(tmp_path, capsys):
    src = shared_path("golden/flux/lora/pytorch_lora_weights.safetensors")
    native, peft = tmp_path / "native.safetensors", tmp_path / "peft.safetensors"
    run("lora", "--src", src, "--dst", native, "--to", "native")
    said = capsys.readouterr().out
    assert f"{src}: PEFT LoRA of 25 layers, rank 4, strength 1, on double_blocks (img.out" in said
    assert f"{native}: native LoRA of 25 layers, rank 4, strength 1, on double_blocks" in said
    assert open_tensors(native).shapes["single_blocks.qkv.q.lora_a"] == (3, 96, 4)
    run("lora", "--src", native, "--dst", peft, "--to", "peft")
    ours, theirs = open_tensors(peft), open_tensors(src)
    assert ours.shapes == theirs.shapes
    for name in theirs.shapes:
        np.testing.assert_array_equal(ours.read(name), theirs.read(name))
    assert "exists" in refused(capsys, "lora", "--src", src, "--dst", peft, "--to", "native")


def test_a_lora_of_nothing_we_know(tmp_path, capsys):
    write_tensors(tmp_path / "x.safetensors", {"lora_unet.lora_down.weight": np.zeros((2, 3))})
    where = ("--src", tmp_path / "x.safetensors", "--dst", tmp_path / "y.safetensors")
    said = refused(capsys, "lora", *where, "--to", "peft")
    assert "lora_unet.lora_down.weight is unknown" in said
    assert only(tmp_path, "x.safetensors")


def test_loras_are_renamed_without_a_model(tmp_path, capsys):
    model = random_model(SD3)
    targets = (*ATTENTION_TARGETS, r"dual_blocks\.img_attn\.qkv\.[qkv]")
    add_lora(model, LoRAConfig(rank=2, alpha=3.0), targets, rngs=nnx.Rngs(0))
    randomise(model, LoRAParam, scale=0.2)
    first, kohya, again = (tmp_path / f"{name}.safetensors" for name in ("a", "kohya", "b"))
    write_lora(first, model, gate="taca")
    main(["lora", "--src", str(first), "--dst", str(kohya), "--to", "kohya"])
    assert any(name.startswith("lora_unet_joint_blocks_3_") for name in open_tensors(kohya).shapes)
    main(["lora", "--src", str(kohya), "--dst", str(again), "--to", "peft"])
    assert load_adapter(again).family is FAMILY
    expected = {place: factors.a @ factors.b for place, factors in load(first, model).items()}
    for file in (kohya, again):
        given = load(file, model)
        assert given.keys() == expected.keys()
        for place, factors in given.items():
            delta = factors.strength * factors.a @ factors.b
            np.testing.assert_allclose(delta, expected[place], atol=1e-5)
        assert "LoRA of" in str(read_lora(file, model))
        assert load_adapter(file).gate == "taca"
    with pytest.raises(SystemExit, match=r"tells which layers .*; give --model"):
        main(["lora", "--src", str(first), "--dst", str(tmp_path / "n"), "--to", "native"])
    ours = tmp_path / "ours.safetensors"
    write_lora(ours, model, "native")
    assert load_adapter(ours).family is FAMILY
    for layout in ("peft", "kohya"):
        with pytest.raises(SystemExit, match=r"tells which layers .*; give --model"):
            main(["lora", "--src", str(ours), "--dst", str(tmp_path / "n"), "--to", layout])


def load(file, model):
    return load_adapter(file, FAMILY, model.config).adapter
