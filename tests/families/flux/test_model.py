"""The FLUX transformer: its sizes, what is traced, what TACA and a LoRA may change."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.families.flux import model as flux
from taca_jax.families.flux.lora import ATTENTION_TARGETS
from taca_jax.families.flux.model import (
    FLUX_DEV,
    FLUX_KREA,
    FLUX_SCHNELL,
    FluxConfig,
    FluxTransformer,
)
from taca_jax.nn.layers import LoRAParam, patchify
from taca_jax.nn.lora import LoRAConfig, add_lora, remove_lora
from taca_jax.taca import TacaConfig, active, gamma_at
from tests import models
from tests.compare import relative_error
from tests.random_models import random_model, randomise

TINY = replace(
    models.FLUX_SCHNELL,
    latent_channels=3,
    head_dim=16,
    axes_dim=(4, 6, 6),
    mlp_ratio=2.0,
    txt_dim=12,
    pooled_dim=10,
)
BATCH = 2


def with_lora(zero: bool = False) -> FluxTransformer:
    """A model with a LoRA attached; B random too unless `zero`."""
    model = random_model(TINY)
    add_lora(model, LoRAConfig(rank=2, alpha=4.0), ATTENTION_TARGETS, rngs=nnx.Rngs(1))
    if not zero:
        randomise(model, LoRAParam, scale=0.3)
    return model


def inputs(config: FluxConfig = TINY, text_len: int = 3) -> tuple[jax.Array, ...]:
    """latents, timestep, txt, pooled."""
    keys = jax.random.split(jax.random.key(7), 3)
    return (
        jax.random.normal(keys[0], (BATCH, 6, 4, config.latent_channels)),
        jnp.array([990.0, 400.0]),
        jax.random.normal(keys[1], (BATCH, text_len, config.txt_dim)),
        jax.random.normal(keys[2], (BATCH, config.pooled_dim)),
    )


@nnx.jit
def run(model: FluxTransformer, args: tuple, gamma=None, lora_scale=None, guidance=None):
    return model(*args, gamma=gamma, lora_scale=lora_scale, guidance=guidance)


@pytest.fixture(scope="module")
def base() -> FluxTransformer:
    return random_model(TINY)


@pytest.fixture(scope="module")
def adapted() -> FluxTransformer:
    return with_lora()


class TestSizes:
    @pytest.mark.parametrize(
        ("config", "parameters"),
        # As many as black-forest-labs' checkpoints hold.
        [
            (FLUX_DEV, 11_901_408_320),
            (FLUX_KREA, 11_901_408_320),
            (FLUX_SCHNELL, 11_891_178_560),
        ],
        ids=["dev", "krea", "schnell"],
    )
    def test_the_full_size_models_have_the_originals_parameters(self, config, parameters):
        model = nnx.eval_shape(
            lambda: FluxTransformer(config, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16)
        )
        leaves = jax.tree.leaves(nnx.state(model, nnx.Param))
        assert sum(leaf.size for leaf in leaves) == parameters
        assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}

    def test_the_full_size_model_runs_abstractly(self):
        """At 1024 px: 64 x 64 image tokens and 512 text tokens."""

        def forward():
            model = FluxTransformer(
                FLUX_DEV, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, dtype=jnp.bfloat16
            )
            one = jnp.ones(1)
            args = (jnp.zeros((1, 128, 128, 16)), one, jnp.zeros((1, 512, 4096)))
            return model(*args, jnp.zeros((1, 768)), guidance=one, gamma=one)

        out = jax.eval_shape(forward)
        assert (out.shape, out.dtype) == ((1, 128, 128, 16), jnp.float32)

    def test_the_velocity_has_the_latents_shape(self, base):
        args = inputs()
        out = run(base, args)
        assert out.shape == args[0].shape
        assert out.dtype == jnp.float32
        assert jnp.isfinite(out).all()


class TestTracing:
    def test_blocks_of_a_kind_are_traced_once(self, monkeypatch):
        calls = []
        for kind in (flux.DoubleBlock, flux.SingleBlock):
            original = kind.__call__

            def counted(self, *args, original=original):
                calls.append(type(self).__name__)
                return original(self, *args)

            monkeypatch.setattr(kind, "__call__", counted)
        model = random_model(replace(TINY, num_double_blocks=5, num_single_blocks=7))
        jax.make_jaxpr(lambda: model(*inputs()))()
        assert sorted(calls) == ["DoubleBlock", "SingleBlock"]

    def test_one_compilation_serves_every_gamma_scale_and_time(self, adapted):
        graph, state = nnx.split(adapted)
        latents, _, txt, pooled = inputs()

        @jax.jit
        def call(state, timestep, gamma, lora_scale):
            model = nnx.merge(graph, state)
            return model(latents, timestep, txt, pooled, gamma=gamma, lora_scale=lora_scale)

        both = partial(jnp.full, BATCH)
        outs = [
            call(state, both(t), both(gamma), both(scale))
            for t, gamma, scale in ((999.0, 1.2, 1.0), (500.0, 1.2, 1.0), (500.0, 1.0, 0.0))
        ]
        assert call._cache_size() == 1
        assert relative_error(outs[0], outs[1]) > 1e-3
        assert relative_error(outs[1], outs[2]) > 1e-3


class TestInputs:
    def test_every_input_matters(self, base):
        """A change of any of them, in one sample, changes that sample and no other."""
        args = inputs()
        reference = run(base, args)
        for i in range(len(args)):
            changed = list(args)
            changed[i] = args[i].at[1].multiply(0.5)
            out = run(base, tuple(changed))
            np.testing.assert_allclose(out[0], reference[0], rtol=1e-4, atol=1e-5)
            assert relative_error(out[1], reference[1]) > 1e-4, i

    def test_guidance_matters_where_the_model_has_it(self):
        model = random_model(replace(TINY, guidance_embed=True))
        low, high = (run(model, inputs(), guidance=jnp.full(BATCH, g)) for g in (1.0, 3.5))
        assert relative_error(low, high) > 1e-4

    def test_text_tokens_have_no_order(self, base):
        """All text stands at position zero: T5 has written the order into the embeddings."""
        latents, timestep, txt, pooled = inputs()
        out = run(base, (latents, timestep, txt[:, ::-1], pooled))
        np.testing.assert_allclose(out, run(base, inputs()), rtol=1e-3, atol=1e-5)

    def test_image_tokens_have_places(self, base):
        latents, *rest = inputs()
        out = run(base, (latents[:, ::-1, ::-1], *rest))[:, ::-1, ::-1]
        assert relative_error(out, run(base, inputs())) > 1e-2

    def test_features_are_the_image_tokens_between_double_and_single_blocks(self):
        model, args = random_model(TINY), inputs()
        with_features = nnx.jit(
            partial(FluxTransformer.with_features, blocks=TINY.num_double_blocks)
        )
        velocity, features = with_features(model, *args)
        assert features.shape == (BATCH, 6, TINY.hidden)
        np.testing.assert_array_equal(velocity, run(model, args))
        kernel = model.single_blocks.out.kernel
        kernel[...] = kernel[...] * 2
        other, same = with_features(model, *args)
        assert relative_error(other, velocity) > 1e-3
        np.testing.assert_array_equal(features, same)
        # Without their gates double blocks leave the embedded patches as they are.
        for param in (model.double_blocks.img.mod.kernel, model.double_blocks.img.mod.bias):
            param[...] = jnp.zeros_like(param[...])
        _, embedded = with_features(model, *args)
        expected = model.img_in(patchify(args[0], TINY.patch_size))
        assert relative_error(embedded, expected) < 1e-5 < relative_error(features, expected)

    def test_features_may_come_from_between_single_blocks(self):
        deep = replace(TINY, num_single_blocks=3)
        model, args = random_model(deep), inputs()
        shallow = random_model(deep)  # the same first blocks, with none behind the features
        gate = slice(2 * deep.hidden, None)
        for param in (shallow.single_blocks.mod.kernel, shallow.single_blocks.mod.bias):
            param[...] = param[...].at[2:, ..., gate].set(0)
        blocks = deep.num_double_blocks + 2
        at = nnx.jit(FluxTransformer.with_features, static_argnames="blocks")
        velocity, features = at(model, *args, blocks=blocks)
        np.testing.assert_allclose(velocity, run(model, args), rtol=1e-5, atol=1e-5)
        _, last = at(shallow, *args, blocks=blocks + 1)
        np.testing.assert_allclose(features, last, rtol=1e-5, atol=1e-5)
        with pytest.raises(UserError, match=f"features.blocks is {blocks + 2}; .* to {blocks + 1}"):
            model.with_features(*args, blocks=blocks + 2)

    def test_gamma_none_is_gamma_one_bit_for_bit(self, base):
        np.testing.assert_array_equal(
            run(base, inputs()), run(base, inputs(), gamma=jnp.ones(BATCH))
        )

    def test_gamma_is_per_sample(self, base):
        plain = run(base, inputs())
        mixed = run(base, inputs(), gamma=jnp.array([1.0, 1.5]))
        np.testing.assert_array_equal(mixed[0], plain[0])
        assert relative_error(mixed[1], plain[1]) > 1e-4

    def test_attention_implementations_agree(self, base):
        gamma = jnp.array([1.2, 1.5])
        outs = [
            nnx.jit(partial(FluxTransformer.__call__, attention=name))(base, *inputs(), gamma=gamma)
            for name in ("reference", "split", "chunked")
        ]
        assert relative_error(outs[1], outs[0]) < 1e-5
        assert relative_error(outs[2], outs[0]) < 1e-5


class TestLoRA:
    def test_it_changes_the_output_with_its_scale(self, adapted):
        base = run(adapted, inputs())
        half, full = (run(adapted, inputs(), lora_scale=jnp.full(BATCH, s)) for s in (0.5, 1.0))
        assert relative_error(half, base) > 1e-3
        assert relative_error(full, base) > relative_error(half, base)

    def test_no_scale_and_a_scale_of_zero_are_the_base(self, base, adapted):
        expected = run(base, inputs())
        np.testing.assert_array_equal(run(adapted, inputs()), expected)
        np.testing.assert_allclose(
            run(adapted, inputs(), lora_scale=jnp.zeros(BATCH)), expected, rtol=1e-5, atol=1e-6
        )

    def test_a_fresh_lora_is_the_base(self, base):
        """Its B is zero."""
        out = run(with_lora(zero=True), inputs(), lora_scale=jnp.ones(BATCH))
        np.testing.assert_allclose(out, run(base, inputs()), rtol=1e-5, atol=1e-6)

    def test_it_can_be_taken_off(self, base):
        model = with_lora()
        remove_lora(model)
        np.testing.assert_array_equal(run(model, inputs()), run(base, inputs()))

    def test_a_step_with_taca_inactive_is_the_base(self, base, adapted):
        """Per sample: at 990 TACA acts, at 400 it does not."""
        timestep = inputs()[1]
        taca = TacaConfig()
        out = run(
            adapted,
            inputs(),
            gamma=gamma_at(taca, timestep),
            lora_scale=active(taca, timestep).astype(jnp.float32),
        )
        expected = run(base, inputs())
        np.testing.assert_allclose(out[1], expected[1], rtol=1e-5, atol=1e-6)
        assert relative_error(out[0], expected[0]) > 1e-3

    def test_a_gradient_step_leaves_the_base_bit_identical(self):
        model = with_lora(zero=True)
        before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model, nnx.Param)))

        def loss(model):
            scale = jnp.ones(BATCH)
            return jnp.mean(jnp.square(model(*inputs(), gamma=1.2 * scale, lora_scale=scale)))

        @nnx.jit
        def step(model):
            grads = nnx.grad(loss, argnums=nnx.DiffState(0, LoRAParam))(model)
            lora = nnx.state(model, LoRAParam)
            nnx.update(model, jax.tree.map(lambda p, g: p - 0.1 * g, lora, grads))

        step(model)
        after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
        moved = kept = 0
        for path, value in jax.tree_util.tree_leaves_with_path(after):
            old = before
            for key in path:
                old = old[key.key]
            if path[-1].key == "lora_b":  # B = 0: A has no gradient yet
                assert not np.array_equal(old, value), path
                moved += 1
            else:
                np.testing.assert_array_equal(old, value)
                kept += 1
        assert moved == 12
        assert kept > 50


class TestGradients:
    def grads(self, remat):
        model = random_model(TINY)
        model.remat = remat
        target = jax.random.normal(jax.random.key(3), inputs()[0].shape)

        @nnx.jit
        def grad(model):
            def loss(model):
                return jnp.mean(jnp.square(model(*inputs(), gamma=jnp.full(BATCH, 1.2)) - target))

            return nnx.grad(loss)(model)

        return nnx.to_pure_dict(grad(model))

    @pytest.mark.parametrize("remat", ["full", "attention", "attention+qkv+mlp"])
    def test_remat_changes_no_gradient(self, remat):
        kept, again = self.grads("none"), self.grads(remat)
        paths = jax.tree_util.tree_leaves_with_path(kept)
        for (path, a), b in zip(paths, jax.tree.leaves(again), strict=True):
            assert jnp.linalg.norm(a) > 0, path
            assert relative_error(b, a) < 1e-5, path


class TestBfloat16:
    def test_it_stays_near_float32(self, base):
        half = random_model(TINY, dtype=jnp.bfloat16)
        out = run(half, inputs(), gamma=jnp.full(BATCH, 1.2))
        assert out.dtype == jnp.float32
        assert relative_error(out, run(base, inputs(), gamma=jnp.full(BATCH, 1.2))) < 3e-2

    def test_times_near_1000_stay_apart(self):
        """Two times that bfloat16 rounds to one must not give one output."""
        latents, _, txt, pooled = inputs()
        half = random_model(TINY, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
        times = jnp.array([979.0, 981.0])
        assert times.astype(jnp.bfloat16)[0] == times.astype(jnp.bfloat16)[1]
        same = (latents[:1].repeat(2, 0), times, txt[:1].repeat(2, 0), pooled[:1].repeat(2, 0))
        ours = run(half, same)
        assert relative_error(ours[0], ours[1]) > 1e-2


class TestErrors:
    @pytest.mark.parametrize(
        ("place", "name", "given", "expected"),
        [(0, "latents", 4, 3), (2, "txt", 13, 12), (3, "pooled", 11, 10)],
    )
    def test_channels_that_do_not_fit(self, base, place, name, given, expected):
        args = list(inputs())
        args[place] = jnp.zeros((*args[place].shape[:-1], given))
        with pytest.raises(ValueError, match=f"{name} has {given} channels; .* expects {expected}"):
            base(*args)

    def test_latents_that_are_no_whole_patches(self, base):
        _, *rest = inputs()
        with pytest.raises(ValueError, match="latents are 7 x 4; both must be multiples of 2"):
            base(jnp.zeros((BATCH, 7, 4, 3)), *rest)

    def test_guidance_for_a_model_without(self, base):
        with pytest.raises(ValueError, match="no guidance embedding"):
            base(*inputs(), guidance=jnp.ones(BATCH))

    def test_no_guidance_for_a_model_with_it(self):
        with pytest.raises(ValueError, match="takes a guidance scale; none was given"):
            random_model(replace(TINY, guidance_embed=True))(*inputs())

    def test_a_gamma_of_another_batch(self, base):
        with pytest.raises(ValueError, match=r"shape \(2,\), one per sample; got \(3,\)"):
            base(*inputs(), gamma=jnp.ones(3))

    def test_rotary_axes_that_do_not_fill_a_head(self):
        with pytest.raises(UserError, match=r"\(4, 6, 8\) must be even and sum to head_dim 16"):
            replace(TINY, axes_dim=(4, 6, 8))
        with pytest.raises(UserError, match="must be even"):
            replace(TINY, axes_dim=(5, 5, 6))

    def test_a_model_without_blocks(self):
        with pytest.raises(UserError, match="at least one double and one single block"):
            replace(TINY, num_single_blocks=0)
