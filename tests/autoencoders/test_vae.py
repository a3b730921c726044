"""AutoencoderKL: against diffusers' outputs on a small random model with all parameters at work."""

from dataclasses import replace
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from scipy.special import softmax

from taca_jax.autoencoders import vae_original
from taca_jax.autoencoders.vae import (
    ATTENTION_CHUNK,
    AutoencoderKL,
    chunked_attention,
    upsample_nearest,
)
from taca_jax.autoencoders.vae_diffusers import TABLE, config_of
from taca_jax.errors import UserError
from taca_jax.families.flux.family import FLUX_VAE
from taca_jax.families.sd3.family import SD3_VAE
from taca_jax.formats.settings import read_settings
from taca_jax.formats.tensor_files import open_tensors
from tests.compare import relative_error
from tests.golden import nhwc
from tests.models import from_layout, layout_shapes, shapes_alone
from tests.shared import shared_path


@partial(jax.jit, static_argnums=(0, 1))
def _run(graph, method, state, *args):
    return getattr(nnx.merge(graph, state), method)(*args)


def run(model: AutoencoderKL, method: str, *args):
    """A method of the model, jitted once per method."""
    graph, state = nnx.split(model)
    return _run(graph, method, state, *args)


def golden_model(family: str, dtype=jnp.float32) -> AutoencoderKL:
    folder = shared_path(f"golden/{family}/vae")
    config = config_of(read_settings(folder))
    return from_layout(TABLE, open_tensors(folder), config, dtype=dtype)


@pytest.fixture(scope="module")
def flux():
    return golden_model("flux"), load_file(shared_path("golden/flux/golden.safetensors"))


def test_moments_match_the_original(flux):
    model, golden = flux
    mean, logvar = run(model, "moments", nhwc(golden["vae.in"]))
    assert relative_error(mean, nhwc(golden["vae.mean"])) <= 1e-5
    assert relative_error(logvar, nhwc(golden["vae.logvar"])) <= 1e-5


@pytest.mark.parametrize("name", ["plain", "taca_lora"])
def test_decode_matches_the_original(flux, name):
    """The pipeline decodes the last packed latents: "b (h w) (c ph pw)"."""
    model, golden = flux
    b, _, height, width = golden[f"{name}.image"].shape
    tokens = golden[f"{name}.trajectory"][-1].reshape(b, height // 16, width // 16, 16, 2, 2)
    latents = tokens.transpose(0, 1, 4, 2, 5, 3).reshape(b, height // 8, width // 8, 16)
    images = jnp.clip(run(model, "decode", jnp.asarray(latents)) / 2 + 0.5, 0, 1)
    assert relative_error(images, nhwc(golden[f"{name}.image"])) <= 1e-5


def test_encode_is_scaled_and_shifted_and_samples_with_a_key(flux):
    model, golden = flux
    images = nhwc(golden["vae.in"])
    mean, logvar = run(model, "moments", images)
    latents = run(model, "encode", images)
    np.testing.assert_allclose(latents / 0.3611 + 0.1159, mean, rtol=1e-4, atol=1e-5)
    noise = np.concatenate(
        [
            (run(model, "encode", images, jax.random.key(i)) - latents)
            / (0.3611 * jnp.exp(logvar / 2))
            for i in range(4)
        ]
    )
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)


def test_bfloat16_stays_close(flux):
    model, golden = flux
    low = golden_model("flux", jnp.bfloat16)
    latents = run(model, "encode", nhwc(golden["vae.in"]))
    assert relative_error(run(low, "decode", latents), run(model, "decode", latents)) < 0.05


def test_full_size_has_exactly_the_parameters_of_the_original():
    config = FLUX_VAE
    assert replace(FLUX_VAE, scaling_factor=1.5305, shift_factor=0.0609) == SD3_VAE
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=config.channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.groups,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    abstract = nnx.eval_shape(lambda: AutoencoderKL(config, rngs=nnx.Rngs(0)))
    count = sum(param.size for param in jax.tree.leaves(nnx.state(abstract, nnx.Param)))
    assert count == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("length", [8, 16, 17])
def test_chunked_attention_equals_attention_at_once(length):
    q, k, v = np.random.default_rng(0).standard_normal((3, 2, length, 6), np.float32)
    weights = softmax(q @ k.swapaxes(1, 2) / 6**0.5, axis=-1)
    attend = jax.jit(partial(chunked_attention, chunk=8))
    np.testing.assert_allclose(attend(q, k, v), weights @ v, atol=2e-6)


def test_1024_px_never_holds_all_scores():
    """128 x 128 positions: the largest value in the program is one chunk of their scores."""
    positions = jax.ShapeDtypeStruct((1, 128 * 128, 8), jnp.float32)
    program = jax.make_jaxpr(chunked_attention)(positions, positions, positions)
    assert max(sizes(program.jaxpr)) == 128 * 128 * ATTENTION_CHUNK


def sizes(jaxpr):
    for equation in jaxpr.eqns:
        yield from (variable.aval.size for variable in equation.outvars)
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            yield from sizes(inner)


def test_upsample_repeats_pixels():
    x = np.arange(12.0).reshape(1, 2, 3, 2)
    np.testing.assert_array_equal(upsample_nearest(jnp.asarray(x)), x.repeat(2, 1).repeat(2, 2))


def test_arrays_that_do_not_fit_are_refused(flux):
    model, _ = flux
    with pytest.raises(UserError, match=r"20 x 16.*multiples of 8"):
        model.encode(jnp.zeros((1, 20, 16, 3)))
    with pytest.raises(UserError, match=r"expected \[b, h, w, 3\]"):
        model.encode(jnp.zeros((1, 3, 16, 16)))
    with pytest.raises(UserError, match=r"uint8.*\[-1, 1\]"):
        model.encode(jnp.zeros((1, 16, 16, 3), jnp.uint8))
    with pytest.raises(UserError, match=r"expected \[b, h, w, 16\]"):
        model.decode(jnp.zeros((1, 2, 2, 4)))


def test_the_size_of_an_original_file_is_in_its_shapes():
    tensors = shapes_alone(layout_shapes(vae_original.table_of(FLUX_VAE), FLUX_VAE))
    assert vae_original.is_autoencoder(tensors)
    assert vae_original.inferred(tensors, like=FLUX_VAE) == FLUX_VAE
