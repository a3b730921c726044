"""The configurations of sampling, and of `generate.py`."""

import math
from dataclasses import dataclass, field
from typing import Literal

from taca_jax.attention import Implementation
from taca_jax.autoencoders.tiling import Tiling
from taca_jax.config.fields import check
from taca_jax.errors import UserError
from taca_jax.nn.low_bit import Quantization
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.pipelines.lora_choice import LoRAChoice, parse_loras
from taca_jax.sampling.loop import MAX_SEED
from taca_jax.sampling.solvers import Sampler
from taca_jax.taca import TacaConfig


@dataclass(frozen=True)
class SamplingConfig:
    """How a model draws; steps, guidance, height and width default to the model's own.

    base: the model folder, the name of a model that comes with the package, original weights, one
      of these in a bucket (gs://BUCKET/FOLDER), or a model of the hub (owner/repo,
      owner/repo@revision, owner/repo:file).
    tokenizers: the folder, or the model of the hub, with the tokenizers of a base that has none.
    lora: LoRA files, or ones of a bucket or the hub, each with its strength and gate:
      `style.safetensors:0.8,own.safetensors@taca`. `@taca` acts while TACA does, `@always` at every
      step; without one, the file says which (if this project trained it), else always. None for the
      base alone.
    taca: TACA's strength and schedule; none is plain attention, and turns LoRAs off that act with
      TACA.
    steps: sampling steps.
    guidance: strength of guidance.
    height: of the picture, in pixels.
    width: of the picture, in pixels.
    seed: of the noise.
    dtype: of parameters and activations.
    quantize: the format of the transformer's kernels: `int8`, `nf4` (4 bits), or none, which is
      dtype.
    quantize_text: the same for T5's kernels.
    attention: the implementation of the joint attention: `auto` takes the fastest for the device.
    mesh: how many devices split samples, parameters, tokens and heads. Evaluations let every
      process draw a share of its own, on its own devices.

    Raises UserError for values out of range.
    """

    base: str
    tokenizers: str | None = None
    lora: str | None = None
    taca: TacaConfig | None = field(default_factory=TacaConfig)
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    quantize: Quantization = "none"
    quantize_text: Quantization = "none"
    attention: Implementation = "auto"
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def __post_init__(self):
        steps, guidance = self.steps, self.guidance
        check(steps is None or steps >= 1, "steps", steps, "1 or more")
        for name, value in {"height": self.height, "width": self.width}.items():
            check(value is None or value >= 8, name, value, "8 or more pixels")
        right = guidance is None or 0 <= guidance < math.inf
        check(right, "guidance", guidance, "0 or more, or none")
        check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        _ = self.lora_choices  # raises for a text that names none

    @property
    def lora_choices(self) -> tuple[LoRAChoice, ...]:
        """The LoRAs that `lora` names."""
        return () if self.lora is None else parse_loras(self.lora)


@dataclass(frozen=True)
class Variant:
    """One way of sampling a model: TACA's settings (None: plain attention), a factor of the LoRAs'
    strengths (one for all, or one for each), the strength of guidance (None: the model's own)."""

    name: str
    taca: TacaConfig | None
    lora_strength: float | tuple[float, ...]
    guidance: float | None = None


@dataclass(frozen=True)
class GenerateConfig(SamplingConfig):
    """One call of generate.py.

    Where `mesh` is left open, it is chosen for a batch of pictures: devices take different pictures
    as far as those divide evenly, and share each of them otherwise.

    prompt: what to draw.
    prompts: a file of prompts instead, one in each line; in a .jsonl file each line is
      `{"prompt": ..., "negative_prompt": ..., "seed": ..., "height": ..., "width": ..., "guidance":
      ...}`, where all but the prompt may be left out and are then as in the command. Started
      again, the command draws what is missing. Several processes draw a share each.
    negative_prompt: what to avoid, with classifier-free guidance.
    sampler: `euler`, `heun` (second order, two evaluations of the model a step), or `dpm++2m`
      (second order, one evaluation). TACA acts by the timestep of each evaluation.
    image: a picture to start from (PNG, JPEG or WebP): cropped around its centre to the aspect of
      height and width, resized to them, and mixed with noise.
    strength: how much noise, above 0 and at most 1, which leaves nothing of the image; only that
      share of the steps is taken, the last ones; none is 0.6. TACA acts by timestep as ever, so
      that with little noise it may not act at all.
    num_images: number of pictures, of each prompt; their seeds are seed, seed + 1, ... .
    batch_size: pictures that are drawn at a time, and written when they are ready; none takes as
      many as have 4,096 image tokens together (one picture of 1024 px), times the devices.
    stages: text encoders, transformer and autoencoder take turns in memory, so that pictures are
      decoded when all are drawn; none does so only where not all of them fit.
    compare: draw the same noise plainly, with TACA, and with TACA and its LoRA, side by side; those
      that are always on are on in all of them.
    tiling: how large pictures are decoded in overlapping tiles, to save memory; none decodes at
      once.
    preview: a tiny autoencoder (TAEF1, TAESD3: a folder, or one of a bucket or the hub) that draws
      the predicted picture after each step, into a file beside `out`; `own` is the model's own
      autoencoder, if that is small; none draws no previews.
    progress: a progress bar of the steps; none shows it on a terminal only.
    plan: a slice of TPUs (v6e-4): instead of drawing, compile for it and say how much memory each
      stage takes, and how long a step at least; needs neither TPU nor weights.
    out: the PNG to write, which may be in a bucket (numbered for several pictures); small ones are
      enlarged in it, and its settings are its metadata. With prompts=, picture 0 of line 12 is
      00012-000.png in the folder `out`, or NAME-00012-000.png if that is NAME.png.
    """

    prompt: str = ""
    prompts: str | None = None
    negative_prompt: str | None = None
    sampler: Sampler = "euler"
    image: str | None = None
    strength: float | None = None
    num_images: int = 1
    batch_size: int | None = None
    stages: bool | None = None
    compare: bool = False
    tiling: Tiling | None = field(default_factory=Tiling)
    preview: str | None = None
    progress: bool | None = None
    plan: str | None = None
    out: str = "out.png"

    def __post_init__(self):
        super().__post_init__()
        check(self.num_images >= 1, "num_images", self.num_images, "1 or more")
        size = self.batch_size
        check(size is None or size >= 1, "batch_size", size, "1 or more, or none")
        last = self.seed + self.num_images - 1
        check(last <= MAX_SEED, "seed + num_images - 1", last, f"at most {MAX_SEED}")
        if self.prompts is None:
            check(self.out.endswith(".png"), "out", self.out or "empty", "the name of a .png file")
        else:
            check(bool(self.out), "out", "empty", "a folder, or the name of a .png file")
            check(not self.prompt, "prompt", self.prompt, "left out with prompts=")
            check(self.plan is None, "plan", self.plan, "left out with prompts=: name one size")
        if self.strength is not None:
            check(self.image is not None, "strength", self.strength, "left out without image=")
            right = 0 < self.strength <= 1
            check(right, "strength", self.strength, "above 0 and at most 1, or none")
        alone = self.image is None or self.plan is None
        check(alone, "image", self.image, "left out with plan=")
        if self.compare and self.taca is None:
            raise UserError("compare=true compares plain with TACA; leave taca on (not taca=none)")
