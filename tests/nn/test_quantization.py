"""A base in 8 or 4 bits: its codes, which layers have them, and what LoRA makes of it."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.autoencoders.vae import VAE_KIND
from taca_jax.errors import UserError
from taca_jax.families.flux.model import FLUX_DEV
from taca_jax.families.sd3.model import SD35_MEDIUM
from taca_jax.nn.kinds import abstract_model, flat_params, kind_of
from taca_jax.nn.layers import Linear, LoRAParam, Quantized
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.nn.low_bit import NF4_LEVELS, decode
from taca_jax.nn.quantization import encode, quantize, quantized_layers, shapes
from taca_jax.nn.stacking import make_stack, run_stack
from taca_jax.text.t5 import T5_KIND, T5_XXL
from tests.compare import relative_error
from tests.models import T5
from tests.random_models import random_model, randomise

WIDE = replace(T5, dim=32, ff_dim=32, head_dim=16)
"""nf4 takes 16 inputs together at least."""

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
    ("config", "billions", "at_least"),
    [(FLUX_DEV, 11.9, 0.99), (SD35_MEDIUM, 2.47, 0.89), (T5_XXL, 4.76, 0.97)],
)
def test_nearly_all_of_a_full_size_model_is_quantised(config, billions, at_least):
    model = abstract_model(config, dtype=jnp.bfloat16)
    count = sum(param.size for param in flat_params(model).values())
    quantize(model, kind_of(config), "nf4")
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
    with pytest.raises(
        UserError, match="kind vae are not quantised; only flux, flux2, qwen3, sd3, t5 are"
    ):
        next(quantized_layers(nnx.Module(), VAE_KIND))
    with pytest.raises(UserError, match="q has 1000 inputs; nf4 takes 16 to 64 together"):
        shapes("nf4", "q", (1000, 8))
    assert shapes("int8", "q", (1000, 8))[1].shape == (1, 8)
    assert shapes("nf4", "q", (3, 96, 8))[1].shape == (3, 3, 8)


class Layers(nnx.Module):
    """Three linear layers as one stack."""

    def __init__(self):
        types = {"param_dtype": jnp.float32, "dtype": jnp.float32}
        self.blocks = make_stack(partial(Linear, 32, 32), 3, rngs=nnx.Rngs(0), **types)


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
        add_lora(model, LoRAConfig(rank=2), ("blocks",), rngs=nnx.Rngs(0))
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
    model, tokens = random_model(WIDE), jnp.arange(10)[None]

    def run(model):
        graph, state = nnx.split(model)
        return jax.jit(lambda state: nnx.merge(graph, state)(tokens))(state)

    plain = run(model)
    quantize(model, T5_KIND, "int8")
    assert 1e-4 < relative_error(run(model), plain) < 0.02
