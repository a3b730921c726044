"""The engine and its tables: all names both ways, and everything that is wrong at once."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from taca_jax.autoencoders import tiny_vae_layout as tiny_vae
from taca_jax.autoencoders import vae_diffusers as vae
from taca_jax.autoencoders import vae_original as vae_bfl
from taca_jax.autoencoders.tiny_vae import TAEF1, TinyVAEConfig
from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.errors import UserError
from taca_jax.families.flux import bfl as flux_bfl
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.flux.family import FLUX_VAE
from taca_jax.families.flux.model import FLUX_DEV, FLUX_SCHNELL, FluxConfig
from taca_jax.families.sd3 import diffusers as sd3_diffusers
from taca_jax.formats import engine
from taca_jax.formats.key_table import (
    CONVOLUTION,
    KEEP,
    SWAP_HALVES,
    TRANSPOSE,
    TRANSPOSE_SWAPPED,
    Rule,
    Table,
    Target,
)
from taca_jax.formats.settings import Settings, read_settings
from taca_jax.formats.tensor_files import FLOAT8, ArrayTensors, open_tensors, write_tensors
from taca_jax.nn.kinds import abstract_model, flat_params
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.text import clip_layout as clip
from taca_jax.text import t5_layout as t5
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.t5 import T5Config
from tests.random_models import random_model
from tests.shared import shared_path

FLUX = FluxConfig(2, 4, 2, 8, (2, 2, 4), 10_000, 2, 3, 4.0, 6, 4, guidance_embed=True)
VAE = VAEConfig((4, 8), 1, 4, 2, 0.5, 0.1)
CASES = {
    "flux": (flux_diffusers.TABLE, FLUX),
    "t5": (t5.TABLE, T5Config(11, 8, 12, 2, 4, 2)),
    "clip": (clip.TABLE, CLIPConfig(11, 5, 8, 12, 2, 2, "gelu", 6, None)),
    "vae": (vae.TABLE, VAE),
    "flux_bfl": (flux_bfl.TABLE, FLUX),
    "vae_bfl": (vae_bfl.table_of(VAE), VAE),
    "tiny_vae": (tiny_vae.TABLE, TinyVAEConfig(4, 3, 8, (1, 2), (2, 1))),
}


@pytest.mark.parametrize("name", CASES)
def test_export_and_load_undo_each_other(name):
    table, config = CASES[name]
    model = random_model(config)
    tensors = engine.export(table, model)
    again = engine.load(table, ArrayTensors("memory", tensors), model.config, dtype=jnp.float32)
    for path, param in flat_params(model).items():
        np.testing.assert_array_equal(flat_params(again)[path].get_value(), param.get_value(), path)
    low = engine.load(
        table,
        ArrayTensors("memory", tensors),
        model.config,
        dtype=jnp.float32,
        param_dtype=jnp.bfloat16,
    )
    assert {p.dtype for p in flat_params(low).values()} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_found_as_the_place_it_came_from(name):
    table, config = CASES[name]
    shapes = {path: param.shape for path, param in flat_params(random_model(config)).items()}
    pieces = list(table.pieces(shapes))
    assert len({(piece.key, str(piece.rows)) for piece in pieces}) == len(pieces)
    for piece in pieces:
        target = Target(piece.path, piece.layer, piece.transform)
        assert target in table.find(piece.key)
        assert len(table.find(piece.key)) == sum(other.key == piece.key for other in pieces)
    assert table.find("not.a.key") == ()


@pytest.mark.parametrize("transform", [KEEP, TRANSPOSE, SWAP_HALVES, TRANSPOSE_SWAPPED])
def test_transforms_are_undone_and_know_their_shapes(transform):
    x = np.arange(24).reshape(6, 4)
    np.testing.assert_array_equal(transform.store(transform.load(x)), x)
    assert transform.loaded_shape(x.shape) == transform.load(x).shape
    assert transform.stored_shape(x.shape) == transform.store(x).shape
    y = np.arange(120).reshape(2, 3, 4, 5)
    assert CONVOLUTION.load(y).shape == (4, 5, 3, 2)
    np.testing.assert_array_equal(CONVOLUTION.store(CONVOLUTION.load(y)), y)


def test_diffusers_final_modulation_is_scale_then_shift():
    stored = np.array([1.0, 2.0, 3.0, 4.0])  # scale 1 2, shift 3 4
    np.testing.assert_array_equal(SWAP_HALVES.load(stored), [3, 4, 1, 2])


def test_a_table_that_does_not_cover_the_model_is_a_defect():
    one = Table("a layout", (Rule("x", "a"),))
    with pytest.raises(LookupError, match="0 rules of a layout are about b"):
        list(one.pieces({"a": (2,), "b": (2,)}))
    two = Table("a layout", (Rule("x", "a"), Rule("y", "a")))
    with pytest.raises(LookupError, match="2 rules"):
        list(two.pieces({"a": (2,)}))


class Unread(ArrayTensors):
    """Tensors that must not be read."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        raise AssertionError(f"{name} was read")


def test_everything_wrong_is_said_at_once_before_anything_is_read():
    table, config = CASES["flux"]
    arrays = engine.export(table, random_model(config))
    del arrays["x_embedder.weight"], arrays["single_transformer_blocks.2.attn.to_q.bias"]
    arrays["transformer_blocks.2.attn.to_q.weight"] = np.zeros((16, 16))
    arrays["context_embedder.weight"] = np.zeros((16, 7))
    with pytest.raises(UserError) as error:
        engine.load(table, Unread("the file", arrays, ("proj_out.bias",)), FLUX, dtype=jnp.float32)
    said = str(error.value)
    assert "\n" not in said
    assert said.startswith("the file is not a FLUX transformer in diffusers' layout of this size")
    assert "2 missing" in said
    assert "x_embedder.weight" in said
    assert "single_transformer_blocks.2.attn.to_q.bias" in said
    assert "1 left over: transformer_blocks.2.attn.to_q.weight" in said
    assert "context_embedder.weight is (16, 7) instead of (16, 6)" in said
    assert "1 there twice: proj_out.bias" in said


def test_a_quite_different_file_gives_one_readable_line():
    with pytest.raises(UserError) as error:
        engine.load(
            flux_diffusers.TABLE,
            ArrayTensors("x", {f"layer.{i}.weight": np.zeros(3) for i in range(900)}),
            FLUX,
            dtype=jnp.float32,
        )
    assert "and 894 more" in str(error.value)
    assert len(str(error.value)) < 1000


def test_copies_that_are_known_are_ignored():
    table, config = CASES["t5"]
    model = random_model(config)
    arrays = engine.export(table, model)
    arrays["encoder.embed_tokens.weight"] = arrays["shared.weight"]
    engine.load(table, ArrayTensors("memory", arrays), model.config, dtype=jnp.float32)


# Files.


def some_tensors() -> dict[str, np.ndarray]:
    return {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(4).astype(jnp.bfloat16),
        "c": np.zeros(2, np.float16),
    }


def test_files_are_read_a_tensor_at_a_time(tmp_path):
    write_tensors(tmp_path / "x.safetensors", some_tensors(), {"made": "here"})
    for path in (tmp_path, tmp_path / "x.safetensors"):
        tensors = open_tensors(path)
        assert tensors.metadata == {"made": "here"}
        for name, array in some_tensors().items():
            assert tensors.shapes[name] == array.shape
            assert tensors.dtypes[name] == tensors.read(name).dtype == array.dtype
            np.testing.assert_array_equal(tensors.read(name), array)


def sharded(folder: Path) -> Path:
    arrays = some_tensors()
    write_tensors(folder / "x-1-of-2.safetensors", {"a": arrays["a"]})
    write_tensors(folder / "x-2-of-2.safetensors", {"b": arrays["b"], "c": arrays["c"]})
    index = folder / "x.safetensors.index.json"
    shards = {"a": "x-1-of-2.safetensors", "b": "x-2-of-2.safetensors", "c": "x-2-of-2.safetensors"}
    index.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return index


def test_shards_are_one_model(tmp_path):
    index = sharded(tmp_path)
    for path in (tmp_path, index):
        tensors = open_tensors(path)
        assert set(tensors.shapes) == {"a", "b", "c"}
        for name, array in some_tensors().items():
            np.testing.assert_array_equal(tensors.read(name), array)


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        open_tensors(path)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_files_that_are_not_there_or_not_whole(tmp_path):
    assert "is not there" in refused(tmp_path / "x.safetensors")
    assert "has no .safetensors file" in refused(tmp_path)
    file = tmp_path / "x.safetensors"
    write_tensors(file, some_tensors())
    whole = file.read_bytes()
    for cut in (0, 4, 40, len(whole) - 1):
        file.write_bytes(whole[:cut])
        assert f"{file} is truncated or damaged" in refused(file)
    file.write_bytes(b"\xff" * 200)
    assert "is truncated or damaged" in refused(file)
    write_tensors(tmp_path / "y.safetensors", some_tensors())
    assert "more than one set of weights (x.safetensors, y.safetensors)" in refused(tmp_path)


def test_shards_that_do_not_fit_their_index(tmp_path):
    index = sharded(tmp_path)
    second = tmp_path / "x-2-of-2.safetensors"
    second.rename(tmp_path / "aside")
    assert "1 of the 2 shards" in refused(index)
    assert "x-2-of-2.safetensors" in refused(index)
    write_tensors(second, {"a": some_tensors()["a"], "b": some_tensors()["b"]})
    assert "1 tensors that" in refused(index)
    assert "are in no shard: c" in refused(index)
    write_tensors(second, some_tensors())
    assert open_tensors(index).duplicates == ["a"]
    index.write_text("{}")
    assert "is no index of shards" in refused(index)


def test_types_that_are_not_weights_are_refused(tmp_path):
    save_file({"a": np.zeros(3, np.int16)}, tmp_path / "x.safetensors")
    assert "a is stored as I16; expected one of F64" in refused(tmp_path)


# Configs.


def test_flux_settings_both_ways():
    config = flux_diffusers.config_of(read_settings(shared_path("golden/flux/transformer")))
    again = flux_diffusers.config_of(Settings(Path("x"), flux_diffusers.settings_of(config)))
    assert again == config
    assert (config.latent_channels, config.patch_size, config.head_dim) == (16, 2, 32)
    with pytest.raises(UserError, match=r"mlp_ratio.*diffusers' FLUX knows only"):
        flux_diffusers.settings_of(FluxConfig(**{**FLUX.__dict__, "mlp_ratio": 2.0}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "SD3Transformer2DModel"}, "_class_name 'SD3Transformer2DModel'; only"),
        ({"in_channels": 384, "out_channels": 64}, "out_channels 64; only 384 is supported"),
        ({"in_channels": 6}, "in_channels 6; expected a multiple of 4"),
        ({"num_layers": "two"}, "num_double_blocks"),
        ({"num_layers": None}, "num_double_blocks"),
        ({"axes_dims_rope": [2, 2, 2]}, "axes_dim"),
    ],
)
def test_flux_settings_that_are_not_ours(change, words):
    with pytest.raises(UserError, match=words):
        flux_diffusers.config_of(
            Settings(Path("x/config.json"), {**flux_diffusers.settings_of(FLUX), **change})
        )


def test_missing_and_broken_settings(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is not there"):
        read_settings(tmp_path)
    (tmp_path / "config.json").write_text("{]")
    with pytest.raises(UserError, match="is not JSON"):
        read_settings(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="has no field in_channels"):
        flux_diffusers.config_of(read_settings(tmp_path))


@pytest.mark.parametrize(
    ("module", "fields", "message"),
    [
        (flux_diffusers, {"in_channels": "64"}, "in_channels '64'; expected an integer"),
        (
            sd3_diffusers,
            {"num_attention_heads": None, "attention_head_dim": 64},
            "num_attention_heads None; expected an integer",
        ),
        (
            sd3_diffusers,
            {
                "num_attention_heads": 2,
                "attention_head_dim": 4,
                "in_channels": 16,
                "dual_attention_layers": 3,
            },
            "dual_attention_layers 3; expected a list",
        ),
    ],
)
def test_settings_of_another_type(module, fields, message):
    with pytest.raises(UserError, match=message):
        module.config_of(Settings(Path("x"), fields))


def test_schedule():
    settings = read_settings(shared_path("golden/flux/scheduler"), "scheduler_config.json")
    assert flux_diffusers.schedule_of(settings) == FlowSchedule()
    constant = {**settings.fields, "use_dynamic_shifting": False, "shift": 1.0}
    assert flux_diffusers.schedule_of(Settings(Path("x"), constant)) == FlowSchedule(shift=1.0)
    with pytest.raises(UserError, match="use_karras_sigmas True; only False"):
        flux_diffusers.schedule_of(Settings(Path("x"), {**constant, "use_karras_sigmas": True}))


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
    from taca_jax.text.t5 import T5_XXL

    assert t5.config_of(Settings(Path("x"), fields)) == T5_XXL
    with pytest.raises(UserError, match="feed_forward_proj 'relu'; only 'gated-gelu'"):
        t5.config_of(Settings(Path("x"), {**fields, "feed_forward_proj": "relu"}))


# Configs of single files, from their shapes.


class Shapes(ArrayTensors):
    """Tensors of some shapes and nothing in them."""

    def __init__(self, shapes: dict[str, tuple[int, ...]]):
        super().__init__("x", {k: np.broadcast_to(np.False_, v) for k, v in shapes.items()})


def flux_shapes(config: FluxConfig = FLUX) -> dict[str, tuple[int, ...]]:
    return {piece.key: piece.shape for piece in flux_bfl.TABLE.pieces(param_shapes(config))}


def param_shapes(config) -> dict[str, tuple[int, ...]]:
    model = abstract_model(config, dtype=jnp.float32)
    return {path: param.shape for path, param in flat_params(model).items()}


def test_sizes_of_black_forest_labs_files():
    for config in (FLUX_DEV, FLUX_SCHNELL):
        tensors = Shapes(flux_shapes(config))
        assert flux_bfl.is_flux(tensors)
        assert flux_bfl.inferred(tensors) == config
    vae_table = vae_bfl.table_of(FLUX_VAE)
    tensors = Shapes({p.key: p.shape for p in vae_table.pieces(param_shapes(FLUX_VAE))})
    assert vae_bfl.is_autoencoder(tensors)
    assert vae_bfl.inferred(tensors, like=FLUX_VAE) == FLUX_VAE
    assert flux_bfl.inferred(Shapes(flux_shapes()), FLUX.axes_dim) == FLUX


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "heads of 8 channels, .* give axes_dim, three even numbers that sum to 8"),
        ({"img_in.weight": (16, 20)}, "takes 20 channels and gives 16; .* like Fill"),
        ({"img_in.weight": (20, 16)}, "20 channels in heads of 8"),
        ({"txt_in.weight": (16,)}, r"txt_in.weight is \(16,\); expected 2 axes"),
    ],
)
def test_sizes_that_shapes_do_not_tell(change, words):
    with pytest.raises(UserError, match=words):
        flux_bfl.inferred(Shapes(flux_shapes() | change))


def test_a_fused_tensor_of_another_size_is_named():
    tensors = Shapes(flux_shapes() | {"single_blocks.1.linear1.weight": (111, 16)})
    with pytest.raises(UserError, match=r"linear1.weight is \(111, 16\) instead of \(112, 16\)"):
        engine.streamed(flux_bfl.TABLE, tensors, FLUX)


# What is read as it lies and written as it lies.


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


# TAESD.


def test_tiny_autoencoders_of_both_families():
    for name in ("taef1", "taesd3"):
        tensors = tiny_vae.open_taesd(shared_path("assets/tae") / name)
        engine.load(tiny_vae.TABLE, tensors, TAEF1, dtype=jnp.float32)


def test_pairs_of_files(tmp_path):
    with pytest.raises(UserError, match=r"should have one pair .* found none"):
        tiny_vae.open_taesd(tmp_path)
    write_tensors(tmp_path / "a_encoder.safetensors", {"0.weight": np.zeros(3)})
    with pytest.raises(UserError, match=r"a_decoder\.safetensors is not there"):
        tiny_vae.open_taesd(tmp_path)
    write_tensors(tmp_path / "a_decoder.safetensors", {"1.weight": np.zeros(3)})
    assert set(tiny_vae.open_taesd(tmp_path).shapes) == {"encoder.0.weight", "decoder.1.weight"}
    with pytest.raises(UserError, match=r"encoder\.0\.weight is \(3,\) instead of \(64, 3, 3, 3\)"):
        engine.load(tiny_vae.TABLE, tiny_vae.open_taesd(tmp_path), TAEF1, dtype=jnp.float32)
    write_tensors(tmp_path / "b_encoder.safetensors", {"0.weight": np.zeros(3)})
    with pytest.raises(UserError, match="found a, b"):
        tiny_vae.open_taesd(tmp_path)
