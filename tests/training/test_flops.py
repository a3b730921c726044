"""The count of arithmetic against XLA's, and against what is published of the full-size model."""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import flux_taca, sd35_taca
from taca_jax.data.config import DataConfig
from taca_jax.families.flops import forward_flops, further_flops
from taca_jax.families.flux.model import FLUX_DEV
from taca_jax.families.flux2.model import KLEIN_BASE_4B
from taca_jax.families.registry import family_of
from taca_jax.families.sd3.model import SD35_MEDIUM
from taca_jax.nn.kinds import abstract_model
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.chips import CHIPS, chip_of
from taca_jax.text.config import TextConfig
from taca_jax.training.models import open_models
from tests.random_models import random_model
from tests.training.tiny import tiny_config

# XLA counts a loop's body once: one layer of each kind.
ONE_LAYER = {
    "flux": replace(FLUX_DEV, num_heads=4, num_double_blocks=1, num_single_blocks=1, txt_dim=256),
    "sd3": replace(
        SD35_MEDIUM, num_heads=8, num_layers=3, num_dual_layers=1, position_size=16, txt_dim=256
    ),
    "flux2": replace(
        KLEIN_BASE_4B, num_heads=4, num_double_blocks=1, num_single_blocks=1, txt_dim=256
    ),
}
SIDE, TEXT, BATCH = 16, 48, 2


def inputs_of(config):
    """Latents, timestep, text and pooled text, abstract."""
    shapes = (
        (BATCH, SIDE, SIDE, config.latent_channels),
        (BATCH,),
        (BATCH, TEXT, config.txt_dim),
        (BATCH, config.pooled_dim),
    )
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@pytest.mark.parametrize("name", ONE_LAYER)
def test_the_count_is_that_of_xla(name):
    config = ONE_LAYER[name]
    graph, state = nnx.split(abstract_model(config, dtype=jnp.float32))
    options = {"guidance": jnp.ones(BATCH)} if name == "flux" else {}

    def forward(state, latents, timestep, txt, pooled):
        model = nnx.merge(graph, state)
        return model(latents, timestep, txt, pooled, attention="reference", **options)

    theirs = jax.jit(forward).lower(state, *inputs_of(config)).cost_analysis()["flops"]
    ours = BATCH * forward_flops(config, image=(SIDE // config.patch_size) ** 2, text=TEXT)
    assert ours == pytest.approx(theirs, rel=0.03)


@pytest.mark.parametrize("name", ["flux", "flux2"])
def test_what_is_recomputed_is_that_of_xla(name):
    """From each step of remat to the next one that keeps more, of a LoRA's gradients. (SD3's last
    block, whose attention is counted with the others', is not recomputed.)"""
    config = ONE_LAYER[name]
    model = random_model(config)
    add_lora(model, LoRAConfig(rank=1), family_of(config).lora.targets, rngs=nnx.Rngs(0))
    options = {"guidance": jnp.ones(BATCH)} if name == "flux" else {}
    policies: tuple[Remat, ...] = ("full", "attention", "attention+qkv", "attention+qkv+mlp")

    def theirs(remat: Remat) -> float:
        model.remat = remat
        graph, factors, rest = nnx.split(model, LoRAParam, ...)

        def loss(factors, rest, *inputs):
            model = nnx.merge(graph, factors, rest)
            out = model(*inputs, attention="chunked", lora_scale=jnp.ones(BATCH), **options)
            return jnp.sum(jnp.square(out))

        lowered = jax.jit(jax.grad(loss)).lower(factors, rest, *inputs_of(config))
        return lowered.cost_analysis()["flops"]

    counted = [theirs(remat) for remat in policies]
    tokens = {"image": (SIDE // config.patch_size) ** 2, "text": TEXT}
    ours = [BATCH * further_flops(config, each, all_trained=False, **tokens) for each in policies]
    for more, less in itertools.pairwise(range(len(policies))):
        fewer = counted[more] - counted[less]
        assert fewer == pytest.approx(ours[more] - ours[less], rel=0.1), policies[less]


def test_of_the_full_size_model_it_is_what_others_count():
    """MaxDiffusion's 3 x 74.4 TFLOP an image at 1024 px, forward and both gradients."""
    assert forward_flops(FLUX_DEV, image=4096, text=512) == pytest.approx(74.4e12, rel=0.05)


def test_what_a_step_does_beyond_forward_and_gradients():
    """Of FLUX.1-dev at 1024 px, by hand: without remat half again attention's FLOPs, of forward and
    gradients together five products of nine; then what each step of remat does not keep."""
    tokens = {"image": 4096, "text": 512}
    hidden, joint, double, single = 3072, 4096 + 512, 19, 38
    attention = 4 * hidden * joint**2 * (double + single)
    square = 2 * hidden**2 * joint  # a product of the hidden width, for all tokens
    products = {
        "qkv": (double + single) * 3 * square,
        "mlp": double * square + (double + single) * 4 * square,
    }

    def further(remat, *, all_trained=False):
        return further_flops(FLUX_DEV, remat, all_trained=all_trained, **tokens)

    once = further("none")
    assert once == 1.5 * attention
    # Modulations see one token, and are 0.1 % of the products.
    rest = pytest.approx(0, abs=2e-3 * sum(products.values()))
    assert further("attention+qkv+mlp") - once == rest
    assert further("attention+qkv") - once - products["mlp"] == rest
    assert further("attention") - once - sum(products.values()) == rest
    assert further("full") - further("attention") == attention
    last = double * 4 * square + single * 5 * square  # mlp_out, and a single block's out
    assert further("full", all_trained=True) - further("full") == last


def test_a_step_is_forward_and_its_gradients():
    data = DataConfig("generated:shapes/64", 8, 40)
    config = tiny_config("run", data=data, grad_accumulation=2)
    once = forward_flops(config.model, image=100, text=16)
    assert open_models(config).step_flops == 3 * 16 * once
    lora = replace(config, lora=LoRAConfig(), model=None, base="shapes_base", text=TextConfig())
    models = open_models(lora)
    assert models.tokens == {"image": 100, "text": 16}
    once = forward_flops(models.transformer, image=100, text=16)
    assert models.step_flops == 2 * 16 * once


def test_stable_diffusion_reads_clip_before_t5():
    flux, sd35 = (open_models(each.CONFIG, published=True) for each in (flux_taca, sd35_taca))
    assert flux.tokens["text"] == 512
    assert sd35.tokens["text"] == 333


def test_peaks_are_known_of_tpus_alone():
    assert chip_of("TPU v5 lite") is CHIPS["v5e"]
    assert chip_of("TPU v5") is CHIPS["v5p"]
    assert chip_of("cpu") is None
