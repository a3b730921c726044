"""LoRA files from one layout to another: `python -m convert lora`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from taca_jax.errors import UserError
from taca_jax.families.sd3 import lora as lora_sd3
from taca_jax.formats.engine import shapes_of
from taca_jax.formats.lora.factors import check_fits
from taca_jax.formats.tensor_files import open_tensors
from taca_jax.weights.lora_files import Kind, Layout, LoRAFile, load_adapter, save_adapter

For = Literal["flux", "sd3", "sd3.5-medium", "sd3.5-large", "sd3-medium"]
"""What a file was trained for."""
_KINDS: Mapping[str, tuple[Kind, Any]] = {
    "flux": ("flux", None),
    "sd3": ("sd3", None),
    **{name: ("sd3", config) for name, config in lora_sd3.RELEASED.items()},
}


def convert_lora(src: Path, dst: Path, to: Layout, model: For | None = None) -> list[str]:
    """Writes the LoRA file `dst` of the one at `src`, for a model or what it seems to be for.

    Raises UserError, with nothing at `dst`, for a file that is not of it, for one of a Stable
    Diffusion 3 that must be known and is not, and for a `dst` that exists.
    """
    if dst.exists():
        raise UserError(f"{dst} exists; give a new name or remove it")
    kind, config = (None, None) if model is None else _KINDS[model]
    file = load_adapter(src, kind, config)
    if file.kind == "sd3" and config is None and (to == "native") != (file.dialect == "native"):
        config = lora_sd3.released(open_tensors(src))
        if config is None:
            raise UserError(
                f"nothing in {src} tells which layers of a Stable Diffusion 3 are of which of our "
                f"stacks; give --model, one of {', '.join(lora_sd3.RELEASED)}, or load the file "
                "into a pipeline"
            )
        file = load_adapter(src, file.kind, config)
    if config is not None:
        shapes = shapes_of(config)
        kernels = {path.removesuffix(".kernel"): shape for path, shape in shapes.items()}
        check_fits(file.adapter, kernels, str(src))
    written = save_adapter(dst, file.adapter, to, kind=file.kind, config=config)
    return [f"{src}: {file.summary}", *doubts(file), f"{dst}: {written}"]


def doubts(file: LoRAFile) -> list[str]:
    """A line where the kind of the model was guessed."""
    if not file.guessed:
        return []
    doubt = (
        "guessed to be FLUX's: its layers are in FLUX and in Stable Diffusion 3 alike, and its "
        "widths in no released model; for the other, `convert lora` takes --model sd3"
    )
    return [doubt]
