"""Text encoders in single files: the layout told from the keys, the sizes from the shapes."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from taca_jax.convert.cli import main
from taca_jax.errors import UserError
from taca_jax.formats.settings import Settings
from taca_jax.formats.tensor_files import ArrayTensors, write_tensors
from taca_jax.nn.kinds import flat_params
from taca_jax.text import clip_layout as clip
from taca_jax.text import t5_layout as t5
from taca_jax.text.clip import CLIP_BIGG, CLIP_L
from taca_jax.text.t5 import T5_XXL
from taca_jax.weights.folders import load_model
from taca_jax.weights.loading import LoadOptions
from tests.models import CLIP, T5, in_layout, layout_shapes, shapes_alone
from tests.random_models import random_model

SIZES = ("--num-heads", "2", "--activation", "gelu")


def converted(kind: str, src: Path, *options: str):
    dst = src.parent / f"{src.name}_converted"
    main([kind, "--src", str(src), "--dst", str(dst), *options])
    return load_model(dst, LoadOptions(dtype=jnp.float32))


def refused(kind: str, src: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as stop:
        converted(kind, src, *options)
    assert "\n" not in str(stop.value.code)
    return str(stop.value.code)


def assert_same(one, other) -> None:
    params, others = flat_params(one), flat_params(other)
    assert params.keys() == others.keys()
    for path, param in params.items():
        np.testing.assert_array_equal(param.get_value(), others[path].get_value(), path)


@pytest.fixture
def model():
    return random_model(CLIP)


def with_prefix(tensors):
    """clip_l.safetensors, with the copies that some such files hold."""
    copies = {"text_model.embeddings.position_ids": np.arange(5)[None], "logit_scale": np.ones(())}
    return tensors | copies


def openclip_projection(tensors):
    """clip_g.safetensors where the projection is OpenCLIP's: not a Linear, so not transposed."""
    projection = tensors.pop("text_projection.weight")
    return tensors | {"text_projection": np.ascontiguousarray(projection.T)}


@pytest.mark.parametrize("change", [dict, with_prefix, openclip_projection])
def test_single_files_of_clip(tmp_path, model, change: Callable):
    file = tmp_path / "clip.safetensors"
    write_tensors(file, change(in_layout(clip.TABLE, model)))
    again = converted("clip", file, *SIZES)
    assert again.config == CLIP
    assert_same(again, model)


def test_without_a_projection_there_need_be_no_prefix(tmp_path):
    """As transformers 5 writes `CLIPTextModel`."""
    model = random_model(replace(CLIP, projection_dim=None))
    tensors = in_layout(clip.TABLE, model)
    bare = {name.removeprefix(clip.PREFIX): tensor for name, tensor in tensors.items()}
    write_tensors(tmp_path / "clip.safetensors", bare)
    again = converted("clip", tmp_path / "clip.safetensors", *SIZES)
    assert again.config == model.config
    assert_same(again, model)


def test_single_files_of_t5(tmp_path):
    model = random_model(T5)
    tensors = in_layout(t5.TABLE, model)
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    write_tensors(tmp_path / "t5xxl.safetensors", tensors)
    again = converted("t5", tmp_path / "t5xxl.safetensors")
    assert again.config == T5
    assert_same(again, model)


@pytest.mark.parametrize(
    "config", [CLIP_L, replace(CLIP_L, projection_dim=None), CLIP_BIGG], ids=["L", "L-", "bigG"]
)
def test_released_sizes_of_clip_are_known(config):
    assert clip.inferred(shapes_alone(layout_shapes(clip.TABLE, config))) == config


def test_the_released_size_of_t5_is_known():
    assert t5.inferred(shapes_alone(layout_shapes(t5.TABLE, T5_XXL))) == T5_XXL


def test_what_shapes_do_not_tell_is_asked_for_by_name(tmp_path, model):
    file = tmp_path / "clip.safetensors"
    write_tensors(file, in_layout(clip.TABLE, model))
    for options in ((), SIZES[:2], SIZES[2:]):
        said = refused("clip", file, *options)
        assert "8 wide with 2 layers, neither CLIP-L nor CLIP-bigG" in said
        assert "give --num-heads and --activation" in said
    said = refused("clip", file, "--num-heads", "3", "--activation", "gelu")
    assert "num_heads is 3; it must divide the width of 8" in said


def test_files_of_other_models_are_told_apart(tmp_path, model):
    files = {"clip": tmp_path / "clip.safetensors", "t5": tmp_path / "t5.safetensors"}
    write_tensors(files["clip"], in_layout(clip.TABLE, model))
    write_tensors(files["t5"], in_layout(t5.TABLE, random_model(T5)))
    assert "has no shared.weight; is it another model's?" in refused("t5", files["clip"])
    said = refused("clip", files["t5"])
    assert "has no embeddings.token_embedding.weight; is it another model's?" in said


def test_clip_settings():
    fields = {
        "model_type": "clip_text_model",
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "hidden_act": "gelu",
        "max_position_embeddings": 5,
        "vocab_size": 11,
        "projection_dim": 6,
        "eos_token_id": 2,
    }
    projected = ArrayTensors("it", {"text_projection.weight": np.zeros((6, 8))})
    plain = ArrayTensors("it", {})

    def config_of(tensors, **changes):
        return clip.config_of(Settings(Path("config.json"), fields | changes), tensors)

    assert config_of(projected) == CLIP
    assert config_of(plain) == replace(CLIP, projection_dim=None)
    assert config_of(projected, eos_token_id=7).end_token == 7
    for change in ({"model_type": "clip"}, {"hidden_act": "relu"}, {"layer_norm_eps": 1e-3}):
        (name,) = change
        with pytest.raises(UserError, match=f"config.json says {name} .*supported"):
            config_of(projected, **change)


def test_t5_settings():
    fields = {
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 32128,
        "d_model": 4096,
        "d_ff": 10240,
        "d_kv": 64,
        "num_heads": 64,
        "num_layers": 24,
    }
    assert t5.config_of(Settings(Path("x"), fields)) == T5_XXL
    with pytest.raises(UserError, match="feed_forward_proj 'relu'; only 'gated-gelu'"):
        t5.config_of(Settings(Path("x"), {**fields, "feed_forward_proj": "relu"}))


def test_the_command_line_cannot_contradict_a_config(tmp_path, model):
    (tmp_path / "src").mkdir()
    write_tensors(tmp_path / "src" / "model.safetensors", in_layout(clip.TABLE, model))
    (tmp_path / "src" / "config.json").write_text(
        '{"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "vocab_size": 11,'
        '"num_hidden_layers": 2, "hidden_act": "gelu", "max_position_embeddings": 5}'
    )
    said = refused("clip", tmp_path / "src", "--activation", "quick_gelu")
    assert "says activation is gelu, the command line quick_gelu" in said
    assert converted("clip", tmp_path / "src", "--activation", "gelu").config.num_heads == 2
