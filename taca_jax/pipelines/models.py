"""What a pipeline consists of: its models, in memory or in turns, from and to files."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from taca_jax.attention import Implementation
from taca_jax.autoencoders.kinds import Autoencoder
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import family_of
from taca_jax.formats.atomic import whole_folder
from taca_jax.nn.lora import AttachedLoRA, remove_lora
from taca_jax.nn.low_bit import Quantization
from taca_jax.nn.stacking import Remat
from taca_jax.parallel.mesh import MeshConfig
from taca_jax.parallel.processes import is_first
from taca_jax.pipelines.lora_choice import LoRAChoice
from taca_jax.pipelines.loras import LoRAs, attach_loras, choices_of, detach_lora, without
from taca_jax.pipelines.opening import Opening
from taca_jax.pipelines.stages import Staged, present
from taca_jax.pipelines.text import encoders_by_folder, save_tokenizers
from taca_jax.storage.places import Place, place
from taca_jax.taca import Gate
from taca_jax.text.encoders import TextEncoder
from taca_jax.text.tokenizers import Tokenizer
from taca_jax.weights.folders import PIPELINE_FILE, save_model
from taca_jax.weights.loading import LoadOptions
from taca_jax.weights.pipeline_folders import (
    AUTOENCODER,
    TRANSFORMER,
    PipelineSettings,
    StoredPipeline,
    open_pipeline,
    write_settings,
)

Precision = Literal["float32", "bfloat16"]

ALL_DEVICES = MeshConfig()
"""The axes of the mesh, left open."""


class PipelineModels:
    """A transformer of any family with its text encoder, tokenizer and autoencoder."""

    reads: ClassVar[Family | None] = None
    """The family that `from_pretrained` accepts; None accepts all."""

    def __init__(
        self,
        transformer: Any,
        *,
        text_encoder: TextEncoder | Staged | None,
        tokenizer: Tokenizer | None,
        autoencoder: Autoencoder | Staged | None,
        settings: PipelineSettings,
        mesh: Mesh | None = None,
        loras: tuple[AttachedLoRA, ...] = (),
    ):
        """`loras` are those that are attached to the transformer."""
        self._transformer = transformer
        self._text_encoder = text_encoder
        self.tokenizer = tokenizer
        self._autoencoder = autoencoder
        self.settings = settings
        self.mesh = mesh
        self.loras = loras

    @property
    def transformer(self) -> Any:
        return present(self._transformer)

    @property
    def text_encoder(self) -> TextEncoder | None:
        return present(self._text_encoder)

    @text_encoder.setter
    def text_encoder(self, text_encoder: TextEncoder | None) -> None:
        self._text_encoder = text_encoder

    @property
    def autoencoder(self) -> Autoencoder | None:
        return present(self._autoencoder)

    @autoencoder.setter
    def autoencoder(self, autoencoder: Autoencoder | None) -> None:
        self._autoencoder = autoencoder

    @property
    def has_text_encoder(self) -> bool:
        return self._text_encoder is not None

    @property
    def autoencoder_config(self) -> Any:
        """The autoencoder's config; None if there is none."""
        return None if self._autoencoder is None else self._autoencoder.config

    @property
    def staged(self) -> bool:
        """Whether the models take turns in memory: each is read when it is needed."""
        return isinstance(self._transformer, Staged)

    @property
    def config(self) -> Any:
        """The transformer's config."""
        return self._transformer.config

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path | StoredPipeline,
        dtype: Precision = "bfloat16",
        *,
        param_dtype: Precision | None = None,
        mesh: Mesh | MeshConfig | None = ALL_DEVICES,
        devices: Sequence[Any] | None = None,
        stages: bool | None = None,
        samples: int | None = None,
        remat: Remat = "none",
        quantize: Quantization = "none",
        quantize_text: Quantization = "none",
        attention: Implementation = "auto",
        tokenizers: str | Path | None = None,
    ) -> Self:
        """Loads a pipeline folder: `pipeline.json`, `transformer/`, and where present the text
        encoders (`text_encoder/`, `text_encoder_2/`, ...) and `autoencoder/`.

        `path` may also be the name of a model that comes with the package (`shapes_base`),
        original weights that have not been converted (a diffusers pipeline folder, or single files
        in one folder: `open_original`), or the hub id of any of these (`hub.ids.FORMS`).
        `tokenizers` is the folder or hub id of the tokenizers where `path` has none.

        `dtype` is that of activations, and of parameters unless `param_dtype` is given. `remat`
        matters only to training. `quantize` is the format of the kernels in the transformer's
        blocks: `int8`, `nf4` or `none` (param_dtype); `quantize_text` is that of T5's kernels.
        Kernels are quantised as they are read. `attention` is the implementation of the joint
        attention.

        Parameters are loaded tensor by tensor onto `mesh`, on which the pipeline then runs: the
        devices along each axis (MeshConfig), a mesh, or None for the first device alone. By default
        all devices draw, those of other processes included, which then must make the same calls;
        `devices` are others that a MeshConfig is about, such as `jax.local_devices()`.
        Where the axes are left open they are chosen for drawing `samples` at a time, by default one
        picture (`parallel.choice`). With `stages` the models take turns in memory: each is read
        when it is needed, once another's memory is free. None does so where the size of the
        devices' memory is known, and not all models fit.

        Raises UserError if the pipeline or a part of it is missing, damaged, or of another kind of
        model, and for a mesh that does not fit.
        """
        stored = path if isinstance(path, StoredPipeline) else open_pipeline(path, tokenizers)
        family = stored.family
        if cls.reads not in (None, family):
            raise UserError(
                f"{stored.where} is of kind {family.name}; {cls.__name__} reads {cls.reads.name}"
            )
        options = LoadOptions(
            dtype=jnp.dtype(dtype),
            param_dtype=jnp.dtype(param_dtype or dtype),
            quantize=quantize,
            remat=remat,
            attention=attention,
        )
        opening = Opening(stored, options, quantize_text)
        devices = jax.devices() if devices is None else devices
        place = opening.place(mesh, devices, stages=stages, samples=samples)
        if isinstance(mesh, MeshConfig) and len(jax.devices()) == 1:
            place = replace(place, mesh=None)
        parts = opening.parts(place)
        return cls(
            parts.transformer,
            text_encoder=parts.text_encoder,
            tokenizer=parts.tokenizer,
            autoencoder=parts.autoencoder,
            settings=stored.settings,
            mesh=parts.mesh,
        )

    def save(self, path: str | Place, *, dtype: Precision | None = None) -> None:
        """Writes the folder that `from_pretrained` reads, atomically, without LoRA factors; an
        existing pipeline folder is replaced.

        If there are several processes, all must call this. Raises UserError if `path` holds
        something else or cannot be written, and for quantised models.
        """
        path = place(path)
        is_ours = (path / PIPELINE_FILE).is_file()
        if path.exists() and not is_ours and (path.is_file() or any(path.iterdir())):
            raise UserError(f"{path} exists and is no pipeline folder; save elsewhere")

        def save_each(models: Mapping[str, Any]) -> None:
            for name, model in models.items():
                if model is not None:
                    save_model(folder / name, model, dtype=dtype)

        with whole_folder(path, PIPELINE_FILE) if is_first() else nullcontext(path) as folder:
            # Nothing here holds a model any longer than it is its turn.
            save_each({TRANSFORMER: self.transformer})
            save_each(encoders_by_folder(self.text_encoder))
            save_each({AUTOENCODER: self.autoencoder})
            if is_first():
                assert isinstance(folder, Path)  # a local one, whatever `path` is
                settings = self.settings
                if save_tokenizers(folder, self.tokenizer):
                    settings = replace(settings, tokenizer=None)
                write_settings(folder, settings)

    def load_lora(self, lora: LoRAs, *, strength: float = 1.0, gate: Gate | None = None) -> str:
        """Attaches LoRA files to those that are attached, and returns a line about each.

        `lora` is a path, a text as `generate.py` takes it (`style.safetensors:0.8`, or the id of
        one on the hub), or several of them. `gate` says when they act: `always`, or with TACA
        (`taca`); None is as the file says, and always if it says nothing. A file that is attached
        already is replaced. Raises UserError, with nothing attached, for one that is damaged or
        made for another model.
        """
        choices = choices_of(lora, strength, gate)
        kept = self._transformer
        if isinstance(kept, Staged):
            attached, lines = self._attach_whenever_read(kept, self.loras, choices)
        else:
            attached, lines = attach_loras(kept, self.loras, choices, self.mesh)
        self.loras = attached
        return "\n".join(lines)

    def unload_lora(self, path: str | Path | None = None) -> None:
        """Removes the LoRA of a file, or all of them, if there are any."""
        kept = self._transformer
        if isinstance(kept, Staged):
            left = () if path is None else without(self.loras, path)
            self.loras, _ = self._attach_whenever_read(kept, left, [])
        elif path is not None:
            self.loras = detach_lora(kept, self.loras, path)
        else:
            remove_lora(kept)
            self.loras = ()

    def _attach_whenever_read(
        self, kept: Staged, attached: Sequence[AttachedLoRA], choices: Sequence[LoRAChoice]
    ) -> tuple[tuple[AttachedLoRA, ...], list[str]]:
        """Has the files that are attached and those that are chosen attached to a model whenever it
        has been read; returns as `attach_loras` does."""
        before = [LoRAChoice(lora.name, lora.strength, lora.gate) for lora in attached]

        def attach(model: Any) -> tuple[tuple[AttachedLoRA, ...], list[str]]:
            remove_lora(model)
            return attach_loras(model, (), [*before, *choices], self.mesh)

        loras, lines = kept.adapted(attach)
        return loras, lines[len(before) :]
