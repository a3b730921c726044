"""LoRA files of FLUX: in every dialect one changes the weights as its PEFT form does."""

import random
import re
from pathlib import Path

import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.families.flux.family import FLUX
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.weights.lora_files import LoRAFile, load_adapter, save_adapter
from tests.lora_files import KOHYA, LORA_AB, Pair, deltas, named, same_deltas

HIDDEN, MLP = 16, 64
QKV, WITH_MLP = (HIDDEN,) * 3, (HIDDEN, HIDDEN, HIDDEN, MLP)


def attention(name: str) -> str:
    return f"transformer_blocks.1.attn.{name}"


# Black Forest Labs' name, inputs, and what diffusers makes of it: names and outputs.
LAYERS = {
    "img_in": (16, {"x_embedder": HIDDEN}),
    "time_in.in_layer": (256, {"time_text_embed.timestep_embedder.linear_1": HIDDEN}),
    "vector_in.out_layer": (HIDDEN, {"time_text_embed.text_embedder.linear_2": HIDDEN}),
    "double_blocks.1.img_mod.lin": (HIDDEN, {"transformer_blocks.1.norm1.linear": 6 * HIDDEN}),
    "double_blocks.1.txt_mod.lin": (
        HIDDEN,
        {"transformer_blocks.1.norm1_context.linear": 6 * HIDDEN},
    ),
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
    "double_blocks.1.img_mlp.0": (HIDDEN, {"transformer_blocks.1.ff.net.0.proj": MLP}),
    "double_blocks.1.img_mlp.2": (MLP, {"transformer_blocks.1.ff.net.2": HIDDEN}),
    "double_blocks.1.txt_mlp.0": (HIDDEN, {"transformer_blocks.1.ff_context.net.0.proj": MLP}),
    "single_blocks.2.modulation.lin": (
        HIDDEN,
        {"single_transformer_blocks.2.norm.linear": 3 * HIDDEN},
    ),
    "single_blocks.2.linear1": (
        HIDDEN,
        {
            "single_transformer_blocks.2.attn.to_q": HIDDEN,
            "single_transformer_blocks.2.attn.to_k": HIDDEN,
            "single_transformer_blocks.2.attn.to_v": HIDDEN,
            "single_transformer_blocks.2.proj_mlp": MLP,
        },
    ),
    "single_blocks.2.linear2": (
        HIDDEN + MLP,
        {"single_transformer_blocks.2.proj_out": HIDDEN},
    ),
    "final_layer.linear": (HIDDEN, {"proj_out": 16}),
}
XLABS = {
    "double_blocks.1.img_attn.qkv": "double_blocks.1.processor.qkv_lora1",
    "double_blocks.1.txt_attn.qkv": "double_blocks.1.processor.qkv_lora2",
    "double_blocks.1.img_attn.proj": "double_blocks.1.processor.proj_lora1",
    "double_blocks.1.txt_attn.proj": "double_blocks.1.processor.proj_lora2",
    "single_blocks.2.linear2": "single_blocks.2.processor.proj_lora",
}


def random_pairs(names) -> dict[str, Pair]:
    """down `[r, in]`, up `[out, r]` and alpha of each layer; ranks and strengths differ."""
    rng = np.random.default_rng(0)
    pairs = {}
    for i, name in enumerate(names):
        inputs, outputs = LAYERS[name][0], sum(LAYERS[name][1].values())
        rank = 2 + i % 3
        down, up = rng.normal(size=(rank, inputs)), rng.normal(size=(outputs, rank))
        pairs[name] = down.astype(np.float32), up.astype(np.float32), 1.0 + i % 2
    return pairs


def in_peft(pairs: dict[str, Pair]) -> dict[str, np.ndarray]:
    """The same as diffusers would have it, strengths folded in."""
    tensors = {}
    for name, (down, up, alpha) in pairs.items():
        parts = LAYERS[name][1]
        cuts = np.cumsum(list(parts.values()))[:-1]
        for part, rows in zip(parts, np.split(up, cuts), strict=True):
            tensors[f"transformer.{part}.lora_A.weight"] = down
            tensors[f"transformer.{part}.lora_B.weight"] = rows * np.float32(alpha / len(down))
    return tensors


def kohya(pairs):
    return named(pairs, lambda name: f"lora_unet_{name.replace('.', '_')}", *KOHYA)


def kohya_diffusers(pairs):
    peft = in_peft(pairs)
    stems = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in peft}
    tensors = {}
    for stem in stems:
        name = f"lora_transformer_{stem.replace('.', '_')}"
        down, up = (peft[f"transformer.{stem}.{each}"] for each in LORA_AB)
        tensors |= {f"{name}.{KOHYA[0]}": down, f"{name}.{KOHYA[1]}": up * 2}
        tensors[f"{name}.alpha"] = np.array([len(down) / 2], np.float32)
    return tensors


FILES = {
    "kohya": (kohya, LAYERS),
    "kohya (diffusers' names)": (kohya_diffusers, LAYERS),
    "ComfyUI": (lambda pairs: named(pairs, "diffusion_model.{}".format, *LORA_AB), LAYERS),
    "ComfyUI, kohya's factors": (
        lambda pairs: named(pairs, "diffusion_model.{}".format, *KOHYA),
        LAYERS,
    ),
    "Black Forest Labs": (lambda pairs: named(pairs, str, *LORA_AB, alpha=False), LAYERS),
    "fal": (
        lambda pairs: named(pairs, "base_model.model.{}".format, *LORA_AB, alpha=False),
        LAYERS,
    ),
    "XLabs": (
        lambda pairs: named(pairs, XLABS.get, "down.weight", "up.weight", alpha=False),
        XLABS,
    ),
}


def load(folder: Path, tensors: dict[str, np.ndarray]) -> LoRAFile:
    write_tensors(folder / "lora.safetensors", tensors)
    return load_adapter(folder / "lora.safetensors")


@pytest.mark.parametrize("name", FILES)
def test_a_dialect_is_its_peft_form(tmp_path, name):
    write, layers = FILES[name]
    pairs = random_pairs(layers)
    given = load(tmp_path, write(pairs))
    assert given.dialect == name.partition(",")[0]
    same_deltas(given, load(tmp_path, in_peft(pairs)))
    parts = sum(len(LAYERS[layer][1]) for layer in layers)
    assert given.summary.layers == parts
    assert given.summary.ranks == (2, 3, 4)


def test_the_final_modulation_is_the_other_way_round_in_diffusers(tmp_path):
    down = np.ones((1, HIDDEN), np.float32)
    up = np.arange(2 * HIDDEN, dtype=np.float32)[:, None]  # shift, then scale
    bfl = load(tmp_path, named({"x": (down, up, 1.0)}, lambda _: FINAL, *LORA_AB))
    swapped = np.roll(up, HIDDEN)
    peft = {"norm_out.linear.lora_A.weight": down, "norm_out.linear.lora_B.weight": swapped}
    same_deltas(bfl, load(tmp_path, peft))


FINAL = "diffusion_model.final_layer.adaLN_modulation.1"


def test_single_blocks_of_xlabs_have_no_mlp(tmp_path):
    down, up, _ = random_pairs(["double_blocks.1.img_attn.qkv"]).popitem()[1]
    module = "single_blocks.2.processor.qkv_lora"
    given = load(tmp_path, {f"{module}.down.weight": down, f"{module}.up.weight": up})
    expected = {}
    for x, rows in zip("qkv", np.split(up, 3), strict=True):
        stem = f"single_transformer_blocks.2.attn.to_{x}"
        expected |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": rows}
    same_deltas(given, load(tmp_path, expected))


def block_diagonal(name: str, rank: int) -> Pair:
    inputs, parts = LAYERS[name][0], list(LAYERS[name][1].values())
    rng = np.random.default_rng(1)
    up = np.zeros((sum(parts), rank * len(parts)), np.float32)
    for i, (part, stop) in enumerate(zip(parts, np.cumsum(parts), strict=True)):
        up[stop - part : stop, i * rank : (i + 1) * rank] = rng.normal(size=(part, rank))
    return rng.normal(size=(up.shape[1], inputs)).astype(np.float32), up, 3.0


def test_parts_that_were_trained_apart(tmp_path):
    """Each part has only its own ranks; alpha is divided by the rank of the file all the same."""
    pairs = {
        name: block_diagonal(name, rank=2)
        for name in ("double_blocks.1.img_attn.qkv", "single_blocks.2.linear1")
    }
    given = load(tmp_path, kohya(pairs))
    same_deltas(given, load(tmp_path, in_peft(pairs)))
    assert given.summary.ranks == (2,)
    assert given.summary.strengths == (3 / 8, 3 / 6)
    # Written again, they are what they were.
    save_adapter(tmp_path / "again.safetensors", given.adapter, "kohya", FLUX)
    again = open_tensors(tmp_path / "again.safetensors")
    assert again.shapes["lora_unet_single_blocks_2_linear1.lora_down.weight"] == (8, HIDDEN)
    same_deltas(load_adapter(tmp_path / "again.safetensors"), given)


def test_kohya_files_of_ours_keep_shared_factors(tmp_path):
    pairs = random_pairs(LAYERS)
    given = load(tmp_path, kohya(pairs))
    save_adapter(tmp_path / "again.safetensors", given.adapter, "kohya", FLUX)
    again = open_tensors(tmp_path / "again.safetensors")
    for name, array in kohya(pairs).items():
        if not name.endswith("alpha"):
            assert again.shapes[name] == array.shape
    same_deltas(load_adapter(tmp_path / "again.safetensors"), given)


def test_a_part_alone_is_written_with_zeros_beside_it(tmp_path):
    v, mlp = "single_transformer_blocks.2.attn.to_v", "single_transformer_blocks.2.proj_mlp"
    rng = np.random.default_rng(0)
    for module, outputs in ((v, HIDDEN), (mlp, MLP)):
        file = load(
            tmp_path,
            {
                f"{module}.lora_A.weight": rng.normal(size=(2, HIDDEN)).astype(np.float32),
                f"{module}.lora_B.weight": rng.normal(size=(outputs, 2)).astype(np.float32),
            },
        )
        save_adapter(tmp_path / "kohya.safetensors", file.adapter, "kohya", FLUX)
        up = "lora_unet_single_blocks_2_linear1.lora_up.weight"
        assert open_tensors(tmp_path / "kohya.safetensors").shapes[up] == (3 * HIDDEN + MLP, 2)
        again = deltas(load_adapter(tmp_path / "kohya.safetensors"))
        (place, expected), *_ = deltas(file).items()
        np.testing.assert_allclose(again.pop(place), expected, rtol=1e-6)
        assert len(again) == 3
        assert not any(delta.any() for delta in again.values())


def test_diffusers_reads_kohya_files_of_ours_as_peft_ones(tmp_path):
    """Of double blocks: for single blocks its reader has the released models' sizes only."""
    torch = pytest.importorskip("torch")
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    names = [name for name in LAYERS if name.startswith("double_blocks")]
    pairs = random_pairs(names)
    pairs["double_blocks.1.txt_attn.qkv"] = block_diagonal("double_blocks.1.txt_attn.qkv", 2)
    save_adapter(tmp_path / "k.safetensors", load(tmp_path, in_peft(pairs)).adapter, "kohya", FLUX)
    tensors = open_tensors(tmp_path / "k.safetensors")
    arrays = {name: torch.tensor(tensors.read(name)) for name in tensors.shapes}
    converted = utils._convert_kohya_flux_lora_to_diffusers(arrays)
    theirs = load(tmp_path, {name: tensor.numpy() for name, tensor in converted.items()})
    same_deltas(theirs, load(tmp_path, in_peft(pairs)))


# What is left out, and what is refused.


def test_text_encoders_are_left_out_and_named(tmp_path):
    te = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
    text = {f"{te}.{kind}": np.ones((2, 2), np.float32) for kind in KOHYA}
    given = load(tmp_path, kohya(random_pairs(["img_in"])) | text)
    assert given.left_out == tuple(sorted(text))
    assert f"left out: 2 tensors of text encoders: {te}.lora_down.weight" in str(given.summary)
    with pytest.raises(UserError, match="it holds no factors"):
        load(tmp_path, text)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("lora_unet_img_in.dora_scale", "a magnitude of DoRA"),
        ("lora_unet_img_in.hada_w1_a", "of LyCORIS"),
        ("lora_unet_img_in.lokr_w1", "of LyCORIS"),
        ("lora_unet_img_in.diff_b", "a whole difference"),
        ("double_blocks.0.img_attn.qkv.lora_B.bias", "a bias"),
        ("double_blocks.0.img_attn.norm.key_norm.scale", "a whole norm"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.alpha", "unknown"),
        ("lora_unet_img_in.lora_down.weight.extra", "unknown"),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path, key, what):
    tensors = kohya(random_pairs(["img_in"])) | {key: np.ones(2, np.float32)}
    with pytest.raises(UserError, match=rf"{re.escape(key)} is {what}"):
        load(tmp_path, tensors)


def test_fused_layers_of_impossible_shapes(tmp_path):
    name = "lora_unet_double_blocks_1_img_attn_qkv"
    a, b = np.ones((2, HIDDEN), np.float32), np.ones((2 * HIDDEN, 2), np.float32)
    with pytest.raises(UserError, match=r"lora_up.weight is \(32, 2\); expected 3 times 16 rows"):
        load(tmp_path, {f"{name}.lora_down.weight": a, f"{name}.lora_up.weight": b})
    with pytest.raises(UserError, match=r"expected \(rank, in\)"):
        load(tmp_path, {f"{name}.lora_down.weight": a[:0], f"{name}.lora_up.weight": b[:, :0]})


def test_factors_of_integers(tmp_path):
    tensors = kohya(random_pairs(["img_in"]))
    key = f"lora_unet_img_in.{KOHYA[1]}"
    tensors[key] = tensors[key].astype(np.uint8)
    with pytest.raises(UserError, match=rf"{re.escape(key)} is of uint8, quantised in a way"):
        load(tmp_path, tensors)


@pytest.mark.parametrize("name", FILES)
def test_a_key_that_is_spoilt_is_refused_or_used(tmp_path, name):
    """Never loaded and ignored: a changed letter is named; a changed number is another layer."""
    write, layers = FILES[name]
    tensors = write(random_pairs(layers))
    rng = random.Random(name)
    keys = sorted(tensors)
    file = tmp_path / "lora.safetensors"
    refused = 0
    for _ in range(40):
        key = rng.choice(keys)
        at = rng.randrange(len(key))
        spoilt = key[:at] + rng.choice(("", "x", "_", ".", "7")) + key[at + rng.randrange(2) :]
        if spoilt in tensors:
            continue
        write_tensors(file, {spoilt if k == key else k: array for k, array in tensors.items()})
        try:
            loaded = load_adapter(file)
        except UserError:
            refused += 1
        else:
            number = re.sub(r"\d+", "#", key) == re.sub(r"\d+", "#", spoilt)
            assert number or spoilt.endswith("down.weight"), spoilt
            assert any(spoilt.startswith(each.name) for each in loaded.adapter.values())
    assert refused > 30
