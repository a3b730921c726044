"""The Stable Diffusion 3 transformer: what is traced, what TACA, a LoRA and skipping may change.

Sizes and outputs are held against the originals in tests/parity/test_sd3.py.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.sd3 import model as sd3
from taca_jax.families.sd3.lora import ATTENTION_TARGETS
from taca_jax.families.sd3.model import (
    SD3_MEDIUM,
    SD35_LARGE,
    SD35_MEDIUM,
    SD3Config,
    SD3Transformer,
)
from taca_jax.nn.layers import Fixed, LoRAParam
from taca_jax.nn.lora import LoRAConfig, add_lora
from tests.compare import relative_error
from tests.models import SD3
from tests.random_models import random_model, randomise

TINY = replace(SD3, latent_channels=3, num_layers=5, position_size=6, mlp_ratio=2.0)
BATCH = 2


def inputs(config: SD3Config = TINY) -> tuple[jax.Array, ...]:
    """latents, timestep, txt, pooled."""
    keys = jax.random.split(jax.random.key(7), 3)
    return (
        jax.random.normal(keys[0], (BATCH, 6, 4, config.latent_channels)),
        jnp.array([990.0, 400.0]),
        jax.random.normal(keys[1], (BATCH, 3, config.txt_dim)),
        jax.random.normal(keys[2], (BATCH, config.pooled_dim)),
    )


@nnx.jit
def run(model: SD3Transformer, args: tuple, gamma=None, lora_scale=None, skip=None):
    return model(*args, gamma=gamma, lora_scale=lora_scale, skip=skip)


@pytest.fixture(scope="module")
def base() -> SD3Transformer:
    return random_model(TINY)


@pytest.fixture(scope="module")
def plain(base) -> jax.Array:
    return run(base, inputs())


@pytest.mark.parametrize("config", [SD35_MEDIUM, SD35_LARGE, SD3_MEDIUM])
def test_the_full_size_models_run_abstractly(config):
    """At 1024 px: 64 x 64 image tokens and 333 text tokens."""

    def forward():
        types = {"param_dtype": jnp.bfloat16, "dtype": jnp.bfloat16}
        model = SD3Transformer(config, rngs=nnx.Rngs(0), **types)
        one = jnp.ones(1)
        args = (jnp.zeros((1, 128, 128, 16)), one, jnp.zeros((1, 333, 4096)))
        return model(*args, jnp.zeros((1, 2048)), gamma=one)

    out = jax.eval_shape(forward)
    assert (out.shape, out.dtype) == ((1, 128, 128, 16), jnp.float32)


def test_blocks_of_a_kind_are_traced_once(monkeypatch):
    calls = []
    for kind in (sd3.JointBlock, sd3.LastBlock):
        original = kind.__call__

        def counted(self, *args, original=original):
            calls.append((type(self).__name__, getattr(self, "img_attn", None) is not None))
            return original(self, *args)

        monkeypatch.setattr(kind, "__call__", counted)
    model = random_model(replace(TINY, num_layers=9, num_dual_layers=4))
    jax.make_jaxpr(lambda skip: model(*inputs(), skip=skip))(jnp.zeros(9, bool))
    assert calls == [("JointBlock", True), ("JointBlock", False), ("LastBlock", False)]


def test_every_input_matters_to_its_own_sample(base, plain):
    args = inputs()
    for i in range(len(args)):
        changed = list(args)
        changed[i] = args[i].at[1].multiply(0.5)
        out = run(base, tuple(changed))
        np.testing.assert_allclose(out[0], plain[0], rtol=1e-4, atol=1e-5)
        assert relative_error(out[1], plain[1]) > 1e-4, i


def test_image_tokens_have_places_and_text_tokens_none(base, plain):
    latents, timestep, txt, pooled = inputs()
    turned = run(base, (latents[:, ::-1, ::-1], timestep, txt, pooled))[:, ::-1, ::-1]
    assert relative_error(turned, plain) > 1e-2
    shuffled = run(base, (latents, timestep, txt[:, ::-1], pooled))
    np.testing.assert_allclose(shuffled, plain, rtol=1e-3, atol=1e-5)


def test_smaller_latents_get_the_middle_of_the_table():
    table = random_model(TINY).position_embed
    whole = table(6, 6).reshape(6, 6, -1)
    np.testing.assert_array_equal(table(3, 2).reshape(3, 2, -1), whole[1:4, 2:4])
    with pytest.raises(ValueError, match="are 3 x 7 tokens; this model has positions for 6 x 6"):
        table(3, 7)


def test_gamma_is_per_sample_and_one_is_none(base, plain):
    ones = run(base, inputs(), gamma=jnp.ones(BATCH))
    np.testing.assert_allclose(ones, plain, rtol=1e-5, atol=1e-6)  # two programs: XLA's rounding
    mixed = run(base, inputs(), gamma=jnp.array([1.0, 1.5]))
    np.testing.assert_array_equal(mixed[0], ones[0])
    assert relative_error(mixed[1], plain[1]) > 1e-4


def test_the_images_own_attention_is_never_scaled():
    """With nothing coming out of the joint attention, gamma changes no bit."""
    model = random_model(TINY)
    for block in (model.dual_blocks, model.joint_blocks, model.last_block):
        for stream in (block.img, getattr(block, "txt", None)):
            if hasattr(stream, "out"):
                stream.out.kernel.set_value(jnp.zeros_like(stream.out.kernel[...]))
    plain = run(model, inputs())
    np.testing.assert_array_equal(run(model, inputs(), gamma=jnp.full(BATCH, 1.5)), plain)
    kernel = model.dual_blocks.img_attn.out.kernel
    kernel.set_value(jnp.zeros_like(kernel[...]))
    assert relative_error(run(model, inputs()), plain) > 1e-3  # and it does something


def test_any_layers_can_be_skipped(base, plain):
    graph, state = nnx.split(base)
    call = jax.jit(lambda state, skip: nnx.merge(graph, state)(*inputs(), skip=skip))

    def skipping(*layers):
        return call(state, jnp.asarray(np.isin(np.arange(5), layers)))

    outs = [plain, *(skipping(layer) for layer in range(5)), skipping(0, 1, 2, 3, 4)]
    np.testing.assert_allclose(skipping(), plain, rtol=1e-4, atol=1e-5)
    for i, one in enumerate(outs):
        for other in outs[:i]:
            assert relative_error(one, other) > 1e-3
    assert call._cache_size() == 1  # which, is traced


def test_a_lora_acts_with_its_scale_on_the_published_layers(plain):
    model = random_model(TINY)
    paths = add_lora(model, LoRAConfig(rank=2, alpha=4.0), ATTENTION_TARGETS, rngs=nnx.Rngs(1))
    # q, k, v of two streams in three kinds of blocks; out of all but the last block's text.
    assert len(paths) == 3 * 6 + 5
    assert not any("img_attn" in path for path in paths)
    randomise(model, LoRAParam, scale=0.3)
    off, on = (run(model, inputs(), lora_scale=jnp.full(BATCH, s)) for s in (0.0, 1.0))
    np.testing.assert_allclose(off, plain, rtol=1e-5, atol=1e-6)
    assert relative_error(on, plain) > 1e-3


@pytest.mark.slow
def test_remat_changes_no_gradient_and_positions_are_not_trained():
    target = jax.random.normal(jax.random.key(3), inputs()[0].shape)

    def gradient(remat):
        model = random_model(replace(TINY, num_layers=2, num_dual_layers=1))
        model.remat = remat

        @nnx.jit
        def grad(model):
            def loss(model):
                return jnp.mean(jnp.square(model(*inputs(), gamma=jnp.full(BATCH, 1.2)) - target))

            return nnx.grad(loss)(model)

        return nnx.to_pure_dict(grad(model))

    kept, again = gradient("none"), gradient("full")
    assert "position_embed" not in kept
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(kept), jax.tree.leaves(again), strict=True
    ):
        name = jax.tree_util.keystr(path)
        # The last block's text attends to nothing that is kept.
        if "last_block" not in name or "['txt']" not in name:
            assert jnp.linalg.norm(a) > 0, name
            assert relative_error(b, a) < 1e-4, name


def test_bfloat16_stays_near_and_keeps_times_apart(plain):
    half = random_model(TINY, dtype=jnp.bfloat16)
    out = run(half, inputs())
    assert out.dtype == jnp.float32
    assert relative_error(out, plain) < 5e-2
    latents, _, txt, pooled = (x[:1].repeat(2, 0) for x in inputs())
    times = jnp.array([979.0, 981.0])
    assert times.astype(jnp.bfloat16)[0] == times.astype(jnp.bfloat16)[1]
    ours = run(half, (latents, times, txt, pooled))
    assert relative_error(ours[0], ours[1]) > 1e-2


def test_the_table_of_positions_is_fixed(base):
    assert isinstance(base.position_embed.embedding, Fixed)
    assert not isinstance(base.position_embed.embedding, nnx.Param)


@pytest.mark.parametrize(
    ("place", "name", "given", "expected"),
    [(0, "latents", 4, 3), (2, "txt", 13, 12), (3, "pooled", 11, 10)],
)
def test_channels_that_do_not_fit(base, place, name, given, expected):
    args = list(inputs())
    args[place] = jnp.zeros((*args[place].shape[:-1], given))
    with pytest.raises(ValueError, match=f"{name} has {given} channels; .* expects {expected}"):
        base(*args)


def test_a_mask_of_another_length(base):
    with pytest.raises(ValueError, match=r"skip is \(4,\); this model has 5 layers"):
        base(*inputs(), skip=jnp.zeros(4, bool))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_dual_layers": 5}, "num_dual_layers is 5; .* below num_layers, 5"),
        ({"num_heads": 1, "head_dim": 6}, r"num_heads \* head_dim is 6; .* a multiple of 4"),
    ],
)
def test_configs_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message):
        replace(TINY, **change)
