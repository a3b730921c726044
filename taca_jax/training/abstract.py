"""Models of shapes with places instead of parameters, from a folder's configs or published ones."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from taca_jax.autoencoders.vae import FLUX_VAE, SD3_VAE
from taca_jax.errors import UserError
from taca_jax.families.flux.model import FLUX_DEV, FLUX_KREA, FLUX_SCHNELL, FluxConfig
from taca_jax.families.sd3.model import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM, SD3Config
from taca_jax.nn.layers import LoRAParam, Quantized
from taca_jax.nn.lora import LoRAConfig, add_lora
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.quantization import quantize
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.rules import placement
from taca_jax.text.clip import CLIP_BIGG, CLIP_L, CLIPConfig
from taca_jax.text.encoders import FluxText, SD3Text
from taca_jax.text.t5 import T5_XXL, T5Config
from taca_jax.training.config import TrainConfig
from taca_jax.training.step import TextToImage
from taca_jax.weights.folders import abstract_model, kind_of, load_config
from taca_jax.weights.pipeline_folders import open_parts
from taca_jax.weights.shipped import find_weights

PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    **{
        name: {
            "transformer": config,
            "text_encoder": CLIP_L,
            "text_encoder_2": T5_XXL,
            "autoencoder": FLUX_VAE,
        }
        for name, config in {
            "flux1-dev": FLUX_DEV,
            "flux1-krea-dev": FLUX_KREA,
            "flux1-schnell": FLUX_SCHNELL,
        }.items()
    },
    **{
        name: {
            "transformer": config,
            "text_encoder": CLIP_L,
            "text_encoder_2": CLIP_BIGG,
            "text_encoder_3": T5_XXL,
            "autoencoder": SD3_VAE,
        }
        for name, config in {
            "sd35-medium": SD35_MEDIUM,
            "sd35-large": SD35_LARGE,
            "sd3-medium": SD3_MEDIUM,
        }.items()
    },
}
"""The parts of models as published, by the name of the folder that the presets expect."""

PUBLISHED_TEXT_LENGTH = {
    "flux1-dev": 512,
    "flux1-krea-dev": 512,
    "flux1-schnell": 256,
    "sd35-medium": 256,
    "sd35-large": 256,
    "sd3-medium": 256,
}
"""Tokens that T5 reads for each of them."""


def part_configs(config: TrainConfig) -> tuple[dict[str, Any], int]:
    """The config of each part, of the base's folder, of a published model or of a new one; and how
    many tokens T5 reads.

    Raises UserError for a base that is not there, and one without a part that training needs.
    """
    if config.base is None:
        assert config.model is not None  # TrainConfig saw to both
        assert config.text.encoder is not None
        found = {
            "transformer": config.model,
            "text_encoder": config.text.encoder,
            "autoencoder": config.pixels,
        }
        text_length = config.text.length
    else:
        found, text_length = _of_base(config.base)
    if config.autoencoder != "pixels":
        found["autoencoder"] = load_config(config.autoencoder)
    kinds = [type(each) for each in found.values()]
    missing = []
    if isinstance(found["transformer"], SD3Config):
        if kinds.count(CLIPConfig) < 2:
            missing.append("two CLIPs")
    elif T5Config not in kinds:
        missing.append("a T5")
    if "autoencoder" not in found:
        missing.append("an autoencoder (autoencoder=FOLDER)")
    if missing:
        raise UserError(f"base={config.base} lacks {', '.join(missing)}, which training needs")
    if not isinstance(found["transformer"], FluxConfig | SD3Config):
        kind = kind_of(found["transformer"])
        raise UserError(
            f"the transformer of base={config.base} is of kind {kind}; give flux or sd3"
        )
    return found, text_length


def _of_base(base: str) -> tuple[dict[str, Any], int]:
    folder = find_weights(base)
    if folder.exists():
        parts = open_parts(folder)
        return {n: part.config for n, part in parts.models.items()}, parts.settings.text_length
    if folder.name not in PUBLISHED:
        raise UserError(
            f"base={base} is not there; plan for {', '.join(PUBLISHED)} needs no folder"
        )
    return dict(PUBLISHED[folder.name]), PUBLISHED_TEXT_LENGTH[folder.name]


def abstract_training(
    config: TrainConfig, parts: Mapping[str, Any], text_length: int, mesh: Mesh
) -> tuple[TextToImage, Any]:
    """The model to train and its autoencoder, as `part_configs` says, on a mesh that is set."""
    dtype = jnp.dtype(config.dtype)
    base_dtype = dtype if config.lora is not None else jnp.dtype(jnp.float32)

    def made(part: str) -> Any:
        is_t5 = isinstance(parts[part], T5Config)
        return abstract_part(
            parts[part], mesh, dtype=dtype, base_dtype=base_dtype,
            quantized=config.quantize_text if is_t5 else "none",
        )  # fmt: skip

    transformer = abstract_part(
        parts["transformer"],
        mesh,
        dtype=dtype,
        base_dtype=base_dtype,
        quantized=config.quantize,
        lora=config.lora,
        remat=config.remat,
    )
    clips = [made(part) for part, c in parts.items() if isinstance(c, CLIPConfig)]
    t5 = next((made(part) for part, c in parts.items() if isinstance(c, T5Config)), None)
    if isinstance(parts["transformer"], SD3Config):
        width = parts["transformer"].txt_dim
        encoder = SD3Text(clips[0], clips[1], t5, width=width, t5_length=text_length)
    else:
        assert t5 is not None  # part_configs saw to it
        encoder = FluxText(clips[0], t5) if clips else t5
    return TextToImage(transformer, encoder), made("autoencoder")


def abstract_part(
    config: Any,
    mesh: Mesh,
    *,
    dtype: DTypeLike,
    base_dtype: DTypeLike | None = None,
    quantized: Quantization = "none",
    lora: LoRAConfig | None = None,
    remat: Remat = "none",
) -> Any:
    """A model of shapes, each with its place on the mesh.

    dtype is of activations; base_dtype of parameters, unless they are quantised or LoRA factors,
    which are float32; None is dtype.
    """
    model = abstract_model(config, dtype=dtype, remat=remat)
    kind = kind_of(config)
    quantize(model, kind, quantized)
    graph, state = nnx.split(model)
    if lora is not None:
        graph, state = nnx.split(nnx.eval_shape(lambda: _with_lora(graph, state, lora)))
    place = placement(mesh)
    assert place is not None
    for path, param in nnx.to_flat_state(state):
        name = ".".join(map(str, path))
        wide = jnp.float32 if isinstance(param, LoRAParam) else jnp.dtype(base_dtype or dtype)
        if isinstance(param, Quantized):
            wide = param.get_value().dtype
        sharding = place(kind, name, param.shape)
        param.set_value(jax.ShapeDtypeStruct(param.shape, wide, sharding=sharding))
    return nnx.merge(graph, state)


def _with_lora(graph: nnx.GraphDef, state: nnx.State, lora: LoRAConfig) -> nnx.Module:
    filled = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
    model = nnx.merge(graph, filled)
    add_lora(model, lora, rngs=nnx.Rngs(0))
    return model


def local_bytes(arrays: Any) -> int:
    """Bytes that one chip holds of a tree of arrays, or of the shapes of some."""
    return sum(map(_local_bytes, jax.tree.leaves(arrays)))


def _local_bytes(array: Any) -> int:
    shape = array.shape if array.sharding is None else array.sharding.shard_shape(array.shape)
    # A TPU keeps 4-bit numbers two to a byte; on the host each takes a whole one.
    bits = 4 if array.dtype == jnp.uint4 else 8 * array.dtype.itemsize
    return math.prod(shape) * bits // 8
