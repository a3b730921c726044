"""What a run is: frozen dataclasses, validated when they are made.

A preset (`configs/NAME.py`) is a value of these, and the command line changes it field by field
(`parse_cli`). Everything a run depends on stands here, and every field is read by something.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Float
from optax.contrib import MuonDimensionNumbers, muon

from taca_jax.cli import parse_cli
from taca_jax.data.config import DataConfig
from taca_jax.errors import UserError
from taca_jax.fields import difference, from_json, to_json
from taca_jax.lora import LoRAConfig
from taca_jax.losses import TimestepSampling
from taca_jax.models.flux import FluxConfig
from taca_jax.models.low_bit import Quantization
from taca_jax.models.pixels import PixelsConfig
from taca_jax.models.stack import Remat
from taca_jax.models.t5 import T5Config
from taca_jax.models.tiles import Tiling
from taca_jax.sampling import MAX_SEED
from taca_jax.sharding import MeshConfig
from taca_jax.taca import TacaConfig

__all__ = [
    "DataConfig",
    "EvalConfig",
    "GenerateConfig",
    "LoRAConfig",
    "MeshConfig",
    "OptimizerConfig",
    "TacaConfig",
    "TextConfig",
    "TrainConfig",
    "difference",
    "from_json",
    "parse_cli",
    "to_json",
]


def _check(right: bool, name: str, value: Any, allowed: str) -> None:
    """Raises UserError unless `right`; NaN is never right where comparisons say so."""
    if not right:
        raise UserError(f"{name} is {value}; it must be {allowed}")


@dataclass(frozen=True)
class TextConfig:
    """How captions become the transformer's text.

    tokenizer: `shapes` (the words of the shapes data), `bytes` (UTF-8), or a Hugging Face
      tokenizer: the path of a folder, or a hub id.
    length: tokens per caption; longer captions are cut, shorter ones padded.
    encoder: the text encoder's shape when it is trained from scratch with the model; none takes
      the base's `text_encoder/`.
    """

    tokenizer: str = "bytes"
    length: int = 64
    encoder: T5Config | None = None

    def __post_init__(self):
        _check(bool(self.tokenizer), "text.tokenizer", "empty", "shapes, bytes or a folder")
        _check(self.length >= 1, "text.length", self.length, "1 or more tokens")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW or Muon, with warm-up and clipping by global norm.

    kind: `adamw`, or `muon` (Jordan et al. 2024), which trains from scratch in fewer steps: kernels
      between hidden states move along their orthogonalised momentum, at a root mean square of about
      1, as Adam's first step has, so that one learning rate serves all; the kernels of img_in, of
      modulations and of the output, and all that is no kernel, by AdamW with Nesterov's momentum.
    learning_rate: the highest, reached after warm-up.
    warmup_steps: optimizer steps of linear rise.
    schedule: after warm-up, `constant`, or `cosine` down to 0 at the last step.
    weight_decay: decoupled, on matrices (kernels, LoRA factors, embeddings) only; of muon, on the
      kernels that it orthogonalises only.
    b1, b2: decay of Adam's first and second moment.
    muon_beta: decay of Muon's momentum; for kind=muon only.
    clip_norm: longest gradient, over all trained parameters; none never clips.
    ema_decay: decay of the moving average of the trained parameters that is sampled, scored and
      exported; 0 takes the parameters themselves.
    """

    kind: Literal["adamw", "muon"] = "adamw"
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    muon_beta: float = 0.95
    clip_norm: float | None = 1.0
    ema_decay: float = 0.0

    def __post_init__(self):
        rate, decay, clip = self.learning_rate, self.weight_decay, self.clip_norm
        _check(0 < rate < math.inf, "optimizer.learning_rate", rate, "positive")
        _check(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "0 or more")
        _check(0 <= decay < math.inf, "optimizer.weight_decay", decay, "0 or more")
        decays = {
            "b1": self.b1,
            "b2": self.b2,
            "muon_beta": self.muon_beta,
            "ema_decay": self.ema_decay,
        }
        for name, value in decays.items():
            _check(0 <= value < 1, f"optimizer.{name}", value, "at least 0 and below 1")
        _check(clip is None or clip > 0, "optimizer.clip_norm", clip, "positive, or none")
        if self.kind != "muon" and self.muon_beta != OptimizerConfig.muon_beta:
            raise UserError(
                f"optimizer.muon_beta is {self.muon_beta}, which optimizer.kind={self.kind} has no "
                "use for; leave it out, or set optimizer.kind=muon"
            )

    def make(self, total_steps: int) -> optax.GradientTransformation:
        """The optax object for a run of `total_steps` optimizer steps."""
        clip = (
            optax.identity()
            if self.clip_norm is None
            else optax.clip_by_global_norm(self.clip_norm)
        )

        def rate(count: ArrayLike) -> Float[Array, ""]:
            return self.learning_rate_at(count, total_steps)

        if self.kind == "muon":
            update = muon(
                rate,
                beta=self.muon_beta,
                weight_decay=self.weight_decay,
                adam_b1=self.b1,
                adam_b2=self.b2,
                consistent_rms=1.0,
                muon_weight_dimension_numbers=_muon_axes,
            )
        else:
            update = optax.adamw(
                rate, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay, mask=_is_matrix
            )
        return optax.chain(clip, update)

    def learning_rate_at(self, count: ArrayLike, total_steps: int) -> Float[Array, ""]:
        """The learning rate of the update that follows `count` updates, float32, traceable.

        Warm-up starts above 0, so that no step is spent for nothing.
        """
        count = jnp.asarray(count, jnp.float32)
        warm = jnp.minimum(1.0, (count + 1) / max(self.warmup_steps, 1))
        if self.schedule == "constant":
            return self.learning_rate * warm
        progress = (count - self.warmup_steps) / max(total_steps - self.warmup_steps, 1)
        return self.learning_rate * warm * 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1)))


def _muon_axes(params: Any) -> Any:
    """For each parameter the axes of its matrices, or None where AdamW updates it.

    Muon is for matrices between hidden states. Its author leaves a model's first and last layer to
    Adam; so do we, and the layers that make all modulations of one vector per picture.
    """
    not_hidden = {"img_in", "mod", "final_mod", "final_out"}

    def axes(path: tuple[Any, ...], param: jax.Array) -> MuonDimensionNumbers | None:
        names = {jax.tree_util.keystr((key,), simple=True) for key in path}
        if "kernel" not in names or names & not_hidden:
            return None
        # Any axis before these two is that of a stack's layers.
        return MuonDimensionNumbers(reduction_axis=param.ndim - 2, output_axis=param.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _is_matrix(params: Any) -> Any:
    """The tree of booleans that says which parameters weight decay acts on.

    By name, not by rank: stacked blocks give biases and norms a leading layer axis.
    """
    names = {"kernel", "lora_a", "lora_b", "embedding"}

    def decays(path: tuple[Any, ...], _: Any) -> bool:
        return not names.isdisjoint(jax.tree_util.keystr((key,), simple=True) for key in path)

    return jax.tree_util.tree_map_with_path(decays, params)


@dataclass(frozen=True)
class EvalConfig:
    """The measurement at the end of a training run on shapes.

    prompts: held-out prompts per category.
    steps: sampling steps per picture.
    guidance: strength of classifier-free guidance; 1 is none.
    batch_size: pictures sampled at a time.
    """

    prompts: int = 100
    steps: int = 20
    guidance: float = 1.0
    batch_size: int = 50

    def __post_init__(self):
        _check(self.prompts >= 1, "evaluate.prompts", self.prompts, "1 or more per category")
        _check(self.steps >= 1, "evaluate.steps", self.steps, "1 or more")
        _check(self.guidance >= 0, "evaluate.guidance", self.guidance, "0 or more")
        _check(self.batch_size >= 1, "evaluate.batch_size", self.batch_size, "1 or more")


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Without `lora` every parameter trains, else the LoRA alone.

    name: of the run; its folder is called so.
    steps: optimizer steps.
    base: the model folder to start from (`transformer/`, `text_encoder/`, ...); none starts `model`
      from random numbers.
    model: the transformer's shape when there is no base.
    lora: the adapter to train; none trains everything.
    quantize: what the transformer's kernels are kept in under a LoRA: `int8`, `nf4` (4 bits), or
      none, which is dtype.
    quantize_text: the same of T5.
    text: captions to text tokens.
    autoencoder: `pixels` trains a new model on the pictures themselves and a base on what it was
      made with; a path trains on the latents of that folder's autoencoder.
    pixels: how a new model on pixels normalises them.
    taca: with it, training draws timesteps where TACA is active, and applies it (the paper's
      equations 11-13); none trains plainly over all timesteps.
    data: pictures and captions.
    mesh: how several devices share the work.
    optimizer: how gradients become updates.
    grad_accumulation: forward passes, of data.batch_size samples each, per optimizer step.
    dtype: of activations; parameters, softmax and loss are float32.
    remat: `full` computes activations again in the backward pass, block by block, to save memory.
    timestep_sampling: `uniform`, or `logit_normal` (more in the middle), before any truncation.
    timestep_shift: above 1 draws more noise: SD3's and FLUX's shift of times, in training.
    guidance: the guidance scale shown to models that embed one; others do without.
    log_every: optimizer steps between two lines of metrics.
    save_every: optimizer steps between two checkpoints; the last step is always saved.
    keep_checkpoints: how many checkpoints stay.
    sample_every: optimizer steps between two grids of samples; 0 draws none.
    sample_prompts: the prompts of those grids.
    seed: decides parameters, noise and timesteps.
    out_dir: the run's folder; none is runs/NAME.
    plan: a slice of TPUs (v5e-16, v6e-8, v5p-8): compile the step for it and say what it takes,
      instead of training; no TPU is needed.
    resume: go on from the folder's newest good checkpoint; otherwise the folder must be new.
    evaluate: the table at the end; none makes none.
    """

    name: str
    steps: int
    base: str | None = None
    model: FluxConfig | None = None
    lora: LoRAConfig | None = None
    quantize: Quantization = "none"
    quantize_text: Quantization = "none"
    text: TextConfig = field(default_factory=TextConfig)
    autoencoder: str = "pixels"
    pixels: PixelsConfig = field(default_factory=PixelsConfig)
    taca: TacaConfig | None = None
    data: DataConfig = field(default_factory=DataConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grad_accumulation: int = 1
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Remat = "none"
    timestep_sampling: TimestepSampling = "logit_normal"
    timestep_shift: float = 1.0
    guidance: float = 1.0
    log_every: int = 10
    save_every: int = 500
    keep_checkpoints: int = 2
    sample_every: int = 0
    sample_prompts: tuple[str, ...] = ()
    seed: int = 0
    out_dir: str | None = None
    plan: str | None = None
    resume: bool = False
    evaluate: EvalConfig | None = None

    def __post_init__(self):
        plain = bool(self.name) and Path(self.name).name == self.name
        _check(plain, "name", self.name or "empty", "a plain folder name")
        positive = {
            "steps": self.steps,
            "grad_accumulation": self.grad_accumulation,
            "log_every": self.log_every,
            "save_every": self.save_every,
            "keep_checkpoints": self.keep_checkpoints,
        }
        for name, value in positive.items():
            _check(value >= 1, name, value, "1 or more")
        shift = self.timestep_shift
        _check(0 < shift < math.inf, "timestep_shift", shift, "a number above 0")
        _check(self.sample_every >= 0, "sample_every", self.sample_every, "0 (never) or more")
        _check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        _check(bool(self.autoencoder), "autoencoder", "empty", "pixels or a folder")
        local = "://" not in (self.out_dir or "")
        _check(local, "out_dir", self.out_dir, "a folder (for buckets see docs/launching.md)")
        warmup = self.optimizer.warmup_steps
        below = f"below steps={self.steps}; optimizer.warmup_steps=0 warms up none"
        _check(warmup < self.steps, "optimizer.warmup_steps", warmup, below)
        for source in self.data.source:
            shapes = source.partition(":")[2].partition("/")[0] == "shapes"
            if self.evaluate is not None and not shapes:
                raise UserError(
                    f"evaluate reads shapes back, and data.source is {source}; set evaluate=none"
                )
        if self.taca is not None:
            threshold = self.taca.threshold
            _check(threshold < 1000, "taca.threshold", threshold, "below 1000, to train above it")
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
        if self.base is None and self.lora is not None:
            raise UserError("lora adapts a trained model; give base=FOLDER, or lora=none")
        if self.base is None and self.text.encoder is None:
            raise UserError("without a base there is no text encoder; set text.encoder")
        if self.lora is not None and self.optimizer.kind != "adamw":
            raise UserError(
                f"optimizer.kind={self.optimizer.kind} is for the kernels of a whole model, of "
                "which lora trains none; set optimizer.kind=adamw, or lora=none"
            )
        if self.data.encode == "cache":
            if self.lora is None:
                raise UserError(
                    "data.encode=cache encodes captions once, and without a lora the text encoder "
                    "trains with the model; set lora.*, or data.encode=online"
                )
            if self.sample_every:
                raise UserError(
                    f"sample_every is {self.sample_every}, and data.encode=cache trains without "
                    "what samples are drawn with; set sample_every=0, or data.encode=online"
                )
        for name, to in {"quantize": self.quantize, "quantize_text": self.quantize_text}.items():
            if self.lora is None and to != "none":
                raise UserError(
                    f"{name}={to} is for a base that stays as it is, and lora=none trains it; give "
                    f"a lora, or {name}=none"
                )
        if self.sample_every and not self.sample_prompts:
            raise UserError(
                f"sample_every is {self.sample_every} without sample_prompts; give some"
            )

    @property
    def run_dir(self) -> Path:
        """Where the run writes."""
        return Path(self.out_dir or Path("runs") / self.name)

    @property
    def cache_dir(self) -> Path:
        """Where encoded examples are."""
        return Path(self.data.cache or self.run_dir / "cache")


@dataclass(frozen=True)
class GenerateConfig:
    """One call of generate.py; what is none is the model's own default.

    base: the model folder, or the name of a model that comes with the package.
    prompt: what to draw.
    negative_prompt: what to stay away from, under classifier-free guidance.
    lora: a LoRA file; none for the base alone.
    taca: TACA's strength and time; none draws plainly, without the LoRA too.
    steps: sampling steps.
    guidance: strength of guidance.
    height: of the picture, in pixels.
    width: of the picture, in pixels.
    num_images: pictures, from seeds seed, seed + 1, ... .
    seed: decides the noise.
    compare: draw the same noise plain, with TACA, and with TACA and LoRA, side by side.
    dtype: of parameters and activations.
    tiling: how large pictures are decoded in squares, to save memory; none never does.
    preview: a tiny autoencoder (TAEF1, TAESD3: a converted folder, or its two files) that draws
      beside `out`, after each step, what the picture is predicted to become; `own` is the model's
      own autoencoder, where that is small; none draws nothing.
    progress: a bar of the steps; none shows it on a terminal only.
    quantize: what the transformer's kernels are kept in: `int8`, `nf4` (4 bits), or none, which is
      dtype.
    quantize_text: the same of T5.
    out: the PNG to write (numbered for several pictures); its settings go into its metadata.
    """

    base: str
    prompt: str = ""
    negative_prompt: str | None = None
    lora: str | None = None
    taca: TacaConfig | None = field(default_factory=TacaConfig)
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    num_images: int = 1
    seed: int = 0
    compare: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tiling: Tiling | None = field(default_factory=Tiling)
    preview: str | None = None
    progress: bool | None = None
    quantize: Quantization = "none"
    quantize_text: Quantization = "none"
    out: str = "out.png"

    def __post_init__(self):
        counts = {"steps": self.steps, "num_images": self.num_images}
        for name, value in counts.items():
            _check(value is None or value >= 1, name, value, "1 or more")
        for name, value in {"height": self.height, "width": self.width}.items():
            _check(value is None or value >= 8, name, value, "8 or more pixels")
        guidance = self.guidance
        right = guidance is None or 0 <= guidance < math.inf
        _check(right, "guidance", guidance, "0 or more, or none")
        _check(0 <= self.seed <= MAX_SEED, "seed", self.seed, f"0 to {MAX_SEED}")
        _check(self.out.endswith(".png"), "out", self.out or "empty", "the name of a .png file")
        if self.compare and self.taca is None:
            raise UserError("compare=true compares plain with TACA; leave taca on (not taca=none)")
