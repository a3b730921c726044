"""A third MM-DiT, as small as one can be: joint blocks alone, rotary positions, text from a T5."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from taca_jax.attention import joint_attention
from taca_jax.nn.blocks import BlockInputs, Stream, joint_qkv
from taca_jax.nn.kinds import ModelKind, TransformerConfig, register
from taca_jax.nn.layers import modulate
from taca_jax.nn.mmdit import MMDiT
from taca_jax.nn.rope import Rotation, joint_rotation
from taca_jax.nn.stacking import make_stack
from taca_jax.parallel.rules import FSDP, IN, OUT, WHOLE


@dataclass(frozen=True, kw_only=True)
class MiniConfig(TransformerConfig):
    """The shape of the transformer. axes_dim: rotary channels for (index, row, column)."""

    axes_dim: tuple[int, int, int]
    num_blocks: int


@dataclass(frozen=True)
class MiniInputs(BlockInputs):
    """`BlockInputs`, and the positions of all tokens."""

    rotation: Rotation


class MiniBlock(nnx.Module):
    def __init__(self, config: MiniConfig, **types):
        self.img = Stream(config, **types)
        self.txt = Stream(config, **types)

    def __call__(self, img: jax.Array, txt: jax.Array, inputs: MiniInputs):
        mods = self.txt.modulation(inputs), self.img.modulation(inputs)
        streams = (self.txt, txt, mods[0]), (self.img, img, mods[1])
        products = [s.qkv(modulate(x, *mod[:2]), inputs.lora_scale) for s, x, mod in streams]
        q, k, v = joint_qkv((self.txt.qkv, self.img.qkv), products, inputs.rotation)
        attended = joint_attention(
            *(q, k, v),
            text_len=inputs.text_len,
            gamma=inputs.gamma,
            implementation=inputs.attention,
        )
        parts = jnp.split(attended.reshape(*attended.shape[:2], -1), [inputs.text_len], axis=1)
        txt, img = (
            stream.finish(x, part, mod, inputs.lora_scale)
            for (stream, x, mod), part in zip(streams, parts, strict=True)
        )
        return img, txt


class MiniTransformer(MMDiT):
    """Predicts the velocity of latents, called as every family's transformer is."""

    config: MiniConfig

    def add_layers(self, **options):
        self.blocks = make_stack(partial(MiniBlock, self.config), self.config.num_blocks, **options)

    def __call__(
        self, latents, timestep, txt, pooled, *, gamma=None, lora_scale=None, attention=None
    ):
        config, (height, width) = self.config, latents.shape[1:3]
        img, txt, vec = self.embed(latents, timestep, txt, pooled, lora_scale)
        inputs = MiniInputs(
            vec=nnx.silu(vec),
            rotation=joint_rotation(
                txt.shape[1],
                height // config.patch_size,
                width // config.patch_size,
                axes_dim=config.axes_dim,
                theta=100,
            ),
            text_len=txt.shape[1],
            gamma=gamma,
            lora_scale=lora_scale,
            attention=attention or self.attention,
        )
        img, _ = self.run_blocks("blocks", lambda block, x: block(x[0], x[1], inputs), (img, txt))
        return self.velocity(img, inputs.vec, lora_scale, (height, width))


MINI_KIND = register(
    ModelKind(
        "mini",
        "transformer",
        MiniConfig,
        MiniTransformer,
        sharding={
            r"(img_in|final_out)": (WHOLE, FSDP),
            r"txt_in": (FSDP, WHOLE),
            r"(time|vector)_in\.linear_1": IN,
            r"(time|vector)_in\.linear_2": OUT,
            r"blocks\.(img|txt)\.(mod|qkv\.[qkv]|mlp_in)": IN,
            r"blocks\.(img|txt)\.(out|mlp_out)": OUT,
            r"final_mod": IN,
        },
        quantized=r"blocks\..*",
    )
)
