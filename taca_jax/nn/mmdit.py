"""The parts of a transformer around its blocks: input embeddings and the output head.

Sources: black-forest-labs/flux, model.py; Stability-AI/sd3.5, mmditx.py.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Unpack

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from taca_jax.attention import Implementation
from taca_jax.nn.kinds import TransformerConfig, kind_of
from taca_jax.nn.layers import (
    TIMESTEP_CHANNELS,
    ZEROS,
    LayerOptions,
    Linear,
    LoRAScale,
    MLPEmbedder,
    modulate,
    patchify,
    timestep_embedding,
    unpatchify,
)
from taca_jax.nn.stacking import Remat, gathered, run_stack
from taca_jax.parallel.mesh import constrain_vectors


class MMDiT(nnx.Module):
    """Embeddings and output head of a multimodal diffusion transformer; subclasses add the rest in
    `add_layers`.

    Parameters are created in `param_dtype`, computation is in `dtype`; norms, softmax and the time
    embedding are always float32. `remat` says what the backward pass recomputes, `attention` is the
    implementation of the joint attention unless a call names another. Without a pooled embedding
    (`pooled_dim` 0) the time alone modulates.
    """

    bias: ClassVar[bool] = True
    """Whether the linear layers have biases."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        rngs: nnx.Rngs,
        param_dtype: DTypeLike = jnp.float32,
        dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        attention: Implementation = "auto",
    ):
        self.config = config
        self.dtype = dtype
        self.remat: Remat = remat
        self.attention: Implementation = attention
        options: LayerOptions = {"rngs": rngs, "param_dtype": param_dtype, "dtype": dtype}
        hidden, features = config.hidden, config.latent_channels * config.patch_size**2
        bias = self.bias
        self.img_in = Linear(features, hidden, bias=bias, **options)
        self.txt_in = Linear(config.txt_dim, hidden, bias=bias, **options)
        self.time_in = MLPEmbedder(TIMESTEP_CHANNELS, hidden, bias=bias, **options)
        self.vector_in = nnx.data(
            MLPEmbedder(config.pooled_dim, hidden, bias=bias, **options)
            if config.pooled_dim
            else None
        )
        self.final_mod = Linear(hidden, 2 * hidden, bias=bias, kernel_init=ZEROS, **options)
        self.final_out = Linear(hidden, features, bias=bias, kernel_init=ZEROS, **options)
        self.add_layers(**options)

    def add_layers(self, **options: Unpack[LayerOptions]) -> None:
        """Creates the blocks, and what else a family has, by `self.config`."""
        raise NotImplementedError

    def embed(
        self,
        latents: Float[Array, "b H W c"],
        timestep: Float[Array, " b"],
        txt: Float[Array, "b t k"],
        pooled: Float[Array, "b p"],
        lora_scale: LoRAScale | None,
    ) -> tuple[Float[Array, "b s d"], Float[Array, "b t d"], Float[Array, "b d"]]:
        """Embedded image and text tokens, and the vector that modulates them.

        Raises ValueError for inputs whose widths are not the model's.
        """
        config = self.config
        for name, given, expected in (
            ("latents", latents.shape[-1], config.latent_channels),
            ("txt", txt.shape[-1], config.txt_dim),
            ("pooled", pooled.shape[-1], config.pooled_dim),
        ):
            if given != expected:
                raise ValueError(f"{name} has {given} channels; this model expects {expected}")
        vec = self.gathered("time_in")(timestep_embedding(timestep), lora_scale)
        if self.vector_in is not None:
            vec = vec + self.gathered("vector_in")(pooled, lora_scale)
        img = self.gathered("img_in")(patchify(latents, config.patch_size), lora_scale)
        return img, self.gathered("txt_in")(txt, lora_scale), vec

    def run_blocks(
        self,
        stack: str,
        call: Callable[..., Any],
        carry: Any,
        *,
        each: Any = None,
        layers: slice | None = None,
    ) -> Any:
        """`run_stack` of the model's stack of that name."""
        return run_stack(
            getattr(self, stack),
            call,
            carry,
            each=each,
            remat=self.remat,
            layers=layers,
            sharding=kind_of(self.config).sharding,
            name=stack,
        )

    def gathered(self, name: str) -> Any:
        """The layer or block of that name, which is in no stack, gathered as `run_blocks` does."""
        graph, params = nnx.split(getattr(self, name))
        return nnx.merge(graph, gathered(params, kind_of(self.config).sharding, name))

    def velocity(
        self,
        img: Float[Array, "b s d"],
        vec: Float[Array, "b d"],
        lora_scale: LoRAScale | None,
        size: tuple[int, int],
    ) -> Float[Array, "b H W c"]:
        """The output of the image tokens as latents of `size`, float32; `vec` is after its SiLU."""
        vectors = constrain_vectors(self.gathered("final_mod")(vec, lora_scale))
        shift, scale = jnp.split(vectors, 2, axis=-1)
        out = self.gathered("final_out")(modulate(img, shift, scale), lora_scale)
        return unpatchify(out.astype(jnp.float32), self.config.patch_size, *size)
