"""FLUX.2's multimodal diffusion transformer, with TACA in its joint attention.

Source: black-forest-labs/flux2, model.py. It differs from FLUX.1's in that all blocks of a kind
share one modulation, that MLPs are SwiGLU, that the attention and the MLP of a single block have
one input projection, and in having neither biases nor a pooled text embedding. Differences to the
source: q, k and v of double blocks have separate projections (as in diffusers), blocks are stacked
and scanned, and inputs and outputs are NHWC latents.
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
from taca_jax.families.flux2.positions import joint_rotation
from taca_jax.nn.blocks import NORM_EPSILON, QKV, BlockInputs, joint_qkv
from taca_jax.nn.kinds import ModelKind, TransformerConfig, register
from taca_jax.nn.layers import (
    TIMESTEP_CHANNELS,
    ZEROS,
    LayerOptions,
    Linear,
    LoRAScale,
    MLPEmbedder,
    RMSNorm,
    gated,
    modulate,
    swiglu,
    timestep_embedding,
)
from taca_jax.nn.mmdit import MMDiT
from taca_jax.nn.norm_rotate import norm_rotate
from taca_jax.nn.rope import Rotation
from taca_jax.nn.stacking import MLP_PRODUCTS, QKV_PRODUCTS, make_stack
from taca_jax.parallel.mesh import constrain_vectors
from taca_jax.parallel.rules import FSDP, IN, OUT, WHOLE


@dataclass(frozen=True, kw_only=True)
class Flux2Config(TransformerConfig):
    """The shape of a FLUX.2 transformer. A token is one latent position; there is no pooled text.

    axes_dim: rotary channels for (index, row, column, token); they sum to head_dim.
    theta: base of the rotary wavelengths.
    guidance_embed: whether the guidance scale is an input (dev) or not (klein).
    distilled: whether the model draws in a few steps without guidance (klein, not its base); it
      changes nothing but the defaults of a call.

    Raises UserError for axes_dim that do not sum to head_dim or are odd, for patches, and for a
    pooled embedding.
    """

    axes_dim: tuple[int, int, int, int]
    theta: float
    num_double_blocks: int
    num_single_blocks: int
    guidance_embed: bool
    distilled: bool = False
    patch_size: int = 1
    pooled_dim: int = 0

    def __post_init__(self):
        if sum(self.axes_dim) != self.head_dim or any(d % 2 for d in self.axes_dim):
            raise UserError(
                f"axes_dim {self.axes_dim} must be even and sum to head_dim {self.head_dim}"
            )
        if self.num_double_blocks < 1 or self.num_single_blocks < 1:
            raise UserError("FLUX.2 needs at least one double and one single block")
        if (self.patch_size, self.pooled_dim) != (1, 0):
            raise UserError(
                f"patch_size is {self.patch_size} and pooled_dim {self.pooled_dim}; FLUX.2 has no "
                "patches (1) and no pooled text (0)"
            )


KLEIN_BASE_4B = Flux2Config(
    latent_channels=128,
    num_heads=24,
    head_dim=128,
    axes_dim=(32, 32, 32, 32),
    theta=2000,
    num_double_blocks=5,
    num_single_blocks=20,
    mlp_ratio=3.0,
    txt_dim=3 * 2560,
    guidance_embed=False,
)
KLEIN_BASE_9B = replace(
    KLEIN_BASE_4B, num_heads=32, num_double_blocks=8, num_single_blocks=24, txt_dim=3 * 4096
)
KLEIN_4B, KLEIN_9B = (replace(each, distilled=True) for each in (KLEIN_BASE_4B, KLEIN_BASE_9B))
FLUX2_DEV = replace(
    KLEIN_BASE_4B,
    num_heads=48,
    num_double_blocks=8,
    num_single_blocks=48,
    txt_dim=15360,
    guidance_embed=True,
)


class Flux2Transformer(MMDiT):
    """Predicts the flow-matching velocity noise - x0 of latents, given text."""

    config: Flux2Config
    bias = False

    def add_layers(self, **options: Unpack[LayerOptions]) -> None:
        config = self.config
        self.guidance_in = nnx.data(
            MLPEmbedder(TIMESTEP_CHANNELS, config.hidden, bias=False, **options)
            if config.guidance_embed
            else None
        )
        self.img_mod, self.txt_mod, self.single_mod = (
            Linear(config.hidden, count * config.hidden, bias=False, kernel_init=ZEROS, **options)
            for count in (_DOUBLE_MODS, _DOUBLE_MODS, _SINGLE_MODS)
        )
        double, single = partial(DoubleBlock, config), partial(SingleBlock, config)
        self.double_blocks = make_stack(double, config.num_double_blocks, **options)
        self.single_blocks = make_stack(single, config.num_single_blocks, **options)

    def __call__(
        self,
        latents: Float[Array, "b H W c"],
        timestep: Float[Array, " b"],
        txt: Float[Array, "b t k"],
        pooled: Float[Array, "b 0"] | None = None,
        *,
        guidance: Float[Array, " b"] | None = None,
        gamma: Float[Array, " b"] | None = None,
        lora_scale: LoRAScale | None = None,
        attention: Implementation | None = None,
    ) -> Float[Array, "b H W c"]:
        """The velocity, float32, shaped as `latents`, which are normalised patches of the
        autoencoder's.

        timestep: 0 (data) to 1000 (noise). pooled: nothing, as every family's transformer is
        called with one. guidance: the guidance scale itself (such as 4.0), required exactly if the
        model embeds it. gamma: TACA's temperature, None for plain attention. lora_scale: the
        strength of attached LoRA factors, None to leave them out.

        Raises ValueError if guidance is given to a model that does not embed it or missing for one
        that does, and for inputs of the wrong size.
        """
        config = self.config
        if (guidance is not None) != config.guidance_embed:
            raise ValueError(
                "this model takes a guidance scale; none was given"
                if config.guidance_embed
                else "this model has no guidance embedding (klein has none); leave guidance out"
            )
        height, width = latents.shape[1:3]
        text_len = txt.shape[1]
        pooled = jnp.zeros((len(latents), 0)) if pooled is None else pooled
        img, txt, vec = self.embed(latents, timestep, txt, pooled, lora_scale)
        if self.guidance_in is not None and guidance is not None:
            guidance_in = self.gathered("guidance_in")
            vec = vec + guidance_in(timestep_embedding(guidance * 1000), lora_scale)
        vec = nnx.silu(vec)  # the first step of every modulation

        def modulation(name: str, count: int) -> list[Float[Array, "b d"]]:
            vectors = constrain_vectors(self.gathered(name)(vec, lora_scale))
            return jnp.split(vectors, count, axis=-1)

        inputs = Flux2Inputs(
            vec=vec,
            img_mod=modulation("img_mod", _DOUBLE_MODS),
            txt_mod=modulation("txt_mod", _DOUBLE_MODS),
            single_mod=modulation("single_mod", _SINGLE_MODS),
            rotation=joint_rotation(
                text_len, height, width, axes_dim=config.axes_dim, theta=config.theta
            ),
            text_len=text_len,
            gamma=gamma,
            lora_scale=lora_scale,
            attention=attention or self.attention,
        )
        img, txt = self.run_blocks(
            "double_blocks", lambda block, x: block(x[0], x[1], inputs), (img, txt)
        )
        joint = self.run_blocks(
            "single_blocks",
            lambda block, x: block(x, inputs),
            jnp.concatenate([txt, img], axis=1),
        )
        return self.velocity(joint[:, text_len:], vec, lora_scale, (height, width))


_DOUBLE_MODS, _SINGLE_MODS = 6, 3
"""Modulation vectors of a stream: shift, scale and gate of its attention and of its MLP, which in
single blocks are one."""


@dataclass(frozen=True)
class Flux2Inputs(BlockInputs):
    """`BlockInputs`, the modulations, which all blocks of a kind share, and the positions."""

    img_mod: list[Float[Array, "b d"]]
    txt_mod: list[Float[Array, "b d"]]
    single_mod: list[Float[Array, "b d"]]
    rotation: Rotation


class Flux2Stream(nnx.Module):
    """One modality's part of a double block: its projections and its MLP."""

    def __init__(self, config: Flux2Config, **options: Unpack[LayerOptions]):
        hidden, mlp = config.hidden, config.mlp_hidden
        self.qkv = QKV(config, bias=False, **options)
        self.out = Linear(hidden, hidden, bias=False, **options)
        self.mlp_in = Linear(hidden, 2 * mlp, bias=False, **options)
        self.mlp_out = Linear(mlp, hidden, bias=False, **options)

    def finish(
        self,
        x: Float[Array, "b s d"],
        attended: Float[Array, "b s d"],
        modulation: list[Float[Array, "b d"]],
        lora_scale: LoRAScale | None,
    ) -> Float[Array, "b s d"]:
        """The residual stream after the attention's output projection and the MLP."""
        _, _, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = gated(x, gate, keepable(self.out(attended, lora_scale), MLP_PRODUCTS))
        y = self.mlp_in(modulate(x, mlp_shift, mlp_scale), lora_scale)
        y = keepable(y, MLP_PRODUCTS)
        return gated(x, mlp_gate, self.mlp_out(swiglu(y), lora_scale))


class DoubleBlock(nnx.Module):
    """Text and image with separate weights and one joint attention."""

    def __init__(self, config: Flux2Config, **options: Unpack[LayerOptions]):
        self.img = Flux2Stream(config, **options)
        self.txt = Flux2Stream(config, **options)

    def __call__(
        self, img: Float[Array, "b s d"], txt: Float[Array, "b t d"], inputs: Flux2Inputs
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b t d"]]:
        lora_scale = inputs.lora_scale
        img_qkv = self.img.qkv(modulate(img, *inputs.img_mod[:2]), lora_scale)
        txt_qkv = self.txt.qkv(modulate(txt, *inputs.txt_mod[:2]), lora_scale)
        qkv = joint_qkv((self.txt.qkv, self.img.qkv), (txt_qkv, img_qkv), inputs.rotation)
        attended = attend(*qkv, inputs)
        txt_attended, img_attended = jnp.split(attended, [inputs.text_len], axis=1)
        img = self.img.finish(img, img_attended, inputs.img_mod, lora_scale)
        txt = self.txt.finish(txt, txt_attended, inputs.txt_mod, lora_scale)
        return img, txt


class SingleBlock(nnx.Module):
    """One set of weights for the joint sequence; attention and MLP in parallel.

    `qkv_mlp` makes queries, keys, values, and the gate and value of the MLP. It is one layer, as in
    all published files, so that LoRAs of any rank have the same rank here and there.
    """

    def __init__(self, config: Flux2Config, **options: Unpack[LayerOptions]):
        hidden, mlp = config.hidden, config.mlp_hidden
        rngs, param_dtype = options["rngs"], options["param_dtype"]
        self.num_heads = config.num_heads
        self.qkv_mlp = Linear(hidden, 3 * hidden + 2 * mlp, bias=False, **options)
        self.q_norm, self.k_norm = (
            RMSNorm(config.head_dim, rngs=rngs, param_dtype=param_dtype, epsilon=NORM_EPSILON)
            for _ in range(2)
        )
        self.out = Linear(hidden + mlp, hidden, bias=False, **options)

    def __call__(self, x: Float[Array, "b s d"], inputs: Flux2Inputs) -> Float[Array, "b s d"]:
        shift, scale, gate = inputs.single_mod
        b, s, hidden = x.shape
        *qkv, mlp = self.qkv_mlp.in_parts(
            modulate(x, shift, scale), inputs.lora_scale, ends=(hidden, 2 * hidden, 3 * hidden)
        )
        q, k, v = (each.reshape(b, s, self.num_heads, -1) for each in keepable(qkv, QKV_PRODUCTS))
        q = norm_rotate((q,), (self.q_norm,), inputs.rotation)
        k = norm_rotate((k,), (self.k_norm,), inputs.rotation)
        mlp = swiglu(keepable(mlp, MLP_PRODUCTS))
        return gated(x, gate, self.out((attend(q, k, v, inputs), mlp), inputs.lora_scale))


def attend(
    q: Float[Array, "b s h d"],
    k: Float[Array, "b s h d"],
    v: Float[Array, "b s h d"],
    inputs: Flux2Inputs,
) -> Float[Array, "b s k"]:
    """TACA joint attention, heads merged."""
    out = joint_attention(
        *(q, k, v),
        text_len=inputs.text_len,
        gamma=inputs.gamma,
        implementation=inputs.attention,
    )
    return out.reshape(*out.shape[:2], -1)


FLUX2_KIND = register(
    ModelKind(
        "flux2",
        "transformer",
        Flux2Config,
        Flux2Transformer,
        sharding={
            r"(img_in|final_out)": (WHOLE, FSDP),
            r"txt_in": (FSDP, WHOLE),
            r"(time|guidance)_in\.linear_1": IN,
            r"(time|guidance)_in\.linear_2": OUT,
            r"(img|txt|single)_mod": IN,
            r"double_blocks\.(img|txt)\.(qkv\.[qkv]|mlp_in)": IN,
            r"double_blocks\.(img|txt)\.(out|mlp_out)": OUT,
            r"single_blocks\.qkv_mlp": IN,
            # Its inputs are attention heads and MLP channels concatenated, so a device's shards of
            # the two would not be contiguous.
            r"single_blocks\.out": IN,
            r"final_mod": IN,
        },
        quantized=r"(double|single)_blocks\..*",
    )
)
