"""The MM-DiTs' small parts: layers, time embedding, patches and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from taca_jax.nn import rope
from taca_jax.nn.layers import (
    TIMESTEP_CHANNELS,
    ZEROS,
    Linear,
    LoRAParam,
    MLPEmbedder,
    Quantized,
    RMSNorm,
    layer_norm,
    matmul,
    modulate,
    of_one_input,
    patchify,
    timestep_embedding,
    unpatchify,
)
from taca_jax.nn.rope import joint_rotation, rotate

F32 = {"param_dtype": jnp.float32, "dtype": jnp.float32}


def noise(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def adapted(seed: int = 0) -> Linear:
    """A layer with LoRA factors that are both at work."""
    layer = Linear(6, 4, rngs=nnx.Rngs(seed), **F32)
    layer.lora_a, layer.lora_b = LoRAParam(noise(6, 2)), LoRAParam(noise(2, 4, seed=1))
    layer.lora_alpha_over_rank = 0.5
    return layer


class TestLinear:
    @pytest.mark.parametrize("shape", [(3, 6), (3, 5, 6), (3, 2, 5, 6)])
    def test_it_is_the_product_and_the_bias(self, shape):
        layer = Linear(6, 4, rngs=nnx.Rngs(0), **F32)
        layer.bias[...] = noise(4)
        x = noise(*shape)
        np.testing.assert_allclose(layer(x), x @ layer.kernel[...] + layer.bias[...], rtol=1e-6)

    def test_the_lora_adds_its_product_by_the_scale_of_each_sample(self):
        layer, x, scale = adapted(), noise(3, 5, 6), jnp.array([0.0, 1.0, -2.0])
        update = 0.5 * layer.lora_a[...] @ layer.lora_b[...]
        expected = layer(x) + scale[:, None, None] * (x @ update)
        np.testing.assert_allclose(layer(x, scale), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("quantization", ["none", "int8"])
    def test_arrays_side_by_side_need_not_be_joined(self, quantization):
        """A single block's `out` reads attention's output and the MLP's; gradients too."""
        layer, x, scale = adapted(), noise(2, 3, 6), jnp.array([1.0, 0.5])
        if quantization == "int8":
            layer.kernel_scale = Quantized(jnp.full((1, 4), 0.02))
            layer.kernel = Quantized(jnp.arange(24, dtype=jnp.int8).reshape(6, 4))
        parts = tuple(jnp.split(x, [2, 5], axis=-1))
        np.testing.assert_allclose(layer(parts, scale), layer(x, scale), rtol=1e-5, atol=1e-6)

        def gradient(given):
            def square(layer):
                return (layer(given, scale) ** 2).sum()

            return jax.tree.leaves(nnx.grad(square, argnums=nnx.DiffState(0, LoRAParam))(layer))

        for ours, theirs in zip(gradient(parts), gradient(x), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)

    def test_layers_of_one_input_read_it_once_for_their_loras(self):
        """Values and gradients are those of each layer alone; factors may differ in rank, or be
        missing."""
        layers = [adapted(seed=seed) for seed in range(3)]
        layers[1].lora_a, layers[1].lora_b = LoRAParam(noise(6, 3)), LoRAParam(noise(3, 4))
        layers.insert(2, Linear(6, 4, rngs=nnx.Rngs(3), **F32))
        graph, state = nnx.split(layers)
        x, scale = noise(2, 5, 6), jnp.array([1.0, 0.5])

        def together(state, x):
            return of_one_input(nnx.merge(graph, state), x, scale)

        def apart(state, x):
            return [layer(x, scale) for layer in nnx.merge(graph, state)]

        def gradients(function):
            return jax.grad(lambda *a: sum((y**2).sum() for y in function(*a)), (0, 1))(state, x)

        for function in (lambda run: run(state, x), gradients):
            ours, theirs = (jax.tree.leaves(function(run)) for run in (together, apart))
            for one, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
        products = [
            str(jax.make_jaxpr(run)(state, x)).count("dot_general") for run in (together, apart)
        ]
        assert products == [4 + 1 + 3, 4 + 3 + 3]

    def test_a_scale_of_zero_is_the_base_bit_for_bit(self):
        layer, x = adapted(), noise(3, 5, 6)
        np.testing.assert_array_equal(layer(x, jnp.zeros(3)), layer(x))

    def test_without_factors_the_scale_says_nothing(self):
        layer, x = Linear(6, 4, rngs=nnx.Rngs(0), **F32), noise(3, 5, 6)
        np.testing.assert_array_equal(layer(x, jnp.ones(3)), layer(x))

    def test_parameters_and_computation_have_their_own_types(self):
        layer = Linear(6, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float32, dtype=jnp.bfloat16)
        assert layer.kernel[...].dtype == jnp.float32
        assert layer(noise(3, 6)).dtype == jnp.bfloat16

    def test_a_kernel_starts_as_it_is_told(self):
        layer = Linear(6, 4, rngs=nnx.Rngs(0), kernel_init=ZEROS, **F32)
        assert not layer(noise(3, 6)).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(7, 6), (3, 5, 6), (2, 3, 5, 6)])
def test_matmuls_gradients_are_the_products(shape, dtype):
    x, kernel, dy = (y.astype(dtype) for y in (noise(*shape), noise(6, 4), noise(*shape[:-1], 4)))
    ours = jax.jit(lambda x, kernel, dy: jax.vjp(matmul, x, kernel)[1](dy))(x, kernel, dy)
    plain = jax.vjp(lambda x, kernel: x @ kernel, *(y.astype(jnp.float32) for y in (x, kernel)))
    for a, b in zip(ours, plain[1](dy.astype(jnp.float32)), strict=True):
        assert a.dtype == dtype
        tolerance = 1e-5 if dtype == jnp.float32 else 3e-2
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=tolerance, atol=3 * tolerance)


class TestNorms:
    def test_layer_norm_has_mean_zero_and_variance_one(self):
        y = layer_norm(5 + 3 * noise(4, 64))
        np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
        np.testing.assert_allclose(y.var(-1), 1, rtol=1e-4)

    def test_layer_norm_keeps_its_digits_far_from_zero(self):
        """The variance of x - mean, not the difference of two large squares."""
        x = noise(4, 64)
        np.testing.assert_allclose(layer_norm(x + 1000), layer_norm(x), atol=2e-3)

    def test_modulate_scales_and_shifts_by_sample(self):
        x, shift, scale = noise(2, 5, 8), noise(2, 8, seed=1), noise(2, 8, seed=2)
        expected = layer_norm(x) * (1 + scale)[:, None] + shift[:, None]
        np.testing.assert_allclose(modulate(x, shift, scale), expected, rtol=1e-6)

    def test_rms_norm_divides_by_the_root_mean_square(self):
        norm = RMSNorm(8, rngs=nnx.Rngs(0), param_dtype=jnp.float32, epsilon=1e-6)
        norm.scale[...] = noise(8)
        x = np.asarray(noise(3, 8), np.float64)
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(norm.scale[...])
        np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, rtol=1e-5)

    @pytest.mark.parametrize("norm", ["layer", "rms"])
    def test_norms_compute_in_float32(self, norm):
        """In bfloat16 the mean of a million would lose its last digits."""
        x = (noise(4, 4096) + 8).astype(jnp.bfloat16)
        rms = RMSNorm(4096, rngs=nnx.Rngs(0), param_dtype=jnp.bfloat16, epsilon=1e-6)
        run = layer_norm if norm == "layer" else rms
        assert run(x).dtype == jnp.bfloat16
        exact = run(x.astype(jnp.float32))
        np.testing.assert_allclose(run(x).astype(jnp.float32), exact, rtol=8e-3, atol=1e-6)


class TestTimestepEmbedding:
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
    def test_it_is_the_sinusoids_of_the_definition(self, dtype):
        """Cosines first; near 1000 as precise as float32 phases allow."""
        time = jnp.array([0, 0.5, 980.0, 999.5, 1000], dtype)
        frequency = 10000.0 ** (-np.arange(128, dtype=np.float64) / 128)
        phase = np.asarray(time, np.float64)[:, None] * frequency
        expected = np.concatenate([np.cos(phase), np.sin(phase)], axis=-1)
        out = timestep_embedding(time)
        assert out.dtype == jnp.float32
        assert out.shape == (5, TIMESTEP_CHANNELS)
        np.testing.assert_allclose(out, expected, atol=2e-4)

    def test_near_1000_a_bfloat16_model_still_sees_the_time(self):
        """What reaches the first layer differs from the exact one by bfloat16's rounding of values
        in -1..1, not by radians of phase."""
        embedder = MLPEmbedder(
            TIMESTEP_CHANNELS, 8, rngs=nnx.Rngs(0), param_dtype=jnp.float32, dtype=jnp.bfloat16
        )
        exact = MLPEmbedder(TIMESTEP_CHANNELS, 8, rngs=nnx.Rngs(0), **F32)
        time = jnp.array([971.3, 983.7, 999.1])
        ours, theirs = (e(timestep_embedding(time)) for e in (embedder, exact))
        error = jnp.linalg.norm(ours.astype(jnp.float32) - theirs) / jnp.linalg.norm(theirs)
        assert error < 2e-2


class TestPatches:
    @settings(max_examples=5)
    @given(
        st.integers(1, 3),
        st.integers(1, 4),
        st.integers(1, 4),
        st.integers(1, 4),
        st.integers(1, 5),
    )
    def test_unpatchify_is_the_inverse(self, batch, rows, columns, patch, channels):
        x = np.arange(batch * rows * columns * patch**2 * channels)
        x = jnp.asarray(x.reshape(batch, rows * patch, columns * patch, channels))
        tokens = patchify(x, patch)
        assert tokens.shape == (batch, rows * columns, channels * patch**2)
        np.testing.assert_array_equal(unpatchify(tokens, patch, *x.shape[1:3]), x)

    def test_tokens_run_by_rows_and_hold_channel_row_column(self):
        x = np.arange(4 * 6 * 3).reshape(1, 4, 6, 3)
        tokens = patchify(jnp.asarray(x), 2)
        for row, column in np.ndindex(2, 3):
            patch = x[0, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            np.testing.assert_array_equal(
                tokens[0, 3 * row + column], patch.transpose(2, 0, 1).ravel()
            )

    def test_sizes_that_do_not_divide_are_refused(self):
        with pytest.raises(ValueError, match="latents are 5 x 4; both must be multiples of 2"):
            patchify(jnp.zeros((1, 5, 4, 3)), 2)


class TestRotation:
    AXES = (4, 6, 6)

    def by_hand(self, x, text_len, rows, columns) -> np.ndarray:
        """Each pair of channels as a complex number, turned by position * theta ** (-2i / dim)."""
        x = np.asarray(x, np.float64)
        out = np.zeros_like(x)
        for token in range(text_len + rows * columns):
            cell = token - text_len
            position = (0, 0, 0) if cell < 0 else (0, cell // columns, cell % columns)
            start = 0
            for place, dim in zip(position, self.AXES, strict=True):
                for i in range(dim // 2):
                    pair = slice(start + 2 * i, start + 2 * i + 2)
                    turn = np.exp(1j * place * 10000.0 ** (-2 * i / dim))
                    turned = (x[:, token, :, pair] @ np.array([1, 1j])) * turn
                    out[:, token, :, pair] = np.stack([turned.real, turned.imag], axis=-1)
                start += dim
        return out

    @pytest.mark.parametrize(("text_len", "rows", "columns"), [(0, 3, 4), (5, 4, 3), (2, 1, 1)])
    def test_it_turns_pairs_as_the_definition_says(self, text_len, rows, columns):
        x = noise(2, text_len + rows * columns, 3, 16)
        rotation = joint_rotation(text_len, rows, columns, axes_dim=self.AXES, theta=10000)
        expected = self.by_hand(x, text_len, rows, columns)
        np.testing.assert_allclose(rotate(x, rotation), expected, atol=2e-6)

    def test_far_positions_keep_float64_angles(self):
        """At row 300 a float32 angle is off by 1e-5; the tables are not."""
        x = noise(1, 300 * 2, 1, 16)
        rotation = joint_rotation(0, 300, 2, axes_dim=self.AXES, theta=10000)
        np.testing.assert_allclose(rotate(x, rotation), self.by_hand(x, 0, 300, 2), atol=1e-6)

    def test_text_is_not_turned(self):
        x = noise(1, 5 + 4, 2, 16)
        rotation = joint_rotation(5, 2, 2, axes_dim=self.AXES, theta=10000)
        np.testing.assert_array_equal(rotate(x, rotation)[:, :5], x[:, :5])

    def test_lengths_stay(self):
        x = noise(1, 12, 2, 16)
        rotation = joint_rotation(0, 3, 4, axes_dim=self.AXES, theta=10000)
        np.testing.assert_allclose(
            jnp.linalg.norm(rotate(x, rotation), axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5
        )

    def test_products_depend_on_the_distance_alone(self):
        """The point of rotary positions: q at (r, c) and k at (r + 1, c + 2), wherever they are."""
        rotation = joint_rotation(0, 5, 5, axes_dim=self.AXES, theta=10000)
        q, k = (jnp.broadcast_to(noise(1, 1, 1, 16, seed=s), (1, 25, 1, 16)) for s in (0, 1))
        q, k = (rotate(x, rotation).reshape(5, 5, 16) for x in (q, k))
        products = jnp.sum(q[:-1, :-2] * k[1:, 2:], axis=-1)
        np.testing.assert_allclose(products, products[0, 0] * np.ones((4, 3)), rtol=1e-4)

    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
    def test_accelerators_turn_by_a_product_to_the_last_bit(self, dtype):
        """Of 13 tokens, so that the last tile is not full."""
        x = noise(2, 13, 3, 16).astype(dtype)
        rotation = joint_rotation(1, 3, 4, axes_dim=self.AXES, theta=10000)
        np.testing.assert_array_equal(rope._by_product(x, rotation), rotate(x, rotation))

    def test_its_gradient_turns_back(self):
        x, dy = noise(1, 12, 2, 16), noise(1, 12, 2, 16, seed=1)
        rotation = joint_rotation(0, 3, 4, axes_dim=self.AXES, theta=10000)
        _, pull = jax.vjp(lambda x: rotate(x, rotation), x)
        _, by_rolls = jax.vjp(lambda x: rope._by_rolls(x, rotation), x)
        np.testing.assert_allclose(pull(dy)[0], by_rolls(dy)[0], atol=1e-6)

    def test_bfloat16_is_turned_in_float32(self):
        x = noise(1, 12, 2, 16).astype(jnp.bfloat16)
        rotation = joint_rotation(0, 3, 4, axes_dim=self.AXES, theta=10000)
        exact = rotate(x.astype(jnp.float32), rotation)
        assert rotate(x, rotation).dtype == jnp.bfloat16
        np.testing.assert_array_equal(rotate(x, rotation), exact.astype(jnp.bfloat16))
