"""Stable Diffusion 3's multimodal diffusion transformer (MM-DiT), with TACA in its joint attention.

Source: Esser et al. 2024 (arXiv:2403.03206); Stability-AI/sd3.5, mmditx.py. Differences: text
is first in the joint sequence, q, k and v have separate projections, blocks of a kind are stacked
and scanned, and inputs and outputs are NHWC latents.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from taca_jax.attention import Implementation, joint_attention
from taca_jax.errors import UserError
from taca_jax.families.sd3.positions import PositionTable
from taca_jax.nn.blocks import QKV, BlockInputs, Products, Stream, joint_qkv
from taca_jax.nn.kinds import ModelKind, TransformerConfig, register
from taca_jax.nn.layers import ZEROS, LayerOptions, Linear, LoRAScale, modulate
from taca_jax.nn.mmdit import MMDiT
from taca_jax.nn.stacking import make_stack
from taca_jax.parallel.mesh import constrain_vectors
from taca_jax.parallel.rules import EMBEDDING, FSDP, IN, OUT, WHOLE

QKNorm = Literal["none", "rms"]


@dataclass(frozen=True, kw_only=True)
class SD3Config(TransformerConfig):
    """The shape of a Stable Diffusion 3 transformer.

    num_layers: all blocks. In the last one the text stream ends at the attention.
    num_dual_layers: the first blocks, which have a second attention among image tokens only.
    qk_norm: normalisation of queries and keys, per head.
    position_size: rows and columns of the position table; the middle of the table is used.

    Raises UserError for too many dual layers, and for a width that is not a multiple of 4.
    """

    num_layers: int
    num_dual_layers: int
    qk_norm: QKNorm
    position_size: int

    def __post_init__(self):
        if not 0 <= self.num_dual_layers < self.num_layers:
            raise UserError(
                f"num_dual_layers is {self.num_dual_layers}; it must be 0 or more and below "
                f"num_layers, {self.num_layers}"
            )
        if self.hidden % 4:
            raise UserError(f"num_heads * head_dim is {self.hidden}; it must be a multiple of 4")

    @property
    def has_qk_norm(self) -> bool:
        return self.qk_norm == "rms"

    @property
    def num_joint_layers(self) -> int:
        """Blocks between the dual ones and the last."""
        return self.num_layers - self.num_dual_layers - 1


SD35_MEDIUM = SD3Config(
    patch_size=2,
    latent_channels=16,
    num_heads=24,
    head_dim=64,
    num_layers=24,
    num_dual_layers=13,
    qk_norm="rms",
    position_size=384,
    mlp_ratio=4.0,
    txt_dim=4096,
    pooled_dim=2048,
)
SD35_LARGE = replace(SD35_MEDIUM, num_heads=38, num_layers=38, num_dual_layers=0, position_size=192)
SD3_MEDIUM = replace(SD35_MEDIUM, num_dual_layers=0, qk_norm="none", position_size=192)


class SD3Transformer(MMDiT):
    """Predicts the flow-matching velocity noise - x0 of latents, given text."""

    config: SD3Config

    def add_layers(self, **options: Unpack[LayerOptions]) -> None:
        config = self.config
        self.position_embed = PositionTable(
            config.position_size, config.hidden, param_dtype=options["param_dtype"]
        )

        def stack(layers: int, *, dual: bool) -> JointBlock | None:
            if not layers:
                return nnx.data(None)
            return make_stack(partial(JointBlock, config, dual=dual), layers, **options)

        self.dual_blocks = stack(config.num_dual_layers, dual=True)
        self.joint_blocks = stack(config.num_joint_layers, dual=False)
        self.last_block = LastBlock(config, **options)

    def __call__(
        self,
        latents: Float[Array, "b H W c"],
        timestep: Float[Array, " b"],
        txt: Float[Array, "b t k"],
        pooled: Float[Array, "b p"],
        *,
        gamma: Float[Array, " b"] | None = None,
        lora_scale: LoRAScale | None = None,
        skip: Bool[Array, " layers"] | None = None,
        attention: Implementation | None = None,
    ) -> Float[Array, "b H W c"]:
        """The velocity, float32, shaped as `latents`.

        timestep: 0 (data) to 1000 (noise). gamma: TACA's temperature, None for plain attention.
        lora_scale: the strength of attached LoRA factors, None to leave them out. skip: which
        blocks to leave out (skip-layer guidance), a traced array; None runs all.

        Raises ValueError for inputs of the wrong size, or larger than the position table.
        """
        config = self.config
        if skip is not None and skip.shape != (config.num_layers,):
            raise ValueError(f"skip is {skip.shape}; this model has {config.num_layers} layers")
        height, width = latents.shape[1:3]
        img, txt, vec = self.embed(latents, timestep, txt, pooled, lora_scale)
        inputs = BlockInputs(
            vec=nnx.silu(vec),  # the first step of every modulation
            text_len=txt.shape[1],
            gamma=gamma,
            lora_scale=lora_scale,
            attention=attention or self.attention,
        )
        rows, columns = height // config.patch_size, width // config.patch_size
        img = (img + self.position_embed(rows, columns)).astype(self.dtype)

        start, end = config.num_dual_layers, config.num_layers - 1
        for stack, layers in (
            ("dual_blocks", slice(0, start)),
            ("joint_blocks", slice(start, end)),
        ):
            if getattr(self, stack) is not None:
                img, txt = self.run_blocks(
                    stack,
                    lambda block, x, skipped=None: _unless(
                        skipped, lambda x: block(x[0], x[1], inputs), x
                    ),
                    (img, txt),
                    each=None if skip is None else skip[layers],
                )
        last_block = self.gathered("last_block")
        img = _unless(None if skip is None else skip[-1], lambda x: last_block(x, txt, inputs), img)
        return self.velocity(img, inputs.vec, lora_scale, (height, width))


class ImageAttention(nnx.Module):
    """The second attention of dual blocks: among image tokens only, never scaled by TACA."""

    def __init__(self, config: SD3Config, **options: Unpack[LayerOptions]):
        self.qkv = QKV(config, norms=config.has_qk_norm, **options)
        self.out = Linear(config.hidden, config.hidden, **options)

    def __call__(self, x: Float[Array, "b s d"], inputs: BlockInputs) -> Float[Array, "b s d"]:
        qkv = joint_qkv((self.qkv,), (self.qkv(x, inputs.lora_scale),))
        attended = joint_attention(*qkv, text_len=0, implementation=inputs.attention)
        return self.out(attended.reshape(x.shape), inputs.lora_scale)


class JointBlock(nnx.Module):
    """Text and image with separate weights, one joint attention and, if `dual`, ImageAttention."""

    def __init__(self, config: SD3Config, *, dual: bool, **options: Unpack[LayerOptions]):
        self.img = Stream(config, mods=9 if dual else 6, norms=config.has_qk_norm, **options)
        self.txt = Stream(config, norms=config.has_qk_norm, **options)
        self.img_attn = nnx.data(ImageAttention(config, **options) if dual else None)

    def __call__(
        self, img: Float[Array, "b s d"], txt: Float[Array, "b t d"], inputs: BlockInputs
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b t d"]]:
        img_mod, txt_mod = self.img.modulation(inputs), self.txt.modulation(inputs)
        txt_attended, img_attended = attend(
            (self.txt.qkv, self.img.qkv),
            self.txt.qkv(modulate(txt, *txt_mod[:2]), inputs.lora_scale),
            self.img.qkv(modulate(img, *img_mod[:2]), inputs.lora_scale),
            inputs,
        )
        extra = None
        if self.img_attn is not None:
            extra = img_mod[8][:, None] * self.img_attn(modulate(img, *img_mod[6:8]), inputs)
        img = self.img.finish(img, img_attended, img_mod, inputs.lora_scale, extra)
        txt = self.txt.finish(txt, txt_attended, txt_mod, inputs.lora_scale)
        return img, txt


class TextEnd(nnx.Module):
    """The text stream of the last block, which ends at the attention."""

    def __init__(self, config: SD3Config, **options: Unpack[LayerOptions]):
        self.mod = Linear(config.hidden, 2 * config.hidden, kernel_init=ZEROS, **options)
        self.qkv = QKV(config, norms=config.has_qk_norm, **options)


class LastBlock(nnx.Module):
    """The last block, which returns image tokens only."""

    def __init__(self, config: SD3Config, **options: Unpack[LayerOptions]):
        self.img = Stream(config, norms=config.has_qk_norm, **options)
        self.txt = TextEnd(config, **options)

    def __call__(
        self, img: Float[Array, "b s d"], txt: Float[Array, "b t d"], inputs: BlockInputs
    ) -> Float[Array, "b s d"]:
        lora_scale = inputs.lora_scale
        img_mod = self.img.modulation(inputs)
        vectors = constrain_vectors(self.txt.mod(inputs.vec, lora_scale))
        shift, scale = jnp.split(vectors, 2, axis=-1)
        _, img_attended = attend(
            (self.txt.qkv, self.img.qkv),
            self.txt.qkv(modulate(txt, shift, scale), lora_scale),
            self.img.qkv(modulate(img, *img_mod[:2]), lora_scale),
            inputs,
        )
        return self.img.finish(img, img_attended, img_mod, lora_scale)


def attend(
    streams: tuple[QKV, QKV],
    txt_qkv: Products,
    img_qkv: Products,
    inputs: BlockInputs,
) -> tuple[Float[Array, "b t k"], Float[Array, "b s k"]]:
    """TACA joint attention, heads merged: its outputs for the text and for the image."""
    out = joint_attention(
        *joint_qkv(streams, (txt_qkv, img_qkv)),
        text_len=inputs.text_len,
        gamma=inputs.gamma,
        implementation=inputs.attention,
    )
    txt, img = jnp.split(out.reshape(*out.shape[:2], -1), [inputs.text_len], axis=1)
    return txt, img


def _unless(skipped: Bool[Array, ""] | None, call: Any, x: Any) -> Any:
    """`call(x)`, or x if `skipped`; only the chosen branch runs."""
    if skipped is None:
        return call(x)
    return jax.lax.cond(skipped, lambda x: x, call, x)


SD3_KIND = register(
    ModelKind(
        "sd3",
        "transformer",
        SD3Config,
        SD3Transformer,
        sharding={
            r"(img_in|final_out)": (WHOLE, FSDP),
            r"position_embed": EMBEDDING,
            r"txt_in": (FSDP, WHOLE),
            r"(time|vector)_in\.linear_1": IN,
            r"(time|vector)_in\.linear_2": OUT,
            r"(dual_blocks|joint_blocks|last_block)\.(img|txt)\.mod": IN,
            r"(dual_blocks|joint_blocks|last_block)\.(img|txt)\.(qkv\.[qkv]|mlp_in)": IN,
            r"(dual_blocks|joint_blocks|last_block)\.(img|txt)\.(out|mlp_out)": OUT,
            r"dual_blocks\.img_attn\.qkv\.[qkv]": IN,
            r"dual_blocks\.img_attn\.out": OUT,
            r"final_mod": IN,
        },
        quantized=r"(dual_blocks|joint_blocks|last_block)\..*",
    )
)
