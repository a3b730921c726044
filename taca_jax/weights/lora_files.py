"""LoRA files on a model: read in any dialect that is known, written in three."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from taca_jax.errors import UserError
from taca_jax.families.flux import lora as lora_bfl
from taca_jax.families.flux import lora_xlabs
from taca_jax.families.flux.model import FLUX_DEV
from taca_jax.families.sd3 import lora as lora_sd3
from taca_jax.families.sd3.model import SD3Config
from taca_jax.formats.lora import kohya as lora_kohya
from taca_jax.formats.lora import native as lora_native
from taca_jax.formats.lora import peft as lora_peft
from taca_jax.formats.lora.dialect import Dialect, is_text_encoders, parse
from taca_jax.formats.lora.factors import (
    Adapter,
    LoRASummary,
    adapter_of,
    attach_adapter,
    summarise,
)
from taca_jax.formats.tensor_files import TensorFiles, open_tensors, write_tensors
from taca_jax.nn.lora import linears

Layout = Literal["peft", "kohya", "native"]

Kind = Literal["flux", "sd3"]
"""Of the model that a file is for."""

FLUX_DIALECTS = (
    lora_peft.FLUX,
    lora_kohya.FLUX,
    lora_kohya.FLUX_DIFFUSERS,
    lora_bfl.COMFYUI,
    lora_bfl.FAL,
    lora_bfl.FLUX,
    lora_xlabs.FLUX,
)


def dialects_of(kind: Kind, config: Any = None) -> tuple[Dialect, ...]:
    """What a file for such a model may be in, PEFT's dialect first, then kohya's."""
    return lora_sd3.dialects(config) if kind == "sd3" else FLUX_DIALECTS


@dataclass(frozen=True)
class LoRAFile:
    """What was read: the kind of model it is for, the dialect's name, the factors, and the text
    encoders' keys, left out. `guessed` where nothing in the file told the kind."""

    kind: Kind
    dialect: str
    adapter: Adapter
    left_out: tuple[str, ...] = ()
    guessed: bool = False

    @property
    def summary(self) -> LoRASummary:
        return summarise(self.adapter, self.dialect, self.left_out)


def read_lora(path: Path | str, model: Any) -> LoRASummary:
    """Attaches the factors of a LoRA file, in any dialect (or PEFT's folder), to a transformer.

    Factors become float32, strengths are folded into b. Raises UserError, and changes nothing, for
    a file that is absent, truncated, or of another model; it names keys and both sizes.
    """
    file = load_adapter(Path(path), _kind(model), model.config)
    attach_adapter(file.adapter, model, str(path))
    return file.summary


def write_lora(path: Path | str, model: Any, layout: Layout = "peft") -> LoRASummary:
    """Writes the factors attached to a model, whole or not at all; alpha is the rank in the file.

    Raises UserError where the model has none, or the file cannot be written.
    """
    adapter = adapter_of(model)
    if not adapter:
        raise UserError(f"nothing to write to {path}: the model has no LoRA factors")
    outputs = {name: layer.kernel.shape[-1] for name, layer in linears(model)}
    return save_adapter(
        Path(path), adapter, layout, outputs, kind=_kind(model), config=model.config
    )


def load_adapter(path: Path, kind: Kind | None = None, config: Any = None) -> LoRAFile:
    """The factors of a LoRA file, whichever dialect it is in.

    `kind` and `config` are of the model that it is for. Without a config, a Stable Diffusion 3's
    layers have places of no model, for `save_adapter` alone; without a kind it is the likelier one.
    Raises as `read_lora` does, bar that no model is there to compare sizes with.
    """
    tensors = open_tensors(path)
    if lora_native.is_native(tensors):
        return LoRAFile(kind or _native_kind(tensors), "native", lora_native.parse(tensors))
    kind, guessed = recognise_kind(tensors) if kind is None else (kind, False)
    dialect = recognise(tensors, dialects_of(kind, config))
    left_out = tuple(key for key in tensors.shapes if is_text_encoders(key))
    return LoRAFile(kind, dialect.name, parse(tensors, dialect), left_out, guessed)


def recognise(tensors: TensorFiles, dialects: Sequence[Dialect]) -> Dialect:
    """The dialect that knows most of the file's keys."""
    return max(dialects, key=lambda dialect: _known(tensors, dialect))


def recognise_kind(tensors: TensorFiles) -> tuple[Kind, bool]:
    """Which model a file is for, and whether that is a guess.

    Where its layers are in both, the widths of the released models decide; others are FLUX's, as a
    guess.
    """
    flux, sd3 = (
        max(_known(tensors, dialect) for dialect in dialects_of(kind)) for kind in get_args(Kind)
    )
    if flux != sd3:
        return ("sd3" if sd3 > flux else "flux"), False
    sizes = {size for shape in tensors.shapes.values() for size in shape}
    if sizes & lora_sd3.WIDTHS:
        return "sd3", False
    return "flux", FLUX_DEV.hidden not in sizes


def _known(tensors: TensorFiles, dialect: Dialect) -> int:
    return sum(dialect.find(key) is not None for key in tensors.shapes)


def _native_kind(tensors: TensorFiles) -> Kind:
    return "sd3" if any(_is_of_sd3(name) for name in tensors.shapes) else "flux"


def _is_of_sd3(path: str) -> bool:
    """Whether it is of a stack that only our Stable Diffusion 3 has."""
    return path.startswith(("dual_blocks.", "joint_blocks.", "last_block."))


def _kind(model: Any) -> Kind:
    return "sd3" if isinstance(model.config, SD3Config) else "flux"


def save_adapter(
    path: Path,
    adapter: Adapter,
    layout: Layout,
    outputs: Mapping[str, int] | None = None,
    *,
    kind: Kind = "flux",
    config: Any = None,
) -> LoRASummary:
    """Writes factors as one safetensors file in a layout.

    `outputs` are the channels that each path's layers give, for `lora_kohya.tensors_of`; `kind` and
    `config` as they were read with. Raises UserError for factors without a name there.
    """
    peft, kohya, *_ = dialects_of(kind, config)
    if kind == "sd3" and config is None:
        ours = any(_is_of_sd3(place) for place, _ in adapter)
        if ours != (layout == "native"):
            instead = "" if ours else "write peft or kohya, or "
            raise UserError(
                "which layers of a Stable Diffusion 3 are of which of our stacks, only a model "
                f"says; {instead}load the file into a pipeline"
            )
    if layout == "native":
        write_tensors(path, lora_native.tensors_of(adapter), {"format": "taca_jax"})
        return summarise(adapter, "native")
    if layout == "kohya":
        write_tensors(path, *lora_kohya.tensors_of(adapter, outputs or {}, kohya))
        return summarise(adapter, kohya.name)
    write_tensors(path, *lora_peft.tensors_of(adapter, peft.table))
    return summarise(adapter, peft.name)
