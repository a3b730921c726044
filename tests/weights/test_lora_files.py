"""LoRA files: what is read acts as the file says, and what does not fit is named."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.flux.family import FLUX
from taca_jax.families.flux.model import FluxTransformer
from taca_jax.families.sd3.family import SD3
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.nn.lora import LoRAConfig, add_lora, linears
from taca_jax.weights.lora_files import (
    append_lora_file,
    load_adapter,
    open_lora,
    read_lora,
    write_lora,
)
from taca_jax.weights.shipped import find_weights
from tests import models as tiny
from tests.models import FLUX_SCHNELL
from tests.random_models import random_model

Q = "transformer_blocks.{}.attn.to_q"


@pytest.fixture
def model() -> FluxTransformer:
    return random_model(FLUX_SCHNELL)


def factors(layer: int, rank: int, inputs: int = 16, outputs: int = 16, module: str = Q):
    """A `[rank, in]` and B `[out, rank]` under PEFT's names."""
    rng = np.random.default_rng(10 * layer + rank)
    name = module.format(layer)
    return {
        f"{name}.lora_A.weight": rng.normal(size=(rank, inputs)).astype(np.float32),
        f"{name}.lora_B.weight": rng.normal(size=(outputs, rank)).astype(np.float32),
    }


def written(path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    text = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    write_tensors(path / "lora.safetensors", tensors, {"format": "pt", **text})
    return path / "lora.safetensors"


def delta(tensors: dict, layer: int) -> np.ndarray:
    """B A as `[in, out]`."""
    a, b = (tensors[f"{Q.format(layer)}.lora_{x}.weight"] for x in "AB")
    return (b @ a).T


def attached_delta(model: FluxTransformer, layer: int) -> np.ndarray:
    q = model.double_blocks.img.qkv.q
    product = q.lora_a.get_value() @ q.lora_b.get_value() * q.lora_alpha_over_rank
    return np.asarray(product[layer])


@pytest.mark.parametrize("prefix", ["", "transformer.", "base_model.model."])
def test_without_alpha_the_strength_is_one(tmp_path, model, prefix):
    tensors = factors(0, 3) | factors(1, 3)
    file = written(tmp_path, {prefix + name: array for name, array in tensors.items()})
    summary = read_lora(file, model)
    said = "PEFT LoRA of 2 layers, rank 3, strength 1, on double_blocks (img.qkv.q)"
    assert str(summary) == said
    for layer in range(2):
        np.testing.assert_allclose(attached_delta(model, layer), delta(tensors, layer), rtol=1e-4)
    # One layer only has factors: nothing else of the model was touched.
    assert [path for path, each in linears(model) if each.lora_a is not None] == [
        "double_blocks.img.qkv.q"
    ]


def test_missing_layers_and_mixed_ranks_are_one_stack(tmp_path, model):
    module = "single_transformer_blocks.{}.proj_out"
    tensors = factors(0, 2, 80, 16, module) | factors(2, 5, 80, 16, module)
    summary = read_lora(written(tmp_path, tensors), model)
    assert summary.ranks == (2, 5)
    layer = model.single_blocks.out
    assert layer.lora_a.shape == (3, 80, 5)
    product = np.asarray(layer.lora_a.get_value() @ layer.lora_b.get_value())
    for i in (0, 2):
        a, b = (tensors[f"{module.format(i)}.lora_{x}.weight"] for x in "AB")
        np.testing.assert_allclose(product[i], (b @ a).T, rtol=1e-4, atol=1e-5)
    assert not product[1].any()


@pytest.mark.parametrize(
    ("metadata", "strengths"),
    [
        ({"transformer.r": 4, "transformer.lora_alpha": 8}, (2.0, 2.0)),
        ({"r": 4, "lora_alpha": 2}, (0.5, 0.5)),
        ({"lora_alpha": 8, "use_rslora": True}, (4.0, 4.0)),
        ({"lora_alpha": 4, "alpha_pattern": {"transformer_blocks.1.attn.to_q": 2}}, (1.0, 0.5)),
        ({"lora_alpha": 4, "alpha_pattern": {"to_q": 6}}, (1.5, 1.5)),
        ({"lora_alpha": 4, "alpha_pattern": {"^to_q": 6}}, (1.0, 1.0)),
    ],
)
def test_alpha_of_the_metadata(tmp_path, model, metadata, strengths):
    tensors = factors(0, 4) | factors(1, 4)
    summary = read_lora(written(tmp_path, tensors, metadata), model)
    assert summary.strengths == tuple(sorted(set(strengths)))
    for layer, strength in enumerate(strengths):
        expected = strength * delta(tensors, layer)
        np.testing.assert_allclose(attached_delta(model, layer), expected, rtol=1e-4)
    assert model.double_blocks.img.qkv.q.lora_alpha_over_rank == 1.0


@pytest.mark.parametrize("stabilised", [False, True])
def test_what_peft_saves_is_what_diffusers_saves(tmp_path, stabilised):
    """The folder of a PeftModel, and the same factors as diffusers would name them."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q"], use_rslora=stabilised, init_lora_weights=False
    )
    if not stabilised:
        config.rank_pattern, config.alpha_pattern = {"1.attn.to_q": 2}, {"1.attn.to_q": 5}

    def block():
        attn = torch.nn.ModuleDict({"to_q": torch.nn.Linear(16, 16)})
        return torch.nn.ModuleDict({"attn": attn})

    blocks = torch.nn.ModuleList([block(), block()])
    theirs = peft.get_peft_model(torch.nn.ModuleDict({"transformer_blocks": blocks}), config)
    theirs.save_pretrained(tmp_path / "peft")

    saved = open_tensors(tmp_path / "peft")
    names = {name: name.replace("base_model.model.", "transformer.") for name in saved.shapes}
    assert all(ours != name for name, ours in names.items())
    metadata = {f"transformer.{name}": value for name, value in config.to_dict().items()}
    metadata["transformer.target_modules"] = sorted(config.target_modules)
    tensors = {ours: saved.read(name) for name, ours in names.items()}
    diffusers = load_adapter(written(tmp_path, tensors, metadata)).adapter
    given = load_adapter(tmp_path / "peft").adapter

    assert [path for path, _ in given] == ["double_blocks.img.qkv.q"] * 2
    assert given.keys() == diffusers.keys()
    for place, each in given.items():
        np.testing.assert_array_equal(each.a, diffusers[place].a)
        np.testing.assert_array_equal(each.b, diffusers[place].b)
        assert each.strength == diffusers[place].strength
        layer = theirs.base_model.model.transformer_blocks[place[1]].attn.to_q
        delta = layer.get_delta_weight("default").detach().numpy().T
        np.testing.assert_allclose(each.strength * each.a @ each.b, delta, rtol=1e-4, atol=1e-6)

    (tmp_path / "peft" / "adapter_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"adapter_config\.json cannot be read"):
        load_adapter(tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").unlink()
    assert {each.strength for each in load_adapter(tmp_path / "peft").adapter.values()} == {1.0}


def test_a_config_beside_a_file_of_diffusers_is_not_its_own(tmp_path):
    file = written(tmp_path, factors(0, 4))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    assert [each.strength for each in load_adapter(file).adapter.values()] == [1.0]


def test_alpha_tensors(tmp_path, model):
    tensors = factors(0, 4) | factors(1, 4)
    tensors[f"{Q.format(1)}.alpha"] = np.float32(1.0).reshape(())
    read_lora(written(tmp_path, tensors), model)
    np.testing.assert_allclose(attached_delta(model, 0), delta(tensors, 0), rtol=1e-4)
    np.testing.assert_allclose(attached_delta(model, 1), 0.25 * delta(tensors, 1), rtol=1e-4)


@pytest.mark.parametrize("layout", ["peft", "kohya", "native"])
def test_what_is_written_acts_as_what_was_attached(tmp_path, model, layout):
    """alpha is not the rank here; all linear layers, stacked and single."""
    add_lora(model, LoRAConfig(rank=2, alpha=5.0), (".*",), rngs=nnx.Rngs(1))
    rng = np.random.default_rng(0)
    for _, layer in linears(model):
        layer.lora_b.set_value(jnp.asarray(rng.normal(size=layer.lora_b.shape), jnp.float32))
    written_summary = write_lora(tmp_path / "x.safetensors", model, layout)
    again = random_model(FLUX_SCHNELL)
    summary = read_lora(tmp_path / "x.safetensors", again)
    assert summary == written_summary
    assert summary.strengths == (1.0,)
    for (path, ours), (_, theirs) in zip(linears(model), linears(again), strict=True):
        np.testing.assert_array_equal(ours.lora_a.get_value(), theirs.lora_a.get_value(), path)
        np.testing.assert_array_equal(ours.lora_b.get_value() * 2.5, theirs.lora_b.get_value())
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_peft_files_name_ranks_and_layers_for_peft(tmp_path, model):
    read_lora(written(tmp_path, factors(0, 2) | factors(1, 3)), model)
    write_lora(tmp_path / "out.safetensors", model)
    tensors = open_tensors(tmp_path / "out.safetensors")
    said = json.loads(tensors.metadata["lora_adapter_metadata"])
    assert said["transformer.r"] == said["transformer.lora_alpha"] == 3
    assert said["transformer.target_modules"] == [Q.format(0), Q.format(1)]
    assert tensors.shapes["transformer.transformer_blocks.0.attn.to_q.lora_A.weight"] == (3, 16)


def test_layers_that_a_file_did_not_have_are_not_written(tmp_path, model):
    read_lora(written(tmp_path, factors(1, 2)), model)
    write_lora(tmp_path / "out.safetensors", model)
    assert all(".1." in name for name in open_tensors(tmp_path / "out.safetensors").shapes)
    again = random_model(FLUX_SCHNELL)
    read_lora(tmp_path / "out.safetensors", again)
    np.testing.assert_allclose(attached_delta(again, 1), attached_delta(model, 1))


def refused(file: Path, model: FluxTransformer) -> str:
    with pytest.raises(UserError) as error:
        read_lora(file, model)
    assert "\n" not in str(error.value)
    assert str(file) in str(error.value)
    assert all(layer.lora_a is None for _, layer in linears(model))
    return str(error.value)


def test_a_lora_of_a_wider_model(tmp_path, model):
    said = refused(written(tmp_path, factors(0, 4, 32, 32) | factors(1, 4)), model)
    assert "LoRA of another model: 1 of its 2 layers do not fit" in said
    assert "transformer_blocks.0.attn.to_q maps 32 to 32 channels instead of 16 to 16" in said


def test_a_lora_of_a_deeper_model(tmp_path, model):
    said = refused(written(tmp_path, factors(0, 4) | factors(7, 4)), model)
    assert "transformer_blocks.7.attn.to_q is beyond the model's 2 layers" in said


def test_a_lora_of_parts_that_the_model_lacks(tmp_path, model):
    module = "time_text_embed.guidance_embedder.linear_1"
    said = refused(written(tmp_path, factors(0, 4, 256, 16, module)), model)
    assert f"{module} is no layer of this model" in said


def test_names_of_another_architecture(tmp_path, model):
    other = factors(0, 4, module="down_blocks.{}.attentions.0.to_q")
    said = refused(written(tmp_path, factors(0, 4) | other), model)
    assert "down_blocks.0.attentions.0.to_q.lora_A.weight is unknown" in said
    dora = {f"{Q.format(0)}.lora_magnitude_vector": np.zeros(16, np.float32)}
    assert "lora_magnitude_vector is a magnitude of DoRA, which is not supported" in refused(
        written(tmp_path, factors(0, 4) | dora), model
    )


def test_halves_and_pairs_that_do_not_fit(tmp_path, model):
    tensors = factors(0, 4)
    half = {name: array for name, array in tensors.items() if "lora_A" in name}
    assert "lora_A.weight is without its other factor" in refused(written(tmp_path, half), model)
    name = f"{Q.format(0)}.lora_B.weight"
    said = refused(written(tmp_path, tensors | {name: np.zeros((16, 5), np.float32)}), model)
    assert "lora_A.weight is (4, 16)" in said
    assert "lora_B.weight is (16, 5)" in said
    twice = tensors | {"transformer." + name: array for name, array in tensors.items()}
    said = refused(written(tmp_path, twice), model)
    pair = (name, f"transformer.{name}")
    assert any(
        f"{one} and {other} are the same factor" in said for one, other in (pair, pair[::-1])
    )


def test_files_that_are_no_lora(tmp_path, model):
    assert "it holds no factors of it" in refused(written(tmp_path, {}), model)
    file = written(tmp_path, factors(0, 4))
    file.write_bytes(file.read_bytes()[:-8])
    assert "is truncated or damaged" in refused(file, model)
    assert "is not there" in refused(tmp_path / "absent.safetensors", model)
    write_tensors(file, factors(0, 4), {"lora_adapter_metadata": "{"})
    assert "metadata lora_adapter_metadata cannot be read" in refused(file, model)


def test_native_files_that_do_not_fit(tmp_path, model):
    a, b = np.zeros((2, 16, 4), np.float32) + 1, np.zeros((2, 4, 16), np.float32)
    file = tmp_path / "x.safetensors"
    for tensors, words in (
        ({"p.lora_a": a}, "p.lora_a is without its other factor"),
        ({"p.lora_a": a, "p.lora_b": b, "q": a}, "q is no factor"),
        ({"p.lora_a": a, "p.lora_b": b[:1]}, r"p.lora_a is (2, 16, 4) and p.lora_b is (1, 4, 16)"),
        ({"p.lora_a": a, "p.lora_b": b}, "p is no layer of this model"),
    ):
        write_tensors(file, tensors)
        assert words in refused(file, model)


def test_a_model_without_factors_has_nothing_to_write(tmp_path, model):
    with pytest.raises(UserError, match="has no LoRA factors"):
        write_lora(tmp_path / "x.safetensors", model)
    assert not list(tmp_path.iterdir())


def test_every_dialect_has_its_own_name():
    for family, config in ((FLUX, FLUX_SCHNELL), (SD3, tiny.SD3)):
        for told in (None, config):
            names = [dialect.name for dialect in family.lora.dialects(told)]
            assert names[:2] == ["PEFT", "kohya"]
            assert len(set(names)) == len(names)


@pytest.mark.parametrize("layout", ["peft", "kohya", "native"])
@pytest.mark.parametrize("gate", [None, "taca", "always"])
def test_a_file_says_when_its_lora_acts(tmp_path, model, layout, gate):
    read_lora(written(tmp_path, factors(0, 2)), model)
    write_lora(tmp_path / "out.safetensors", model, layout, gate=gate)
    assert load_adapter(tmp_path / "out.safetensors").gate == gate


def test_the_lora_that_comes_with_the_package_acts_with_taca():
    assert load_adapter(find_weights("shapes_taca.safetensors")).gate == "taca"


def test_a_gate_that_is_unknown_is_refused(tmp_path, model):
    file = tmp_path / "x.safetensors"
    write_tensors(file, factors(0, 2), {"taca_jax_gate": "sometimes"})
    assert "taca_jax_gate is 'sometimes' in its metadata; expected always or taca" in refused(
        file, model
    )


def test_several_loras_are_not_written_as_one(tmp_path, model):
    for rank in (2, 3):
        append_lora_file(open_lora(written(tmp_path, factors(0, rank)), model), model)
    with pytest.raises(UserError, match="the model has 2 LoRAs; keep one"):
        write_lora(tmp_path / "out.safetensors", model)
