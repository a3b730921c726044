"""Small models: sizes that many tests share, and weights as others' layouts have them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from taca_jax.autoencoders import (
    patched_vae_layout,
    tiny_vae_layout,
    vae_diffusers,
    vae_original,
)
from taca_jax.autoencoders.tiny_vae import TinyVAEConfig
from taca_jax.autoencoders.vae import VAEConfig
from taca_jax.families.flux import bfl
from taca_jax.families.flux import diffusers as flux_diffusers
from taca_jax.families.flux.model import FluxConfig
from taca_jax.families.flux2 import bfl as flux2_bfl
from taca_jax.families.flux2 import diffusers as flux2_diffusers
from taca_jax.families.sd3 import diffusers as sd3_diffusers
from taca_jax.families.sd3 import stability
from taca_jax.families.sd3.model import SD3Config
from taca_jax.formats.engine import exported
from taca_jax.formats.key_table import Table
from taca_jax.formats.tensor_files import ArrayTensors, Tensors
from taca_jax.nn.kinds import flat_params, shapes_of
from taca_jax.text import clip_layout, qwen3_layout, t5_layout
from taca_jax.text.clip import CLIPConfig
from taca_jax.text.t5 import T5Config
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.originals import Original
from tests.families.flux2 import tiny as flux2

FLUX = FluxConfig(
    patch_size=2,
    latent_channels=4,
    num_heads=2,
    head_dim=8,
    axes_dim=(2, 2, 4),
    theta=10_000.0,
    num_double_blocks=2,
    num_single_blocks=3,
    mlp_ratio=4.0,
    txt_dim=6,
    pooled_dim=4,
    guidance_embed=True,
)
FLUX_SCHNELL = replace(FLUX, guidance_embed=False)
SD3 = SD3Config(
    patch_size=2,
    latent_channels=4,
    num_heads=2,
    head_dim=8,
    num_layers=4,
    num_dual_layers=2,
    qk_norm="rms",
    position_size=8,
    mlp_ratio=4.0,
    txt_dim=12,
    pooled_dim=10,
)
T5 = T5Config(vocab_size=11, dim=8, ff_dim=12, num_heads=2, head_dim=4, num_layers=2)
CLIP = CLIPConfig(
    vocab_size=11,
    max_tokens=5,
    dim=8,
    ff_dim=12,
    num_heads=2,
    num_layers=2,
    activation="gelu",
    projection_dim=6,
    end_token=None,
)
VAE = VAEConfig(
    channels=(4, 8),
    layers_per_block=1,
    latent_channels=4,
    groups=2,
    scaling_factor=0.5,
    shift_factor=0.1,
)


def vae_of(released: VAEConfig) -> VAEConfig:
    """A small autoencoder that has all of a released one's that its weights' shapes do not show."""
    return replace(
        VAE,
        channels=(32, 32),
        groups=32,
        scaling_factor=released.scaling_factor,
        shift_factor=released.shift_factor,
    )


TINY_VAE = TinyVAEConfig(
    latent_channels=4, image_channels=3, width=8, encoder_blocks=(1, 1), decoder_blocks=(1, 1)
)


LAYOUTS = {
    "flux": (flux_diffusers.TABLE, FLUX),
    "flux, Black Forest Labs": (bfl.TABLE, FLUX),
    "sd3": (sd3_diffusers.table_of(SD3), SD3),
    "sd3, Stability AI": (stability.table_of(SD3), SD3),
    "flux2": (flux2_diffusers.TABLE, flux2.FLUX2),
    "flux2, Black Forest Labs": (flux2_bfl.TABLE, flux2.FLUX2),
    "qwen3": (qwen3_layout.table_of(flux2.QWEN3), flux2.QWEN3),
    "patched_vae": (patched_vae_layout.TABLE, flux2.VAE),
    "patched_vae, original": (patched_vae_layout.original_table_of(flux2.VAE), flux2.VAE),
    "t5": (t5_layout.TABLE, T5),
    "clip": (clip_layout.TABLE, CLIP),
    "vae": (vae_diffusers.TABLE, VAE),
    "vae, original": (vae_original.table_of(VAE), VAE),
    "tiny_vae": (
        tiny_vae_layout.TABLE,
        replace(TINY_VAE, encoder_blocks=(1, 2), decoder_blocks=(2, 1)),
    ),
}
"""Every layout, and the config of a model in it."""


def in_layout(table: Table, model: nnx.Module) -> dict[str, np.ndarray]:
    """A model's parameters, LoRA factors left out, in the layout of a table."""
    params = {path: np.asarray(param.get_value()) for path, param in flat_params(model).items()}
    tensors = exported(table, ArrayTensors("the model", params))
    return {
        key: np.concatenate(list(tensor.pieces())).reshape(tensor.shape)
        for key, tensor in tensors.items()
    }


def from_layout(
    table: Table,
    tensors: Tensors | Mapping[str, np.ndarray],
    config: Any,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
) -> Any:
    """The model of a config with weights that are in the layout of a table."""
    if isinstance(tensors, Mapping):
        tensors = ArrayTensors("memory", tensors)
    source = Original(table, config, tensors)
    return source.load(LoadOptions(dtype=dtype, param_dtype=param_dtype))


def shapes_alone(shapes: Mapping[str, tuple[int, ...]]) -> ArrayTensors:
    """Tensors of some shapes and nothing in them, of models that are too large to be made."""
    nothing = np.zeros((), np.float16)
    return ArrayTensors("it", {key: np.broadcast_to(nothing, each) for key, each in shapes.items()})


def layout_shapes(table: Table, config: Any) -> dict[str, tuple[int, ...]]:
    """The tensors of a config's models in the layout of a table."""
    return {piece.key: piece.shape for piece in table.pieces(shapes_of(config))}
