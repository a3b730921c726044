"""A pipeline's models as single files in one folder, and how they are told apart.

They lie side by side, or as ComfyUI keeps them: transformers in `unet/` or `diffusion_models/`,
text encoders in `clip/` or `text_encoders/`, autoencoders in `vae/`. None of their names matter,
except that of the autoencoder where a folder has several. Only headers are read here.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from taca_jax.autoencoders import vae_original
from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import families
from taca_jax.formats.tensor_files import TensorFiles, open_tensors
from taca_jax.weights.originals import (
    Original,
    bare_encoder,
    family_in,
    is_encoder,
    original_vae,
)

OF_TRANSFORMERS = ("unet", "diffusion_models")
PLACES = (*OF_TRANSFORMERS, "clip", "text_encoders", "vae")


@dataclass(frozen=True)
class LooseFiles:
    """The safetensors of a folder that are models without a config.json.

    transformers: with the family of each. unread: messages about files that cannot be read.
    """

    root: Path
    transformers: tuple[tuple[Family, TensorFiles], ...]
    autoencoders: tuple[TensorFiles, ...]
    encoders: tuple[TensorFiles, ...]
    unread: tuple[str, ...]

    @property
    def files(self) -> list[str]:
        """Of all models."""
        models = (*self.autoencoders, *self.encoders)
        return sorted([each.where for each in models] + [t.where for _, t in self.transformers])

    @property
    def has_pipeline(self) -> bool:
        """Whether a transformer is among them, or may be."""
        return bool(self.transformers or self.unread)

    def transformer(self, family: Family | None = None) -> Path:
        """The file of the only transformer, of any or of one family. Raises UserError if there is
        none, or several."""
        found = [each.where for own, each in self.transformers if family in (None, own)]
        if len(found) == 1:
            return Path(found[0])
        if found:
            raise UserError(f"{self.root} has several transformers: {', '.join(found)}; give one")
        known = ", ".join(each.title for each in ([family] if family else families()))
        unread = "".join(f"; {each}" for each in self.unread)
        raise UserError(
            f"{self.root} has no transformer that is known ({known}) among its .safetensors{unread}"
        )

    def autoencoder(self, family: Family, latent_channels: int) -> Original | None:
        """The autoencoder of a transformer: that with the family's file name, else the only one
        with as many latent channels. Raises UserError if there are several."""
        found = [original_vae(each, family) for each in self.autoencoders]
        fitting = [each for each in found if each.config.latent_channels == latent_channels]
        named = [e for e in fitting if Path(e.where).name == family.original.autoencoder_file]
        return self._only(named or fitting, "autoencoder") if fitting else None

    def text_encoders(self, family: Family, lacking: Collection[str]) -> dict[str, Original]:
        """The encoders that a family's models read and that are lacking, by our folder names.

        They are known by their kind and width. Of the same encoder in several precisions the finest
        is taken. Raises UserError if there are several of one.
        """
        encoders = [bare_encoder(each) for each in self.encoders]
        found = {}
        for folder, config in _published(family).items():
            same = [e for e in encoders if _looks(e) == (type(config), config.dim)]
            if folder in lacking and same:
                found[folder] = self._one_of(same, folder)
        left = [folder for folder in lacking if folder not in found]
        return found | self._of_other_widths(family, encoders, left)

    def _of_other_widths(
        self, family: Family, encoders: Sequence[Original], lacking: Sequence[str]
    ) -> dict[str, Original]:
        """Encoders of no released model's width, of small models: by kind, the narrowest first."""
        known = {(type(c), c.dim) for each in families() for c in _published(each).values()}
        left = [each for each in encoders if _looks(each) not in known]
        found = {}
        for folder, config in _published(family).items():
            dims = [e.config.dim for e in left if isinstance(e.config, type(config))]
            if folder in lacking and dims:
                same = [each for each in left if _looks(each) == (type(config), min(dims))]
                found[folder] = self._one_of(same, folder)
                left = [each for each in left if each not in same]
        return found

    def _one_of(self, same: Sequence[Original], name: str) -> Original:
        """The finest of several precisions: float8 and float16 are the same, once loaded."""
        finest = max(map(_width, same))
        return self._only([each for each in same if _width(each) == finest], name)

    def _only(self, found: Sequence[Original], name: str) -> Original:
        if len(found) > 1:
            files = ", ".join(each.where for each in found)
            raise UserError(f"{self.root} has several for {name}: {files}; keep one of them there")
        return found[0]


def root_of(file: Path) -> Path:
    """The folder of a transformer's file and of all that belongs to it."""
    return file.parent.parent if file.parent.name in OF_TRANSFORMERS else file.parent


def loose_files(root: Path) -> LooseFiles:
    """The models in a folder and in its folders that are ComfyUI's; what is no model, such as a
    LoRA, is left out."""
    transformers, autoencoders, encoders, unread = [], [], [], []
    for file in _files(root):
        try:
            tensors = open_tensors(file)
        except UserError as error:  # it may be of something else
            unread.append(str(error))
            continue
        if (found := family_in(tensors)) is not None:
            transformers.append((found[0], tensors))
        elif vae_original.is_autoencoder(tensors):
            autoencoders.append(tensors)
        elif is_encoder(tensors):
            encoders.append(tensors)
    return LooseFiles(
        root, tuple(transformers), tuple(autoencoders), tuple(encoders), tuple(unread)
    )


def _files(root: Path) -> Iterator[Path]:
    yield from sorted(root.glob("*.safetensors"))
    for place in PLACES:
        yield from sorted((root / place).rglob("*.safetensors"))


def _published(family: Family) -> Mapping[str, Any]:
    """The configs of the text encoders of a family's released models, by folder."""
    return {k: v for each in family.published.values() for k, v in each.text_encoders.items()}


def _looks(encoder: Original) -> tuple[type, int]:
    return type(encoder.config), encoder.config.dim


def _width(encoder: Original) -> int:
    """The most bytes of a number."""
    return max(np.dtype(each).itemsize for each in encoder.tensors.dtypes.values())
