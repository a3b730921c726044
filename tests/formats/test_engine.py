"""Layouts: every table both ways, and everything that is wrong with a file at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.errors import UserError
from taca_jax.families.flux import bfl
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.formats import engine
from taca_jax.formats.key_table import Target
from taca_jax.formats.tensor_files import FLOAT8, ArrayTensors
from taca_jax.nn.kinds import flat_params, shapes_of
from taca_jax.text import t5_layout
from tests.models import FLUX, LAYOUTS, T5, in_layout, layout_shapes, shapes_alone
from tests.random_models import random_model


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_exported_and_streamed_undo_each_other(name, dtype):
    table, config = LAYOUTS[name]
    model = random_model(config)
    tensors = ArrayTensors("memory", in_layout(table, model))
    again = engine.streamed(table, tensors, config, dtype)
    params = flat_params(model)
    assert again.keys() == params.keys()
    for path, param in params.items():
        expected = np.asarray(param.get_value().astype(dtype or param.dtype))
        assert (again[path].shape, again[path].dtype) == (expected.shape, expected.dtype)
        written = b"".join(piece.tobytes() for piece in again[path].pieces())
        assert written == expected.tobytes(), path


def test_a_stack_comes_a_layer_at_a_time():
    table, config = LAYOUTS["flux"]
    tensors = ArrayTensors("memory", in_layout(table, random_model(config)))
    kernel = engine.streamed(table, tensors, config)["single_blocks.mlp_in.kernel"]
    layers, *one = kernel.shape
    assert [piece.shape for piece in kernel.pieces()] == [tuple(one)] * layers


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_key_is_found_as_the_place_it_came_from(name):
    table, config = LAYOUTS[name]
    pieces = list(table.pieces(shapes_of(config)))
    assert len({(piece.key, str(piece.rows)) for piece in pieces}) == len(pieces)
    for piece in pieces:
        target = Target(piece.path, piece.layer, piece.transform)
        assert target in table.find(piece.key)
        assert len(table.find(piece.key)) == sum(other.key == piece.key for other in pieces)
    assert table.find("not.a.key") == ()


class Unread(ArrayTensors):
    """Tensors that must not be read."""

    def read(self, name: str, *part: slice | None) -> np.ndarray:
        raise AssertionError(f"{name} was read")


def refused(tensors: ArrayTensors) -> str:
    with pytest.raises(UserError) as error:
        engine.match(flux_diffusers.TABLE, tensors, shapes_of(FLUX))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_everything_wrong_is_said_at_once_before_anything_is_read():
    arrays = in_layout(flux_diffusers.TABLE, random_model(FLUX))
    del arrays["x_embedder.weight"], arrays["single_transformer_blocks.2.attn.to_q.bias"]
    arrays["transformer_blocks.2.attn.to_q.weight"] = np.zeros((16, 16))
    arrays["context_embedder.weight"] = np.zeros((16, 7))
    said = refused(Unread("the file", arrays, ("proj_out.bias",)))
    assert said.startswith("the file is not a FLUX transformer in diffusers' layout of this size")
    assert "2 missing" in said
    assert "x_embedder.weight" in said
    assert "single_transformer_blocks.2.attn.to_q.bias" in said
    assert "1 left over: transformer_blocks.2.attn.to_q.weight" in said
    assert "context_embedder.weight is (16, 7) instead of (16, 6)" in said
    assert "1 there twice: proj_out.bias" in said


def test_a_quite_different_file_gives_one_readable_line():
    said = refused(ArrayTensors("x", {f"layer.{i}.weight": np.zeros(3) for i in range(900)}))
    assert "and 894 more" in said
    assert len(said) < 1000


def test_a_fused_tensor_of_another_size_is_named():
    shapes = layout_shapes(bfl.TABLE, FLUX) | {"single_blocks.1.linear1.weight": (111, 16)}
    with pytest.raises(UserError, match=r"linear1.weight is \(111, 16\) instead of \(112, 16\)"):
        engine.streamed(bfl.TABLE, shapes_alone(shapes), FLUX)


def test_copies_that_are_known_are_ignored():
    arrays = in_layout(t5_layout.TABLE, random_model(T5))
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    found = engine.match(t5_layout.TABLE, ArrayTensors("memory", arrays), shapes_of(T5))
    keys = {piece.key for pieces in found.values() for piece in pieces}
    assert keys == arrays.keys() - {"encoder.embed_tokens.weight"}


@pytest.mark.parametrize("shape", [(300, 130), (128, 256), (1, 5), (5, 1), (0, 3), (7,), (3, 4, 5)])
def test_arrays_in_c_order(shape):
    rng = np.random.default_rng(0)
    for dtype in (np.float64, np.float32, jnp.bfloat16, FLOAT8[0]):
        array = rng.normal(size=shape).astype(dtype)
        for view in (array, array.T, array[::-1].T):
            made = engine.contiguous(view)
            assert made.flags.c_contiguous
            assert made.dtype == array.dtype
            assert made.tobytes() == view.tobytes()
