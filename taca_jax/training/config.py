"""The configuration of a training run: a frozen dataclass, validated on construction.

A preset (`configs/NAME.py`) is an instance, and the command line overrides single fields
(`config.command_line`). A run depends on nothing else.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import taca_jax.families.registry  # noqa: F401 - registers the configs that `model` may have
from taca_jax.attention import Implementation
from taca_jax.autoencoders.pixels import PixelsConfig
from taca_jax.config.fields import check, show
from taca_jax.data.config import DataConfig, check_source
from taca_jax.errors import UserError
from taca_jax.evaluation.shapes.config import EvalConfig
from taca_jax.nn.kinds import TransformerConfig
from taca_jax.nn.lora import LoRAConfig
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.stacking import RematChoice
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.sampling.loop import MAX_SEED
from taca_jax.storage.places import Place, is_bucket_name, place
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.training.features import FeaturesConfig
from taca_jax.training.losses import TimestepSampling
from taca_jax.training.optimizer import OptimizerConfig


@dataclass(frozen=True)
class ValidationConfig:
    """How a run is measured on pictures that it never trains on.

    The loss is that of training, at noise and times that are always the same: the number is
    comparable from step to step, and between runs with the same validation, taca and model.

    every: optimizer steps between two measurements; the first is before the first step, and the
      last after the last one.
    pictures: how many. Without a source, so many pictures of data.source are held out of training,
      the same ones for any seed.
    timesteps: at how many times each picture is measured, spread evenly over those that are
      trained.
    source: where these pictures are instead, as in data.source; with data.encode=cache they are
      encoded first, into CACHE-validation.
    """

    every: int = 500
    pictures: int = 64
    timesteps: int = 4
    source: tuple[str, ...] = ()

    def __post_init__(self):
        if isinstance(self.source, str):
            object.__setattr__(self, "source", (self.source,))
        for name in ("every", "pictures", "timesteps"):
            value = getattr(self, name)
            check(value >= 1, f"validation.{name}", value, "1 or more")
        for source in self.source:
            check_source(source, "validation.source")


@dataclass(frozen=True)
class TrainConfig:
    """One training run: of all parameters, or with `lora` or `gamma_knots` of these only.

    name: of the run, and of its folder.
    steps: optimizer steps.
    base: the model to start from: its folder (`transformer/`, `text_encoder/`, ...), original
      weights, either of them in a bucket (gs://BUCKET/FOLDER), or a model of the hub (owner/repo,
      owner/repo@revision, owner/repo:file); none starts with a new `model`, randomly initialised.
    tokenizers: the folder, bucket's or model of the hub, with the tokenizers of a base that has
      none.
    model: the config of a new transformer, where there is no base.
    lora: the LoRA to train; none trains all parameters, unless gamma_knots are trained.
    quantize: the format of the frozen transformer's kernels under a LoRA: `int8`, `nf4` (4 bits),
      or none, which is dtype.
    quantize_text: the same for T5's kernels.
    text: the tokenizer and text encoder of a new model.
    autoencoder: `pixels` trains a new model on pixels, and a base with its own autoencoder; a path
      or hub id (owner/repo:vae) trains on the latents of the autoencoder there.
    pixels: how a new model on pixels normalises them.
    taca: draws the timesteps at which TACA is active, and applies it (the paper's equations 11-13);
      none trains over all timesteps with plain attention.
    gamma_knots: learns gamma(t) itself, as that many knots from taca.threshold to 1000 that begin
      as taca says, with the LoRA or alone; none leaves it as taca says.
    data: pictures and captions.
    validation: measures the loss on pictures that are not trained on; none measures nothing.
    features: what a new model's image tokens are to say of the picture; none trains it to denoise
      only.
    mesh: how several devices share the work.
    optimizer: the optimizer and its learning rate.
    grad_accumulation: forward passes, of data.batch_size samples each, per optimizer step.
    dtype: of activations and frozen parameters; trained ones, softmax and loss are float32.
    attention: the implementation of the joint attention: `auto` takes the fastest for the device.
    remat: what the backward pass recomputes of each block to save memory: none of it; all but its
      attention (`attention`), and the products that make queries, keys and values
      (`attention+qkv`), and those that the MLP begins with (`attention+qkv+mlp`); or all (`full`).
      `auto` recomputes as little as the devices' memory allows, and all where that is not known.
    timestep_sampling: `uniform`, or `logit_normal` (more in the middle), before any truncation.
    timestep_shift: above 1 draws noisier timesteps: SD3's and FLUX's shift, in training.
    guidance: the guidance scale given to models that embed one; others do not use it.
    log_every: optimizer steps between two lines of metrics.
    wandb: logs all numbers and samples to Weights & Biases too (pip install -e ".[wandb]"), whose
      own environment variables say where: WANDB_PROJECT, WANDB_MODE=offline. A resumed run goes on
      there.
    save_every: optimizer steps between two checkpoints, each with the LoRA of that step as a file
      in loras/; the last step is always saved.
    keep_checkpoints: how many checkpoints and such files are kept.
    sample_every: optimizer steps between two pictures of samples, of which one is drawn before the
      first step; 0 draws none. They show each prompt plain, with TACA and with the LoRA as trained
      so far, side by side, from the same noise.
    sample_prompts: the prompts of those samples.
    sample_height, sample_width: of each, in pixels; none is data.resolution.
    sample_steps: of sampling; none takes the model's own number.
    sample_guidance: the strength of guidance; none takes the model's own.
    seed: of parameters, noise and timesteps.
    out_dir: the run's folder, which may be in a bucket (gs://BUCKET/FOLDER); none is runs/NAME.
    plan: a slice of TPUs (v5e-16, v6e-8, v5p-8): instead of training, compile the step for it and
      print what it needs; no TPU is necessary.
    resume: continue from the folder's newest good checkpoint; otherwise the folder must be new.
    evaluate: the evaluation at the end; none skips it.
    """

    name: str
    steps: int
    base: str | None = None
    tokenizers: str | None = None
    model: TransformerConfig | None = None
    lora: LoRAConfig | None = None
    quantize: Quantization = "none"
    quantize_text: Quantization = "none"
    text: TextConfig = field(default_factory=TextConfig)
    autoencoder: str = "pixels"
    pixels: PixelsConfig = field(default_factory=PixelsConfig)
    taca: TacaConfig | None = None
    gamma_knots: int | None = None
    data: DataConfig = field(default_factory=DataConfig)
    validation: ValidationConfig | None = None
    features: FeaturesConfig | None = None
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grad_accumulation: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: Implementation = "auto"
    remat: RematChoice = "none"
    timestep_sampling: TimestepSampling = "logit_normal"
    timestep_shift: float = 1.0
    guidance: float = 1.0
    log_every: int = 10
    wandb: bool = False
    save_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    sample_height: int | None = None
    sample_width: int | None = None
    sample_steps: int | None = None
    sample_guidance: float | None = None
    seed: int = 0
    out_dir: str | None = None
    plan: str | None = None
    resume: bool = False
    evaluate: EvalConfig | None = None

    def __post_init__(self):
        plain = bool(self.name) and Path(self.name).name == self.name
        check(plain, "name", self.name or "empty", "a plain folder name")
        positive = {
            "steps": self.steps,
            "grad_accumulation": self.grad_accumulation,
            "log_every": self.log_every,
            "save_every": self.save_every,
            "keep_checkpoints": self.keep_checkpoints,
        }
        for name, value in positive.items():
            check(value >= 1, name, value, "1 or more")
        shift = self.timestep_shift
        check(0 < shift < math.inf, "timestep_shift", shift, "a number above 0")
        check(self.sample_every >= 0, "sample_every", self.sample_every, "0 (never) or more")
        for name in ("sample_height", "sample_width", "sample_steps"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "1 or more, or none")
        check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        check(bool(self.autoencoder), "autoencoder", "empty", "pixels or a folder")
        for key, folder in {"out_dir": self.out_dir, "data.cache": self.data.cache}.items():
            known = "://" not in (folder or "") or is_bucket_name(folder or "")
            check(known, key, folder, "a folder, or one in a bucket (gs://BUCKET/FOLDER)")
        decay = self.optimizer.decay_steps
        check(decay <= self.steps, "optimizer.decay_steps", decay, f"at most steps={self.steps}")
        if self.gamma_knots is not None:
            check(self.gamma_knots >= 2, "gamma_knots", self.gamma_knots, "2 or more, or none")
            if self.taca is None:
                raise UserError("gamma_knots begin as taca says, and taca is none; set taca.gamma")
        for source in self.data.source:
            kind, _, place = source.partition(":")
            shapes = re.split("[/#]", place)[0] == "shapes"
            if self.evaluate is not None and not shapes:
                raise UserError(
                    f"evaluate reads shapes back, and data.source is {source}; set evaluate=none"
                )
            if self.features is not None and not (shapes and kind == "generated"):
                raise UserError(
                    "features are supervised by the labels of generated:shapes, and data.source "
                    f"is {source}; set features=none"
                )
        if self.taca is not None:
            threshold = self.taca.threshold
            check(threshold < 1000, "taca.threshold", threshold, "below 1000, to train above it")
            if self.taca.first_steps is not None:
                raise UserError(
                    f"taca.first_steps is {self.taca.first_steps}, and training has no steps: it "
                    "draws times above taca.threshold; leave first_steps to generate.py"
                )
        if self.base is None and self.model is None:
            raise UserError(
                "base and model are both none; give base=FOLDER, or a preset with a model"
            )
        if self.base is not None and self.model is not None:
            raise UserError(
                f"base={self.base} says what the model is; leave model out (model=none)"
            )
        if self.base is None and self.tokenizers is not None:
            raise UserError(
                f"tokenizers={self.tokenizers} is for a base; a new model has text.tokenizer"
            )
        if self.base is None and self.adapts:
            key, verb = ("gamma_knots", "adapt") if self.lora is None else ("lora", "adapts")
            raise UserError(f"{key} {verb} a trained model; give base=FOLDER, or {key}=none")
        adapted = [name for name in ("lora", "gamma_knots") if getattr(self, name) is not None]
        keys = " and ".join(adapted)
        if self.features is not None and self.adapts:
            raise UserError(f"with {keys} a model's features stay as they are; set features=none")
        if self.teaches_text and (self.base is not None or self.text.tokenizer != "shapes"):
            raise UserError(
                "features.text_steps teach a new text encoder with text.tokenizer=shapes; this run "
                f"has base={show(self.base)} and text.tokenizer={self.text.tokenizer}: set "
                "features.text_steps=0"
            )
        if self.base is None and self.text.encoder is None:
            raise UserError("without a base there is no text encoder; set text.encoder")
        if self.adapts and self.optimizer.kind == "muon":
            raise UserError(
                "optimizer.kind=muon is for the kernels of a whole model, and "
                f"with {keys} none of them trains; set optimizer.kind=adamw, or "
                f"{' '.join(f'{name}=none' for name in adapted)}"
            )
        if self.data.encode == "cache" and not self.adapts:
            raise UserError(
                "data.encode=cache encodes captions once, and without a lora the text encoder "
                "trains with the model; set lora.*, or data.encode=online"
            )
        for name, to in {"quantize": self.quantize, "quantize_text": self.quantize_text}.items():
            if not self.adapts and to != "none":
                raise UserError(
                    f"{name}={to} is for a base that stays as it is, and lora=none trains it; give "
                    f"a lora, or {name}=none"
                )
        if self.sample_every and not self.sample_prompts:
            raise UserError(
                f"sample_every is {self.sample_every} without sample_prompts; give some"
            )

    @property
    def adapts(self) -> bool:
        """Whether the base stays as it is: only a LoRA, a gamma(t) or both are trained."""
        return self.lora is not None or self.gamma_knots is not None

    @property
    def teaches_text(self) -> bool:
        """Whether the text encoder is taught before the model, and then stays as it is."""
        return self.features is not None and self.features.text_steps > 0

    @property
    def run_dir(self) -> Place:
        """The folder in which the run writes."""
        return place(self.out_dir or Path("runs") / self.name)

    @property
    def cache_dir(self) -> Place:
        """The folder of encoded examples, with data.encode=cache."""
        return place(self.data.cache or self.run_dir / "cache")
