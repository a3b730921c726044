"""LoRA files of Stable Diffusion 3: its dialects, and our own names without a model."""

from pathlib import Path

import numpy as np
import pytest

from taca_jax.convert.cli import main
from taca_jax.families.flux.family import FLUX
from taca_jax.families.sd3.family import SD3
from taca_jax.families.sd3.model import SD35_MEDIUM
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.weights.lora_files import LoRAFile, load_adapter
from tests.convert.commands import refused
from tests.lora_files import KOHYA, LORA_AB, Pair, deltas, named, same_deltas

HIDDEN, MLP = 16, 64


def diffusers(stream: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"transformer_blocks.1.{stream}.{name}" for name in names)


# Stability AI's name, inputs, outputs, and what diffusers makes of it.
LAYERS = {
    "joint_blocks.1.x_block.attn.qkv": (
        HIDDEN, 3 * HIDDEN, diffusers("attn", ("to_q", "to_k", "to_v")),
    ),
    "joint_blocks.1.context_block.attn.qkv": (
        HIDDEN, 3 * HIDDEN, diffusers("attn", ("add_q_proj", "add_k_proj", "add_v_proj")),
    ),
    "joint_blocks.1.x_block.attn2.qkv": (
        HIDDEN, 3 * HIDDEN, diffusers("attn2", ("to_q", "to_k", "to_v")),
    ),
    "joint_blocks.1.x_block.attn.proj": (HIDDEN, HIDDEN, diffusers("attn", ("to_out.0",))),
    "joint_blocks.1.context_block.attn.proj": (
        HIDDEN, HIDDEN, diffusers("attn", ("to_add_out",)),
    ),
    "joint_blocks.1.x_block.mlp.fc1": (HIDDEN, MLP, diffusers("ff", ("net.0.proj",))),
    "joint_blocks.1.context_block.mlp.fc2": (MLP, HIDDEN, diffusers("ff_context", ("net.2",))),
    "joint_blocks.1.x_block.adaLN_modulation.1": (
        HIDDEN, 9 * HIDDEN, diffusers("norm1", ("linear",)),
    ),
}  # fmt: skip


def random_pairs() -> dict[str, Pair]:
    """down, up and alpha of each layer; ranks and strengths differ, one is block-diagonal."""
    rng = np.random.default_rng(0)
    pairs = {}
    for i, (name, (inputs, outputs, parts)) in enumerate(LAYERS.items()):
        rank = 3 + 3 * (i % 2)
        up = rng.normal(size=(outputs, rank)).astype(np.float32)
        if len(parts) == 3 and rank == 6:
            up *= np.kron(np.eye(3), np.ones((HIDDEN, 2))).astype(np.float32)
        pairs[name] = rng.normal(size=(rank, inputs)).astype(np.float32), up, 1.0 + i % 3
    return pairs


def in_diffusers(pairs: dict[str, Pair]) -> dict[str, Pair]:
    return {
        part: (down, rows, alpha)
        for name, (down, up, alpha) in pairs.items()
        for part, rows in zip(LAYERS[name][2], np.split(up, len(LAYERS[name][2])), strict=True)
    }


def underscored(prefix: str):
    return lambda name: prefix + name.replace(".", "_")


FILES = {
    "kohya": lambda pairs: named(pairs, underscored("lora_unet_"), *KOHYA),
    "kohya (diffusers' names)": lambda pairs: named(
        in_diffusers(pairs), underscored("lora_transformer_"), *KOHYA
    ),
    "ComfyUI": lambda pairs: named(pairs, "diffusion_model.{}".format, *LORA_AB),
    "Stability AI": lambda pairs: named(pairs, str, *LORA_AB, alpha=False),
    "PEFT": lambda pairs: named(
        in_diffusers(pairs), "base_model.model.{}".format, *LORA_AB, alpha=False
    ),
}


def load(folder: Path, tensors: dict[str, np.ndarray]) -> LoRAFile:
    write_tensors(folder / "lora.safetensors", tensors)
    return load_adapter(folder / "lora.safetensors", SD3)


@pytest.mark.parametrize("name", FILES)
def test_a_dialect_is_its_peft_form(tmp_path, name):
    pairs = random_pairs()
    given = load(tmp_path, FILES[name](pairs))
    assert given.dialect == name
    theirs = named(in_diffusers(pairs), "transformer.{}".format, *LORA_AB, alpha=False)
    same_deltas(given, load(tmp_path, theirs))
    assert given.summary.layers == 14
    fused = name in ("kohya", "ComfyUI", "Stability AI")
    assert given.summary.ranks == ((2, 3, 6) if fused else (3, 6))


def released(folder: Path, hidden: int, *layers: str) -> Path:
    """A file of diffusers' of one of the released widths."""
    tensors = {}
    for seed, layer in enumerate(layers):
        rng = np.random.default_rng(seed)
        for key in LORA_AB:
            shape = (2, hidden) if key == LORA_AB[0] else (hidden, 2)
            tensors[f"transformer.transformer_blocks.{layer}.{key}"] = rng.normal(size=shape)
    file = folder / "lora.safetensors"
    write_tensors(file, {name: array.astype(np.float32) for name, array in tensors.items()})
    return file


@pytest.mark.parametrize(
    ("hidden", "layers", "options", "paths"),
    [
        (1536, ("3.attn2.to_q", "20.attn.to_k"), (), ("dual_blocks.img_attn", "joint_blocks.img")),
        (2432, ("3.attn.to_q", "37.attn.add_k_proj"), (), ("joint_blocks.img", "last_block.txt")),
        (1536, ("3.attn.to_q",), ("--model", "sd3-medium"), ("joint_blocks.img",)),
        (1536, ("3.attn.to_q",), ("--model", "sd3.5-medium"), ("dual_blocks.img",)),
    ],
    ids=["3.5-medium, told by attn2", "3.5-large, told by its width", "given", "given otherwise"],
)
def test_our_own_names_without_a_model(tmp_path, capsys, hidden, layers, options, paths):
    src = released(tmp_path, hidden, *layers)
    native, back = tmp_path / "native.safetensors", tmp_path / "back.safetensors"
    main(["lora", "--src", str(src), "--dst", str(native), "--to", "native", *options])
    assert (
        f"of {len(layers)} layers, rank 2, strength 1, on {paths[0][:4]}"
        in (capsys.readouterr().out.splitlines()[-1])
    )
    assert {".".join(name.split(".")[:2]) for name in open_tensors(native).shapes} == set(paths)
    main(["lora", "--src", str(native), "--dst", str(back), "--to", "peft", *options])
    ours, theirs = open_tensors(back), open_tensors(src)
    assert ours.shapes == theirs.shapes
    assert all(np.array_equal(ours.read(name), theirs.read(name)) for name in theirs.shapes)


def test_what_does_not_tell_its_model_is_asked_for(tmp_path, capsys):
    where = ("--src", released(tmp_path, 1536, "3.attn.to_q"), "--dst", tmp_path / "native")
    said = refused(capsys, "lora", *where, "--to", "native")
    assert "give --model, one of sd3.5-medium, sd3.5-large, sd3-medium" in said
    said = refused(capsys, "lora", *where, "--to", "native", "--model", "sd3.5-large")
    assert "maps 1536 to 1536 channels instead of 2432 to 2432" in said
    where = ("--src", released(tmp_path, 1536, "30.attn.to_q"), "--dst", tmp_path / "native")
    said = refused(capsys, "lora", *where, "--to", "native", "--model", "sd3.5-medium")
    assert "30.attn.to_q.lora_A.weight is unknown" in said
    assert not (tmp_path / "native").exists()


def test_a_guess_is_said(tmp_path, capsys):
    """Of a width that no released model has, in layers of both."""
    src = released(tmp_path, HIDDEN, "0.attn.to_q")
    main(["inspect", str(src)])
    assert (
        "guessed to be of FLUX.1: its layers are in other families' models"
        in capsys.readouterr().out
    )
    main(["lora", "--src", str(src), "--dst", str(tmp_path / "a"), "--to", "kohya"])
    assert "guessed to be of FLUX.1" in capsys.readouterr().out
    options = ("--to", "kohya", "--model", "sd3")
    main(["lora", "--src", str(src), "--dst", str(tmp_path / "b"), *options])
    assert "guessed" not in capsys.readouterr().out
    families = {name: load_adapter(tmp_path / name).family for name in "ab"}
    assert families == {"a": FLUX, "b": SD3}
    # FLUX.1 and FLUX.2 [klein] 4B are of one width; only FLUX.1 has so many blocks.
    for hidden, layer, kind in (
        (SD35_MEDIUM.hidden, "0.attn.to_q", "sd3"),
        (3072, "18.attn.to_q", "flux"),
    ):
        main(["inspect", str(released(tmp_path, hidden, layer))])
        said = capsys.readouterr().out
        assert f"of {kind}: PEFT LoRA" in said
        assert "guessed" not in said
    main(["inspect", str(released(tmp_path, 3072, "0.attn.to_q"))])
    assert "guessed to be of FLUX.1" in capsys.readouterr().out
    assert deltas(load_adapter(src, SD3)).keys() != deltas(load_adapter(src, FLUX)).keys()
