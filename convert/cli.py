"""The command line of `python -m convert`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from convert.arguments import POSITIONAL, parse
from convert.exporting import Layout as ExportLayout
from convert.exporting import export
from convert.inspection import inspect
from convert.loras import For, convert_lora
from convert.models import convert_flux, convert_model, convert_sd3
from convert.verification import verify
from taca_jax.config.command_line import say
from taca_jax.errors import UserError
from taca_jax.text.clip import Activation
from taca_jax.weights.lora_files import Layout
from taca_jax.weights.originals import Latents, clip, t5, tiny_vae, vae

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Flux:
    """FLUX.1 from a diffusers folder to a pipeline folder: all of its models, tokenizers, sampler.

    A bare transformer folder, or a single file, gives a bare model folder.
    """

    src: Path
    """diffusers' pipeline folder (transformer/, vae/, ...), a transformer folder, or a single file
    of Black Forest Labs or ComfyUI (flux1-dev.safetensors, ae.safetensors)."""
    dst: Path
    """The folder to make; must be new or empty."""
    dtype: Dtype | None = None
    """What to store parameters in; by default as they are, and bfloat16 for float8."""

    axes_dim: tuple[int, int, int] | None = None
    """Rotary channels of (index, row, column), for a single file whose heads are not 128 wide."""

    def run(self) -> list[str]:
        return convert_flux(self.src, self.dst, self.dtype, self.axes_dim)


@dataclass(frozen=True)
class SD3:
    """Stable Diffusion 3 or 3.5 to a pipeline folder: all of the models that are there, sampler.

    A transformer alone gives a bare model folder.
    """

    src: Path
    """diffusers' pipeline folder (transformer/, vae/, ...), a transformer folder, or a single file
    of Stability AI or ComfyUI (sd3.5_medium.safetensors), with or without autoencoder and text
    encoders."""
    dst: Path
    """The folder to make; must be new or empty."""
    dtype: Dtype | None = None
    """What to store parameters in; by default as they are, and bfloat16 for float8."""

    def run(self) -> list[str]:
        return convert_sd3(self.src, self.dst, self.dtype)


@dataclass(frozen=True)
class T5:
    """A T5 v1.1 encoder from a transformers folder or a single file to a model folder."""

    src: Path
    """The folder with config.json and the safetensors, or the weights alone (`t5xxl_fp16
    .safetensors`): without a config.json the sizes are read from them."""
    dst: Path
    """The folder to make; must be new or empty."""
    dtype: Dtype | None = None
    """What to store parameters in; by default as they are, and bfloat16 for float8."""

    def run(self) -> list[str]:
        return convert_model(t5, self.src, self.dst, self.dtype)


@dataclass(frozen=True)
class CLIP:
    """A CLIP text encoder from a transformers folder or a single file to a model folder."""

    src: Path
    """The folder with config.json and the safetensors, or the weights alone (`clip_l.safetensors`,
    `clip_g.safetensors`): without a config.json the sizes are read from them."""
    dst: Path
    """The folder to make; must be new or empty."""
    dtype: Dtype | None = None
    """What to store parameters in; by default as they are, and bfloat16 for float8."""
    num_heads: int | None = None
    """Attention heads, for weights alone that are neither CLIP-L nor CLIP-bigG."""
    activation: Activation | None = None
    """quick_gelu for OpenAI's models, gelu for OpenCLIP's; for the same weights."""

    def run(self) -> list[str]:
        read = partial(clip, num_heads=self.num_heads, activation=self.activation)
        return convert_model(read, self.src, self.dst, self.dtype)


@dataclass(frozen=True)
class VAE:
    """FLUX's or SD3's autoencoder from a diffusers folder or a single file to a model folder."""

    src: Path
    """The folder with config.json and the safetensors, or a file in the original's layout
    (ae.safetensors, or a whole checkpoint of Stability)."""
    dst: Path
    """The folder to make; must be new or empty."""
    dtype: Dtype | None = None
    """What to store parameters in; by default as they are, and bfloat16 for float8."""

    latents: Latents | None = None
    """Whose scale and shift the latents have, for a file that does not say."""

    def run(self) -> list[str]:
        return convert_model(partial(vae, latents=self.latents), self.src, self.dst, self.dtype)


@dataclass(frozen=True)
class TinyVAE:
    """TAEF1 or TAESD3 from its two published files to a model folder."""

    src: Path
    """DIR/taef1 for DIR/taef1_encoder.safetensors and DIR/taef1_decoder.safetensors, or DIR if it
    has one such pair."""
    dst: Path
    """The folder to make; must be new or empty."""
    dtype: Dtype | None = None
    """What to store parameters in; by default as they are, and bfloat16 for float8."""

    def run(self) -> list[str]:
        return convert_model(tiny_vae, self.src, self.dst, self.dtype)


@dataclass(frozen=True)
class LoRA:
    """A LoRA file of FLUX or Stable Diffusion 3 from one layout to another.

    What SRC is in is recognised: PEFT or diffusers, kohya (lora_unet_, lora_transformer_), ComfyUI,
    Black Forest Labs, fal, XLabs, or our own. Text encoders' factors are left out, and named.
    """

    src: Path
    """The safetensors file to read, or the folder with it (PEFT's `adapter_model.safetensors`)."""
    dst: Path
    """The safetensors file to make; must not exist."""
    to: Layout
    """peft: a tensor per layer under diffusers' names (`transformer.transformer_blocks.0.attn.to_q
    .lora_A.weight`), read by diffusers and PEFT. kohya: `lora_unet_double_blocks_0_img_attn_qkv
    .lora_down.weight`, read by ComfyUI and most others. native: our names, all layers of a kind in
    one array (`double_blocks.img.qkv.q.lora_a`). Alpha is folded into the factors in all."""
    model: For | None = None
    """What it was trained for; by default what its names and widths are of, else FLUX. Our names
    differ from one Stable Diffusion 3 to another, so that from and to native it must be known which
    it is: it is asked for where the widths do not tell."""

    def run(self) -> list[str]:
        return convert_lora(self.src, self.dst, self.to, self.model)


@dataclass(frozen=True)
class Export:
    """A converted or trained FLUX, Stable Diffusion 3 or autoencoder to what others read.

    Of a pipeline folder all of these that it has; LoRA factors have files of their own.
    """

    src: Path
    """The model folder, or the pipeline folder."""
    dst: Path
    """The folder to make, new or empty; with --to original the safetensors file."""
    to: ExportLayout = "diffusers"
    """diffusers: a folder with config.json that `from_pretrained` reads. original: one file in the
    names of Black Forest Labs or Stability AI, which ComfyUI reads."""
    dtype: Dtype | None = None
    """What to store tensors in; by default as they are."""
    shard_gb: float = 10.0
    """Longest file of a folder in GB; what is longer becomes several with an index."""

    def run(self) -> list[str]:
        if not self.shard_gb > 0:
            raise UserError(f"--shard-gb is {self.shard_gb}; it must be above 0")
        return export(self.src, self.dst, self.to, self.dtype, int(self.shard_gb * 1e9))


@dataclass(frozen=True)
class Inspect:
    """Says what a file or folder is: layout, model, config, dtype, size; of a LoRA its targets."""

    path: Path = field(metadata=POSITIONAL)
    """A safetensors file, or a folder of a model or a pipeline, converted or not."""

    def run(self) -> list[str]:
        return inspect(self.path)


@dataclass(frozen=True)
class Verify:
    """Compares a converted model or pipeline folder with its source, tensor by tensor."""

    src: Path
    """What was converted."""
    dst: Path
    """What was made of it."""

    def run(self) -> list[str]:
        return verify(self.src, self.dst)


COMMANDS = {
    "flux": Flux,
    "sd3": SD3,
    "t5": T5,
    "clip": CLIP,
    "vae": VAE,
    "tiny_vae": TinyVAE,
    "lora": LoRA,
    "export": Export,
    "inspect": Inspect,
    "verify": Verify,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and prints what was made or found.

    What is wrong prints one line, `error: ...`, on stderr, nothing written: with status 2 for a
    command line that is not understood, with status 1 for bad input and for a checkpoint that is
    not what its source is.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        command = parse(words, COMMANDS, prog="python -m convert", about=__doc__ or "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    try:
        made = command.run()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; nothing was written")
    say(made)
