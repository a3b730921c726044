"""FLUX.1's multimodal diffusion transformer, with TACA in its joint attention.

Source: black-forest-labs/flux, model.py and modules/layers.py. Differences: q, k
and v have separate projections (as in diffusers, whose names LoRA files use), blocks are stacked
and scanned, and inputs and outputs are NHWC latents: packing into tokens happens in here only.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from taca_jax.attention import Implementation, joint_attention
from taca_jax.attention.keeping import keepable
from taca_jax.errors import UserError
from taca_jax.nn.blocks import QKV, BlockInputs, Stream, joint_qkv
from taca_jax.nn.kinds import ModelKind, TransformerConfig, register
from taca_jax.nn.layers import (
    TIMESTEP_CHANNELS,
    ZEROS,
    LayerOptions,
    Linear,
    LoRAScale,
    MLPEmbedder,
    gated,
    gelu,
    modulate,
    timestep_embedding,
)
from taca_jax.nn.mmdit import MMDiT
from taca_jax.nn.rope import Rotation, joint_rotation
from taca_jax.nn.stacking import MLP_PRODUCTS, make_stack
from taca_jax.parallel.mesh import constrain_vectors
from taca_jax.parallel.rules import FSDP, IN, OUT, WHOLE


@dataclass(frozen=True, kw_only=True)
class FluxConfig(TransformerConfig):
    """The shape of a FLUX transformer.

    axes_dim: rotary channels for (index, row, column); they sum to head_dim.
    theta: base of the rotary wavelengths.
    guidance_embed: whether the guidance scale is an input (dev, Krea) or not (schnell).

    Raises UserError when axes_dim does not sum to head_dim or is odd.
    """

    axes_dim: tuple[int, int, int]
    theta: float
    num_double_blocks: int
    num_single_blocks: int
    guidance_embed: bool

    def __post_init__(self):
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise UserError(
                f"axes_dim {self.axes_dim} must be even and sum to head_dim {self.head_dim}"
            )
        if self.num_double_blocks < 1 or self.num_single_blocks < 1:
            raise UserError("FLUX needs at least one double and one single block")


FLUX_DEV = FluxConfig(
    patch_size=2,
    latent_channels=16,
    num_heads=24,
    head_dim=128,
    axes_dim=(16, 56, 56),
    theta=10_000,
    num_double_blocks=19,
    num_single_blocks=38,
    mlp_ratio=4.0,
    txt_dim=4096,
    pooled_dim=768,
    guidance_embed=True,
)
FLUX_KREA = FLUX_DEV
FLUX_SCHNELL = replace(FLUX_DEV, guidance_embed=False)


class FluxTransformer(MMDiT):
    """Predicts the flow-matching velocity noise - x0 of latents, given text."""

    config: FluxConfig

    def add_layers(self, **options: Unpack[LayerOptions]) -> None:
        config = self.config
        self.guidance_in = nnx.data(
            MLPEmbedder(TIMESTEP_CHANNELS, config.hidden, **options)
            if config.guidance_embed
            else None
        )
        double, single = partial(DoubleBlock, config), partial(SingleBlock, config)
        self.double_blocks = make_stack(double, config.num_double_blocks, **options)
        self.single_blocks = make_stack(single, config.num_single_blocks, **options)

    def __call__(
        self,
        latents: Float[Array, "b H W c"],
        timestep: Float[Array, " b"],
        txt: Float[Array, "b t k"],
        pooled: Float[Array, "b p"],
        *,
        guidance: Float[Array, " b"] | None = None,
        gamma: Float[Array, " b"] | None = None,
        lora_scale: LoRAScale | None = None,
        attention: Implementation | None = None,
    ) -> Float[Array, "b H W c"]:
        """The velocity, float32, shaped as `latents`; arguments and errors: see `with_features`."""
        velocity, _ = self.with_features(
            latents,
            timestep,
            txt,
            pooled,
            blocks=self.config.num_double_blocks,
            guidance=guidance,
            gamma=gamma,
            lora_scale=lora_scale,
            attention=attention,
        )
        return velocity

    def with_features(
        self,
        latents: Float[Array, "b H W c"],
        timestep: Float[Array, " b"],
        txt: Float[Array, "b t k"],
        pooled: Float[Array, "b p"],
        *,
        blocks: int,
        guidance: Float[Array, " b"] | None = None,
        gamma: Float[Array, " b"] | None = None,
        lora_scale: LoRAScale | None = None,
        attention: Implementation | None = None,
    ) -> tuple[Float[Array, "b H W c"], Float[Array, "b s d"]]:
        """The velocity, float32, shaped as `latents`, and the image tokens after so many `blocks`:
        all double ones, and perhaps some single ones.

        timestep: 0 (data) to 1000 (noise). guidance: the guidance scale itself (such as 3.5),
        required exactly if the model embeds it. gamma: TACA's temperature, None for plain
        attention. lora_scale: the strength of attached LoRA factors, None to leave them out.

        Raises ValueError if guidance is given to a model that does not embed it or missing for one
        that does, and for inputs of the wrong size; UserError for a number of blocks out of range.
        """
        config = self.config
        single = blocks - config.num_double_blocks
        if not 0 <= single <= config.num_single_blocks:
            most = config.num_double_blocks + config.num_single_blocks
            raise UserError(
                f"features.blocks is {blocks}; this model has features after "
                f"{config.num_double_blocks} (its double blocks) to {most} (all blocks)"
            )
        if (guidance is not None) != config.guidance_embed:
            raise ValueError(
                "this model takes a guidance scale; none was given"
                if config.guidance_embed
                else "this model has no guidance embedding (schnell has none); leave guidance out"
            )
        height, width = latents.shape[1:3]
        text_len = txt.shape[1]
        img, txt, vec = self.embed(latents, timestep, txt, pooled, lora_scale)
        if self.guidance_in is not None and guidance is not None:
            guidance_in = self.gathered("guidance_in")
            vec = vec + guidance_in(timestep_embedding(guidance * 1000), lora_scale)
        inputs = FluxInputs(
            vec=nnx.silu(vec),  # the first step of every modulation
            rotation=joint_rotation(
                text_len,
                height // config.patch_size,
                width // config.patch_size,
                axes_dim=config.axes_dim,
                theta=config.theta,
            ),
            text_len=text_len,
            gamma=gamma,
            lora_scale=lora_scale,
            attention=attention or self.attention,
        )
        img, txt = self.run_blocks(
            "double_blocks", lambda block, x: block(x[0], x[1], inputs), (img, txt)
        )

        def run_single(joint: Float[Array, "b s d"], layers: slice | None) -> Float[Array, "b s d"]:
            return self.run_blocks(
                "single_blocks", lambda block, x: block(x, inputs), joint, layers=layers
            )

        joint = jnp.concatenate([txt, img], axis=1)
        if single:
            joint = run_single(joint, slice(single))
            img = joint[:, text_len:]
        joint = run_single(joint, slice(single, None) if single else None)
        size = (height, width)
        return self.velocity(joint[:, text_len:], inputs.vec, lora_scale, size), img


@dataclass(frozen=True)
class FluxInputs(BlockInputs):
    """`BlockInputs`, and the positions of all tokens."""

    rotation: Rotation


class DoubleBlock(nnx.Module):
    """Text and image with separate weights and one joint attention."""

    def __init__(self, config: FluxConfig, **options: Unpack[LayerOptions]):
        self.img = Stream(config, **options)
        self.txt = Stream(config, **options)

    def __call__(
        self, img: Float[Array, "b s d"], txt: Float[Array, "b t d"], inputs: FluxInputs
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b t d"]]:
        img_mod, txt_mod = self.img.modulation(inputs), self.txt.modulation(inputs)
        img_qkv = self.img.qkv(modulate(img, *img_mod[:2]), inputs.lora_scale)
        txt_qkv = self.txt.qkv(modulate(txt, *txt_mod[:2]), inputs.lora_scale)
        qkv = joint_qkv((self.txt.qkv, self.img.qkv), (txt_qkv, img_qkv), inputs.rotation)
        attended = attend(*qkv, inputs)
        txt_attended, img_attended = jnp.split(attended, [inputs.text_len], axis=1)
        img = self.img.finish(img, img_attended, img_mod, inputs.lora_scale)
        txt = self.txt.finish(txt, txt_attended, txt_mod, inputs.lora_scale)
        return img, txt


class SingleBlock(nnx.Module):
    """One set of weights for the joint sequence; attention and MLP in parallel."""

    def __init__(self, config: FluxConfig, **options: Unpack[LayerOptions]):
        self.mod = Linear(config.hidden, 3 * config.hidden, kernel_init=ZEROS, **options)
        self.qkv = QKV(config, **options)
        self.mlp_in = Linear(config.hidden, config.mlp_hidden, **options)
        self.out = Linear(config.hidden + config.mlp_hidden, config.hidden, **options)

    def __call__(self, x: Float[Array, "b s d"], inputs: FluxInputs) -> Float[Array, "b s d"]:
        scale_by = inputs.lora_scale
        vectors = constrain_vectors(self.mod(inputs.vec, scale_by))
        shift, scale, gate = jnp.split(vectors, 3, axis=-1)
        y = modulate(x, shift, scale)
        qkv = joint_qkv((self.qkv,), (self.qkv(y, scale_by),), inputs.rotation)
        attended = attend(*qkv, inputs)
        mlp = gelu(keepable(self.mlp_in(y, scale_by), MLP_PRODUCTS))
        return gated(x, gate, self.out((attended, mlp), scale_by))


def attend(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    inputs: FluxInputs,
) -> Float[Array, "b s k"]:
    """TACA joint attention, heads merged."""
    out = joint_attention(
        *(q, k, v),
        text_len=inputs.text_len,
        gamma=inputs.gamma,
        implementation=inputs.attention,
    )
    return out.reshape(*out.shape[:2], -1)


FLUX_KIND = register(
    ModelKind(
        "flux",
        "transformer",
        FluxConfig,
        FluxTransformer,
        sharding={
            r"(img_in|final_out)": (WHOLE, FSDP),
            r"txt_in": (FSDP, WHOLE),
            r"(time|vector|guidance)_in\.linear_1": IN,
            r"(time|vector|guidance)_in\.linear_2": OUT,
            r"double_blocks\.(img|txt)\.mod": IN,
            r"double_blocks\.(img|txt)\.(qkv\.[qkv]|mlp_in)": IN,
            r"double_blocks\.(img|txt)\.(out|mlp_out)": OUT,
            r"single_blocks\.mod": IN,
            r"single_blocks\.(qkv\.[qkv]|mlp_in)": IN,
            # Its inputs are attention heads and MLP channels concatenated, so a device's shards of
            # the two would not be contiguous.
            r"single_blocks\.out": IN,
            r"final_mod": IN,
        },
        quantized=r"(double|single)_blocks\..*",
    )
)
