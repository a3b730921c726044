"""The models of a run: checked against each other by their configs first, and loaded later.

`open_models` reads configs only and is called once; everything that a run needs to know about its
base is in the RunModels that it returns. Planning makes abstract models of them instead.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from taca_jax.autoencoders.kinds import Autoencoder, AutoencoderConfig
from taca_jax.autoencoders.pixels import PixelsConfig
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.flops import forward_flops, further_flops
from taca_jax.formats.lora.factors import fill_adapter
from taca_jax.nn.fusion import gathers_meanwhile
from taca_jax.nn.kinds import kind_of
from taca_jax.nn.layers import LoRAParam
from taca_jax.nn.lora import AttachedLoRA, add_lora
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.batches import samples_together
from taca_jax.parallel.chips import chip_of
from taca_jax.parallel.choice import choose_mesh
from taca_jax.parallel.mesh import MeshConfig, check_heads, make_mesh
from taca_jax.pipelines.pipeline import Pipeline
from taca_jax.pipelines.text import encoder_options, load_text
from taca_jax.sampling.schedule import FlowSchedule
from taca_jax.taca import TacaConfig
from taca_jax.text.config import TextConfig
from taca_jax.text.encoders import TextEncoder, TextReading, token_count
from taca_jax.text.tokenizers import Tokenizer, load_tokenizer
from taca_jax.training.config import TrainConfig
from taca_jax.training.features import LABELS, Readout
from taca_jax.training.learned_gamma import LearnedGamma
from taca_jax.training.lora_start import open_start
from taca_jax.training.remat import choose_remat
from taca_jax.training.sizes import check_sizes
from taca_jax.weights.abstract import abstract_on_mesh, local_bytes
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.lora_files import LoRAFile
from taca_jax.weights.pipeline_folders import (
    AUTOENCODER,
    TRANSFORMER,
    PipelineSettings,
    StoredModel,
    StoredPipeline,
    open_autoencoder,
    open_or_published,
    open_pipeline,
)

DEFAULT_STEPS, DEFAULT_GUIDANCE = 20, 1.0
"""Of a new model's calls: sampling steps, and no guidance unless an evaluation finds it better."""

OPTIMIZER_COPIES = 4
"""Arrays of the trained parameters' size, at most: gradient, two moments, moving average."""

PIXELS = "pixels"
"""The value of config.autoencoder that means no autoencoder, or the base's own."""


class TextToImage(nnx.Module):
    """The models that training may change: the transformer and, from scratch, the text encoder and
    the read-out of supervised features; or, beside a LoRA, gamma(t)."""

    def __init__(
        self,
        transformer: Any,
        text_encoder: TextEncoder | None,
        readout: Readout | None = None,
        gamma: LearnedGamma | None = None,
    ):
        """`text_encoder` is None if batches come encoded, `readout` without config.features and
        `gamma` without config.gamma_knots."""
        self.transformer = transformer
        self.text_encoder = text_encoder
        self.readout = readout
        self.gamma = gamma

    def taca(self, config: TrainConfig) -> TacaConfig | None:
        """TACA as the model was trained: with what it has learnt of gamma."""
        return config.taca if self.gamma is None else self.gamma.learned()


@dataclass(frozen=True)
class InputModels:
    """The models that turn pictures and captions into a transformer's inputs."""

    text_encoder: TextEncoder
    tokenizer: Tokenizer
    autoencoder: Autoencoder


@dataclass(frozen=True)
class RunModels:
    """The models of a run, which fit together; none of them is loaded yet.

    reading: how captions are read. autoencoder: its config. start: the LoRA file to start from, if
    any. mesh: the devices to load them on; None is the first device. remat: what the transformer's
    backward pass recomputes; with config.remat=auto that is settled by the mesh.
    """

    config: TrainConfig
    stored: StoredPipeline
    family: Family
    reading: TextReading
    autoencoder: AutoencoderConfig
    start: LoRAFile | None = None
    mesh: Mesh | None = None
    remat: Remat = "full"

    def on_mesh(self, mesh: Mesh | None) -> "RunModels":
        """The same models, to be loaded on a mesh.

        Raises UserError unless samples and heads divide evenly over the devices.
        """
        groups = 1 if mesh is None else samples_together(mesh)
        batch_size = self.config.data.batch_size
        if batch_size % groups:
            raise UserError(
                f"data.batch_size is {batch_size}, which {groups} groups of devices (mesh.data x "
                f"mesh.fsdp) share; give a multiple of {groups}, or share tokens or heads as well "
                "(mesh.context, mesh.tensor)"
            )
        check_heads(mesh, self.transformer.num_heads)
        return replace(self, mesh=mesh, remat=choose_remat(self, mesh))

    def choose_mesh(self, devices: Sequence[Any]) -> Mesh:
        """The mesh of the run on `devices`: that of `parallel.choice`; but where it would replicate
        parameters that could be gathered while the devices work, and shared ones leave room to
        recompute less, they are shared.

        Raises UserError as `make_mesh` and `on_mesh` do.
        """
        mesh = choose_mesh(self.config.mesh, devices, self.parameter_bytes)
        shared = make_mesh(self.config.mesh, devices)
        if mesh == shared or not gathers_meanwhile(chip_of(devices[0].device_kind)):
            return mesh
        order = get_args(Remat)  # from what recomputes least
        if order.index(self.on_mesh(shared).remat) < order.index(self.on_mesh(mesh).remat):
            return shared
        return mesh

    @property
    def transformer(self) -> Any:
        """The transformer's config."""
        return self.stored.transformer.config

    @property
    def multiple(self) -> int:
        """The side of an image token in pixels; the sizes of pictures are multiples of it."""
        return self.autoencoder.downscale * self.transformer.patch_size

    @property
    def token_ids(self) -> int:
        """The number of token ids of a caption, for all text encoders together."""
        length = self.stored.settings.text_length
        configs = (self.stored.models[folder].config for folder in self.reading.folders)
        return sum(token_count(config, length) for config in configs)

    @property
    def tokens(self) -> Mapping[str, int]:
        """The numbers of image and text tokens of a sample; the image is a square."""
        side = self.config.data.resolution // self.multiple
        return {"image": side * side, "text": self.reading.tokens}

    @property
    def labels(self) -> tuple[int, int, int] | None:
        """The rows, columns and labels of each of a picture's image tokens, which is a square; None
        if the run supervises no features."""
        if self.config.features is None:
            return None
        side = self.config.data.resolution // self.multiple
        return side, side, LABELS

    @property
    def step_flops(self) -> float:
        """FLOPs of the transformer in one optimizer step, over all devices.

        The forward pass, the gradients of activations and, if all parameters are trained, the
        gradients of weights take the same number each, as others count too. `further_flops` and
        LoRA factors are left out.
        """
        times = 2 if self.config.adapts else 3
        return forward_flops(self.transformer, **self.tokens) * times * self.step_samples

    @property
    def further_flops(self) -> float:
        """FLOPs that the step's program does beyond those (`families.flops.further_flops`)."""
        further = further_flops(
            self.transformer, self.remat, all_trained=not self.config.adapts, **self.tokens
        )
        return further * self.step_samples

    @property
    def step_samples(self) -> int:
        """The samples of an optimizer step, over all devices."""
        return self.config.data.batch_size * self.config.grad_accumulation

    def load_transformer(self) -> Any:
        """The transformer, with LoRA factors as they begin if the run trains them."""
        transformer = self.stored.transformer.load(self._transformer_options)
        self._add_lora(transformer)
        if self.start is not None:
            fill_adapter(self.start.adapter, transformer)
        return transformer

    def load_inputs(self) -> InputModels:
        """The text encoder, its tokenizer and the autoencoder.

        Raises UserError if one of them is damaged, or a tokenizer is missing.
        """
        text_encoder, tokenizer = load_text(self.stored, self.reading, self.text_options)
        return InputModels(text_encoder, tokenizer, self.load_autoencoder())

    def load_autoencoder(self) -> Autoencoder:
        """The autoencoder. Raises UserError if it is damaged."""
        return self.stored.models[AUTOENCODER].load(self._options(trained=False))

    def new_readout(self) -> Readout | None:
        """The read-out of supervised features, untrained; None if the run supervises none."""
        if self.config.features is None:
            return None
        return Readout(self.transformer.hidden, rngs=nnx.Rngs(self.config.seed))

    def new_gamma(self) -> LearnedGamma | None:
        """gamma(t) as the configuration begins; None if the run does not learn it."""
        if self.config.gamma_knots is None or self.config.taca is None:
            return None
        return LearnedGamma(self.config.taca, self.config.gamma_knots)

    def pipeline(self, model: TextToImage, inputs: InputModels | Autoencoder) -> Pipeline:
        """A pipeline that samples with `model`, whose text encoder may be that of `inputs`.

        With the autoencoder alone it draws of embeddings.
        """
        whole = isinstance(inputs, InputModels)
        text_encoder = model.text_encoder
        if text_encoder is None and whole:
            text_encoder = inputs.text_encoder
        return Pipeline(
            model.transformer,
            text_encoder=text_encoder,
            tokenizer=inputs.tokenizer if whole else None,
            autoencoder=inputs.autoencoder if whole else inputs,
            settings=self.stored.settings,
            mesh=self.mesh,
            loras=() if self.config.lora is None else (self.lora,),
        )

    @property
    def lora(self) -> AttachedLoRA:
        """How the LoRA that is trained acts: with TACA if it is trained under TACA."""
        return AttachedLoRA(self.config.name, 1.0, "always" if self.config.taca is None else "taca")

    def abstract(self) -> tuple[TextToImage, Any]:
        """The model to train and its autoencoder, as abstract models on the mesh."""
        configs = [self.stored.models[folder].config for folder in self.reading.folders]
        encoders = [
            abstract_on_mesh(config, encoder_options(config, self.text_options))
            for config in configs
        ]
        autoencoder = abstract_on_mesh(self.autoencoder, self._options(trained=False))
        readout, gamma = nnx.eval_shape(self.new_readout), nnx.eval_shape(self.new_gamma)
        text_encoder = self.reading.join(encoders, 0)
        transformer = self.abstract_transformer()
        return TextToImage(transformer, text_encoder, readout, gamma), autoencoder

    def abstract_transformer(self) -> Any:
        """The transformer, with LoRA factors if the run trains them, as an abstract model."""
        return abstract_on_mesh(self.transformer, self._transformer_options, self._add_lora)

    def parameter_bytes(self, device: Any) -> int:
        """The most bytes that parameters, gradients and optimizer state need on a single `device`
        at a time."""
        return replace(self, mesh=make_mesh(MeshConfig(), [device])).step_bytes()

    def step_bytes(self) -> int:
        """The same on each device of the mesh."""
        model, autoencoder = self.abstract()
        transformer = local_bytes(nnx.state(model.transformer))
        encoders = local_bytes(nnx.state([model.text_encoder, autoencoder]))
        trained = nnx.state(model, LoRAParam if self.config.adapts else nnx.Param)
        stepping = transformer + OPTIMIZER_COPIES * local_bytes(trained)
        if self.config.data.encode == "cache":  # all is encoded before the transformer is loaded
            return max(stepping, encoders)
        return stepping + encoders

    def _add_lora(self, transformer: Any) -> None:
        lora = self.config.lora
        if lora is not None:
            targets = self.family.lora.targets if lora.targets is None else lora.targets
            add_lora(transformer, lora, targets, rngs=nnx.Rngs(self.config.seed))

    @property
    def _transformer_options(self) -> LoadOptions:
        config = self.config
        return replace(
            self._options(trained=not config.adapts),
            quantize=config.quantize,
            remat=self.remat,
            attention=config.attention,
        )

    @property
    def text_options(self) -> LoadOptions:
        """How text encoders are loaded."""
        options = self._options(trained=not self.config.adapts)
        return replace(options, quantize=self.config.quantize_text)

    def _options(self, *, trained: bool) -> LoadOptions:
        """A frozen model may be kept in the activations' dtype; trained parameters are float32."""
        dtype = jnp.dtype(self.config.dtype)
        return LoadOptions(dtype, jnp.dtype(jnp.float32) if trained else dtype, self.mesh)


def open_models(config: TrainConfig, *, published: bool = False, begins: bool = True) -> RunModels:
    """The models of a run: those of its base, or new ones.

    begins: whether the run is at its first step; else a checkpoint holds what became of the LoRA
    that it started from, whose file may be gone.
    With `published`, a base that does not exist may be the name or hub id of a released model, to
    plan with, and nothing is fetched.
    Raises UserError for a base that is missing or lacks what training needs, and for models,
    pictures or settings that do not fit together.
    """
    if config.base is None:
        stored = _new_pipeline(config)
    else:
        if config.text != TextConfig():
            raise UserError(f"base={config.base} says how text is read; leave out text.*")
        if config.pixels != PixelsConfig():
            raise UserError(f"base={config.base} says how pixels are read; leave out pixels.*")
        if published:
            stored = open_or_published(config.base)
        else:
            stored = open_pipeline(config.base, config.tokenizers)
    if config.autoencoder != PIXELS:
        if config.pixels != PixelsConfig():
            raise UserError(
                f"autoencoder={config.autoencoder} says what latents are; leave out pixels.*"
            )
        given = open_autoencoder(config.autoencoder, stored.family.name, download=not published)
        stored = replace(stored, models={**stored.models, AUTOENCODER: given})
    family, reading = stored.family, stored.reading
    if config.features is not None and family.with_features is None:
        raise UserError(f"features of {family.title} cannot be supervised; set features=none")
    autoencoder = stored.models.get(AUTOENCODER)
    lacking = []
    if reading is None:
        lacking.append(f"text encoders ({family.text_encoders})")
    if autoencoder is None:
        lacking.append("an autoencoder (autoencoder=FOLDER)")
    if reading is None or autoencoder is None:
        raise UserError(f"base={config.base} lacks {' and '.join(lacking)}, which training needs")
    check_sizes(config, stored.transformer.config, autoencoder)
    start = open_start(config.lora, family, stored.transformer.config) if begins else None
    remat: Remat = "full" if config.remat == "auto" else config.remat
    return RunModels(config, stored, family, reading, autoencoder.config, start, remat=remat)


def _new_pipeline(config: TrainConfig) -> StoredPipeline:
    """Randomly initialised models, created when they are loaded."""
    if config.model is None or config.text.encoder is None:
        raise UserError("without a base, model and text.encoder say what is trained; set both")
    tokenizer = load_tokenizer(config.text.tokenizer, config.text.length)
    encoder = replace(config.text.encoder, vocab_size=tokenizer.vocab_size)
    if encoder.dim != config.model.txt_dim or encoder.dim != config.model.pooled_dim:
        raise UserError(
            f"text.encoder.dim is {encoder.dim}; model.txt_dim {config.model.txt_dim} and "
            f"model.pooled_dim {config.model.pooled_dim} must equal it"
        )
    models = {TRANSFORMER: config.model, "text_encoder": encoder, AUTOENCODER: config.pixels}
    return StoredPipeline(
        where=Path(config.name),
        models={
            name: StoredModel(f"a new {name}", each, _initializer(each, config.seed + i))
            for i, (name, each) in enumerate(models.items())
        },
        settings=PipelineSettings(
            tokenizer=config.text.tokenizer,
            text_length=config.text.length,
            resolution=config.data.resolution,
            steps=DEFAULT_STEPS,
            guidance=DEFAULT_GUIDANCE,
            schedule=FlowSchedule(),
        ),
        tokenizers=Path(config.name),
    )


def _initializer(config: Any, seed: int) -> Callable[[LoadOptions], Any]:
    def make(options: LoadOptions) -> Any:
        kind = kind_of(config)
        extra = {"param_dtype": options.param_dtype} if kind.sharding else {}
        if kind.role == "transformer":
            extra |= {"remat": options.remat, "attention": options.attention}
        return kind.module(config, rngs=nnx.Rngs(seed), dtype=options.dtype, **extra)

    return make
