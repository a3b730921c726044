"""LoRA files of FLUX.2: in every dialect one changes the weights as its PEFT form does."""

import numpy as np
import pytest

from taca_jax.convert.loras import convert_lora
from taca_jax.errors import UserError
from taca_jax.families.flux.family import FLUX
from taca_jax.families.flux2.family import FLUX2
from taca_jax.families.flux2.model import KLEIN_BASE_4B
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.weights.lora_files import load_adapter, save_adapter
from tests.lora_files import KOHYA, LORA_AB, Pair, named, same_deltas

HIDDEN, MLP = 16, 48


def attention(name: str) -> str:
    return f"transformer_blocks.1.attn.{name}"


# Black Forest Labs' name, inputs, and what diffusers makes of it: names and outputs.
LAYERS = {
    "img_in": (128, {"x_embedder": HIDDEN}),
    "time_in.in_layer": (256, {"time_guidance_embed.timestep_embedder.linear_1": HIDDEN}),
    "double_stream_modulation_img.lin": (
        HIDDEN,
        {"double_stream_modulation_img.linear": 6 * HIDDEN},
    ),
    "single_stream_modulation.lin": (HIDDEN, {"single_stream_modulation.linear": 3 * HIDDEN}),
    "double_blocks.1.img_attn.qkv": (
        HIDDEN,
        {attention(name): HIDDEN for name in ("to_q", "to_k", "to_v")},
    ),
    "double_blocks.1.txt_attn.qkv": (
        HIDDEN,
        {attention(name): HIDDEN for name in ("add_q_proj", "add_k_proj", "add_v_proj")},
    ),
    "double_blocks.1.img_attn.proj": (HIDDEN, {attention("to_out.0"): HIDDEN}),
    "double_blocks.1.txt_attn.proj": (HIDDEN, {attention("to_add_out"): HIDDEN}),
    "double_blocks.1.img_mlp.0": (HIDDEN, {"transformer_blocks.1.ff.linear_in": 2 * MLP}),
    "double_blocks.1.txt_mlp.2": (MLP, {"transformer_blocks.1.ff_context.linear_out": HIDDEN}),
    "single_blocks.2.linear1": (
        HIDDEN,
        {"single_transformer_blocks.2.attn.to_qkv_mlp_proj": 3 * HIDDEN + 2 * MLP},
    ),
    "single_blocks.2.linear2": (
        HIDDEN + MLP,
        {"single_transformer_blocks.2.attn.to_out": HIDDEN},
    ),
    "final_layer.linear": (HIDDEN, {"proj_out": 128}),
}


def random_pairs(layers) -> dict[str, Pair]:
    rng = np.random.default_rng(0)
    pairs = {}
    for i, (name, (inputs, parts)) in enumerate(layers.items()):
        rank = 2 + i % 3
        down, up = rng.normal(size=(rank, inputs)), rng.normal(size=(sum(parts.values()), rank))
        pairs[name] = down.astype(np.float32), up.astype(np.float32), 1.0 + i % 2
    return pairs


def in_diffusers(pairs: dict[str, Pair], prefix: str = "transformer.") -> dict[str, np.ndarray]:
    """The same as diffusers would have it, strengths folded in."""
    tensors = {}
    for name, (down, up, alpha) in pairs.items():
        parts = LAYERS[name][1]
        cuts = np.cumsum(list(parts.values()))[:-1]
        for part, rows in zip(parts, np.split(up, cuts), strict=True):
            tensors[f"{prefix}{part}.lora_A.weight"] = down
            tensors[f"{prefix}{part}.lora_B.weight"] = rows * np.float32(alpha / len(down))
    return tensors


def with_prefix(prefix: str):
    return lambda pairs: named(pairs, lambda name: prefix + name, *LORA_AB, alpha=False)


FILES = {
    "PEFT": lambda pairs: in_diffusers(pairs, ""),
    "ComfyUI": with_prefix("diffusion_model."),  # ai-toolkit's, too
    "Black Forest Labs": with_prefix(""),
    "kohya": lambda pairs: named(  # musubi-tuner's, too
        pairs, lambda name: f"lora_unet_{name.replace('.', '_')}", *KOHYA
    ),
}


@pytest.mark.parametrize("dialect", FILES)
def test_every_dialect_is_read_and_written(tmp_path, dialect):
    pairs = random_pairs(LAYERS)
    write_tensors(tmp_path / "peft", in_diffusers(pairs))
    write_tensors(tmp_path / "file", FILES[dialect](pairs))
    theirs, ours = (load_adapter(tmp_path / name, FLUX2) for name in ("peft", "file"))
    assert ours.dialect == dialect
    same_deltas(ours, theirs)
    for layout in ("peft", "kohya", "native"):
        save_adapter(tmp_path / layout, ours.adapter, layout, FLUX2)
        same_deltas(load_adapter(tmp_path / layout, FLUX2), theirs)


def test_the_projection_of_single_blocks_keeps_its_rank(tmp_path):
    name = "single_blocks.2.linear1"
    pairs = random_pairs({name: LAYERS[name]})
    write_tensors(tmp_path / "file", FILES["ComfyUI"](pairs))
    adapter = load_adapter(tmp_path / "file", FLUX2).adapter
    save_adapter(tmp_path / "peft", adapter, "peft", FLUX2)
    stored = open_tensors(tmp_path / "peft")
    (down,) = (shape for key, shape in stored.shapes.items() if "lora_A" in key)
    assert down == (2, HIDDEN)


def at_full_size(outputs: int, name: str) -> dict[str, np.ndarray]:
    """A LoRA of one layer whose input is as wide as that of FLUX.1 and of klein 4B."""
    return {
        f"diffusion_model.{name}.lora_A.weight": np.ones((1, KLEIN_BASE_4B.hidden), np.float32),
        f"diffusion_model.{name}.lora_B.weight": np.ones((outputs, 1), np.float32),
    }


def test_files_of_flux_1_and_2_are_told_apart(tmp_path, capsys):
    """Blocks have the same names, and FLUX.1's are as wide as those of klein 4B."""
    hidden = KLEIN_BASE_4B.hidden
    for outputs, family in ((7 * hidden, FLUX), (9 * hidden, FLUX2)):
        file = tmp_path / f"{family.name}.safetensors"
        write_tensors(file, at_full_size(outputs, "single_blocks.3.linear1"))
        found = load_adapter(file)
        assert (found.family, found.guessed) == (family, False)
        lines = convert_lora(file, tmp_path / f"{family.name}_k.safetensors", "kohya")
        assert not any("guessed" in line for line in lines)
    write_tensors(tmp_path / "either", at_full_size(hidden, "double_blocks.3.img_attn.proj"))
    assert load_adapter(tmp_path / "either").guessed


def test_files_of_another_size_are_refused(tmp_path):
    file = tmp_path / "file.safetensors"
    write_tensors(file, FILES["ComfyUI"](random_pairs(LAYERS)))
    with pytest.raises(UserError, match="maps 16 to 16 channels instead of 3072 to 3072"):
        convert_lora(file, tmp_path / "made", "peft", "flux.2-klein-base-4b")
