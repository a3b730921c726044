"""TAESD-style autoencoders as they are published: one file each for encoder and decoder."""

from pathlib import Path
from typing import Literal

from taca_jax.errors import UserError
from taca_jax.formats.key_table import Rule, Table, convolution
from taca_jax.formats.tensor_files import TensorFiles, joined, open_tensors

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
    """The pair of files whose names begin with `path`, or the only pair in the folder `path`.

    `taef1` means `taef1_encoder.safetensors` and `taef1_decoder.safetensors`. Their keys get
    the prefixes `encoder.` and `decoder.`. Raises UserError if there is no pair, or more
    than one.
    """
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


def is_pair(path: Path) -> bool:
    """Whether `open_taesd` reads it: it is the beginning of two files' names, or their folder."""
    if path.is_dir():
        return any(path.glob(f"*_{NETS[0]}.safetensors"))
    return not path.exists() and all(each.is_file() for each in _pair(path).values())


def beginning_of_pair(file: Path) -> Path | None:
    """The path to give `open_taesd` for one of the two files, if the other is there too."""
    for net in NETS:
        name = file.name.removesuffix(f"_{net}.safetensors")
        if name != file.name and all(
            each.is_file() for each in _pair(file.with_name(name)).values()
        ):
            return file.with_name(name)
    return None


def _pair(path: Path) -> dict[str, Path]:
    return {net: path.with_name(f"{path.name}_{net}.safetensors") for net in NETS}
