"""A base in 8 or 4 bits: its codes, which layers have them, loading, and what LoRA makes of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import SingleDeviceSharding
from taca_jax.weights.placing import load_quantized

from taca_jax.autoencoders.vae import VAE_KIND
from taca_jax.errors import UserError
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import FLUX_DEV
from taca_jax.families.sd3.model import SD35_MEDIUM
from taca_jax.nn.kinds import abstract_model, flat_params
from taca_jax.nn.layers import Linear, LoRAParam, Quantized
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.nn.low_bit import NF4_LEVELS, decode
from taca_jax.nn.quantization import encode, quantize, quantized_layers, shapes
from taca_jax.nn.stacking import make_stack, run_stack
from taca_jax.text.t5 import T5_KIND, T5_XXL, T5Config
from taca_jax.weights.folders import load_model, save_model
from taca_jax.weights.loading import LoadOptions
from tests.compare import relative_error
from tests.random_models import random_model, randomise
from tests.training.tiny import T5

encode_jit = jax.jit(encode, static_argnames="to")
decode_jit = jax.jit(partial(decode, dtype=jnp.float32))


def kernel(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, np.float32) / shape[-2] ** 0.5


@pytest.mark.parametrize(("to", "limit"), [("int8", 0.011), ("nf4", 0.095)])
def test_codes_are_the_nearest(to, limit):
    """No code beside the one that was taken is nearer; normally distributed weights are near."""
    weights = kernel(2, 1024, 96)
    weights[0, :, 3] = 0  # a channel that is off
    codes, scales = encode_jit(weights, to=to)
    decoded = np.asarray(decode_jit(codes, scales))
    assert not decoded[0, :, 3].any()
    assert relative_error(decoded, weights) < limit
    rows = np.repeat(np.float32(scales), 1024 // scales.shape[-2], axis=-2)
    levels = np.arange(-127, 128) if to == "int8" else np.array(NF4_LEVELS)
    gaps = np.diff(levels).max() / 2 * rows
    assert (np.abs(decoded - weights) <= gaps * 1.01).all()
    for neighbour in (-1, 1):
        numbers = np.clip(
            np.asarray(codes).astype(int) + neighbour, *((-127, 127) if to == "int8" else (0, 15))
        )
        other = (numbers if to == "int8" else np.float32(NF4_LEVELS)[numbers]) * rows
        assert (np.abs(decoded - weights) <= np.abs(other - weights) + 1e-6).all()


def test_the_largest_of_a_block_is_kept():
    weights = kernel(128, 4)
    weights[70, 2] = -9
    codes, scales = encode_jit(weights, to="nf4")
    assert scales.shape == (2, 4)
    scales = np.asarray(scales, np.float32)
    assert scales[1, 2] == 9
    assert np.asarray(codes)[70, 2] == 0  # the level -1
    others = np.delete(scales, 2, axis=1)
    assert others.max() < 1  # blocks of other outputs know nothing of it


@pytest.mark.parametrize(
    ("config", "kind", "billions", "at_least"),
    [
        (FLUX_DEV, "flux", 11.9, 0.99),
        (SD35_MEDIUM, "sd3", 2.47, 0.89),
        (T5_XXL, "t5", 4.76, 0.97),
    ],
)
def test_nearly_all_of_a_full_size_model_is_quantised(config, kind, billions, at_least):
    model = abstract_model(config, dtype=jnp.bfloat16)
    count = sum(param.size for param in flat_params(model).values())
    quantize(model, kind, "nf4")
    after = flat_params(model)
    codes = sum(
        p.size for n, p in after.items() if isinstance(p, Quantized) and n.endswith("kernel")
    )
    scales = sum(p.size for n, p in after.items() if n.endswith("kernel_scale"))
    assert count / 1e9 == pytest.approx(billions, rel=0.01)
    assert codes / count > at_least
    assert scales == codes / 64
    assert not any(
        "mod" in name.split(".") and not isinstance(p, Quantized)
        for name, p in after.items()
        if name.endswith("kernel") and "blocks" in name
    )


def test_other_models_and_odd_sizes_are_refused():
    with pytest.raises(UserError, match="kind vae are not quantised; only flux, sd3, t5 are"):
        next(quantized_layers(nnx.Module(), VAE_KIND))
    with pytest.raises(UserError, match="q has 1000 inputs; nf4 takes 16 to 64 together"):
        shapes("nf4", "q", (1000, 8))
    assert shapes("int8", "q", (1000, 8))[1].shape == (1, 8)
    assert shapes("nf4", "q", (3, 96, 8))[1].shape == (3, 3, 8)


@pytest.mark.parametrize("format", ["orbax", "safetensors"])
def test_a_model_is_quantised_as_it_is_loaded(tmp_path, format):
    """As whole models are; what is stored in bfloat16 too, and each part where it belongs."""
    model = random_model(T5)
    save_model(tmp_path / "m", model, dtype=jnp.bfloat16)
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    where, asked = jax.NamedSharding(mesh, jax.P()), {}

    def place(kind, path, shape):
        asked[path] = shape
        return where

    loaded = load_model(
        tmp_path / "m", LoadOptions(dtype=jnp.bfloat16, quantize="nf4", place=place)
    )
    expected = load_model(tmp_path / "m", LoadOptions(dtype=jnp.bfloat16))
    quantize(expected, T5_KIND, "nf4")
    ours, theirs = flat_params(loaded), flat_params(expected)
    assert {name: param.shape for name, param in ours.items()} == asked
    assert ours.keys() == theirs.keys()
    for name, param in ours.items():
        assert param.get_value().sharding == where, name
        assert param.dtype == theirs[name].dtype, name
        assert np.array_equal(param.get_value(), theirs[name].get_value()), name
    with pytest.raises(UserError, match="a quantised model is not written"):
        save_model(tmp_path / "q", loaded)


def test_a_layer_that_is_in_no_stack_is_loaded_too():
    weights = kernel(64, 8)
    one = SingleDeviceSharding(jax.devices()[0])
    found = load_quantized(
        weights.shape,
        "int8",
        codes_at=one,
        scales_at=one,
        path="q",
        read=lambda layer: weights[layer],
    )
    for ours, expected in zip(found, encode_jit(weights, to="int8"), strict=True):
        assert np.array_equal(ours, expected)


def test_a_damaged_kernel_is_said(tmp_path):
    config = T5Config(11, 32, 32, 2, 16, 2)
    save_model(tmp_path / "m", random_model(config))
    for chunk in (tmp_path / "m" / "params" / "blocks.attn.q.kernel").glob("[0-9]*"):
        chunk.write_bytes(b"short")
    with pytest.raises(UserError, match=r"q\.kernel is incomplete or damaged"):
        load_model(tmp_path / "m", LoadOptions(dtype=jnp.float32, quantize="int8"))


class Layers(nnx.Module):
    """Three linear layers as one stack."""

    def __init__(self):
        types = {"param_dtype": jnp.float32, "dtype": jnp.float32}
        self.blocks = make_stack(lambda rngs: Linear(32, 32, rngs=rngs, **types), 3, nnx.Rngs(0))


@partial(jax.jit, static_argnums=0)
def products_and_gradients(graph, factors, base, x):
    def products(factors, x):
        layers = nnx.merge(graph, factors, base).blocks
        return run_stack(layers, lambda layer, x: jnp.sin(layer(x, jnp.ones(2))), x, remat="full")

    out, pull = jax.vjp(products, factors, x)
    return out, *jax.tree.leaves(pull(jnp.ones_like(out)))


@pytest.mark.parametrize("to", ["int8", "nf4"])
def test_lora_on_a_quantised_stack_is_lora_on_its_decoded_kernels(to):
    """The products and the gradients of factors and inputs, rematerialised, in a scan."""

    def run(change):
        model = Layers()
        change(model.blocks)
        add_lora(
            model, LoRAConfig(rank=2, targets=("blocks",)), ATTENTION_TARGETS, rngs=nnx.Rngs(0)
        )
        randomise(model, LoRAParam, scale=0.3)
        return products_and_gradients(*nnx.split(model, LoRAParam, ...), kernel(2, 5, 32))

    def quantised(layer):
        codes, scales = encode_jit(layer.kernel[...], to=to)
        layer.kernel, layer.kernel_scale = Quantized(codes), Quantized(scales)

    def decoded(layer):
        layer.kernel[...] = decode_jit(*encode_jit(layer.kernel[...], to=to))

    ours, expected = run(quantised), run(decoded)
    assert len(ours) == 1 + 2 + 1  # the product, two factors, the input
    for a, b in zip(ours, expected, strict=True):
        assert relative_error(a, b) < 1e-5


def test_t5_reads_nearly_the_same():
    model, tokens = random_model(T5), jnp.arange(10)[None]

    def run(model):
        graph, state = nnx.split(model)
        return jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state)

    plain = run(model)
    quantize(model, T5_KIND, "int8")
    assert 1e-4 < relative_error(run(model), plain) < 0.02
