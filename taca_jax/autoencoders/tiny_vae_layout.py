"""TAESD-style autoencoders as they are published: one file each for encoder and decoder, or
diffusers' folder, which has both in one."""

import re
from pathlib import Path
from typing import Literal

from taca_jax.errors import UserError
from taca_jax.formats.key_table import Rule, Table, convolution
from taca_jax.formats.settings import read_settings
from taca_jax.formats.tensor_files import TensorFiles, joined, open_tensors

CLASS = "AutoencoderTiny"
"""`_class_name` in diffusers' config.json."""

NETS: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")


def _net(net: str) -> tuple[Rule, ...]:
    return (
        *convolution(f"{net}.{{i}}", f"{net}.layers.{{i}}"),
        *convolution(f"{net}.{{i}}.conv.{{j}}", f"{net}.layers.{{i}}.conv.layers.{{j}}"),
    )


TABLE = Table(
    "a tiny autoencoder as TAEF1 and TAESD3 are published", (*_net(NETS[0]), *_net(NETS[1]))
)


def open_taesd(path: Path) -> TensorFiles:
    """The pair of files whose names begin with `path`, or the only pair in the folder `path`, or
    diffusers' folder of both.

    `taef1` means `taef1_encoder.safetensors` and `taef1_decoder.safetensors`. Their keys get
    the prefixes `encoder.` and `decoder.`. Raises UserError if there is no pair, or more
    than one.
    """
    if not _has_pair(path) and _is_diffusers(path):
        return _as_pair(open_tensors(path))
    if path.is_dir():
        encoders = sorted(path.glob("*_encoder.safetensors"))
        stems = [encoder.name.removesuffix("_encoder.safetensors") for encoder in encoders]
        if len(stems) != 1:
            found = ", ".join(stems) or "none"
            raise UserError(
                f"{path} should have one pair NAME_encoder.safetensors, NAME_decoder.safetensors; "
                f"found {found}; give {path}/NAME, files are at huggingface.co/madebyollin"
            )
        path = path / stems[0]
    return joined(str(path), [(f"{net}.", open_tensors(file)) for net, file in _pair(path).items()])


def is_taesd(path: Path) -> bool:
    """Whether `open_taesd` is for it: two files, or a folder of theirs or of diffusers."""
    if path.is_dir():
        return _has_pair(path) or _is_diffusers(path)
    return not path.exists() and all(each.is_file() for each in _pair(path).values())


def _has_pair(folder: Path) -> bool:
    return any(folder.glob(f"*_{NETS[0]}.safetensors"))


def _is_diffusers(folder: Path) -> bool:
    settings = read_settings(folder) if (folder / "config.json").is_file() else None
    return settings is not None and settings.get("_class_name", None) == CLASS


def _as_pair(tensors: TensorFiles) -> TensorFiles:
    """diffusers' tensors by the pair's names, whose decoder begins with one layer more: a clamp."""

    def renamed(name: str) -> str:
        found = re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", name)
        if found is None:
            return name
        net, layer, rest = found.groups()
        return f"{net}.{int(layer) + (net == 'decoder')}.{rest}"

    stored = {renamed(name): tensor for name, tensor in tensors.stored.items()}
    return TensorFiles(tensors.where, stored, tensors.duplicates, tensors.metadata)


def beginning_of_pair(file: Path) -> Path | None:
    """The path to give `open_taesd` for one of the two files, if the other is there too."""
    for net in NETS:
        name = file.name.removesuffix(f"_{net}.safetensors")
        if name != file.name and all(
            each.is_file() for each in _pair(file.with_name(name)).values()
        ):
            return file.with_name(name)
    return None


def pair_of(beginning: str) -> tuple[str, ...]:
    """The names of the two files whose names begin so."""
    return tuple(f"{beginning}_{net}.safetensors" for net in NETS)


def _pair(path: Path) -> dict[str, Path]:
    return dict(zip(NETS, map(path.with_name, pair_of(path.name)), strict=True))
