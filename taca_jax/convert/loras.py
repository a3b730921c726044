"""Converts LoRA files between layouts: `taca-convert lora`."""

from pathlib import Path
from typing import Any

from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.families.registry import families
from taca_jax.formats.lora.factors import check_fits
from taca_jax.formats.tensor_files import open_tensors
from taca_jax.nn.kinds import shapes_of
from taca_jax.weights.lora_files import Layout, LoRAFile, load_adapter, save_adapter


def lora_models() -> dict[str, tuple[Family, Any]]:
    """The values of --model: each family, and each released model with its config."""
    released = {
        model.name: (family, model.transformer)
        for family in families()
        for model in family.published.values()
    }
    return {**{family.name: (family, None) for family in families()}, **released}


def convert_lora(src: Path, dst: Path, to: Layout, model: str | None = None) -> list[str]:
    """Converts the LoRA file `src` to `dst`, for `model`, or for the model that it seems to be for.

    Raises UserError, with nothing at `dst`, for a file of another model, for one whose model cannot
    be determined but must be, for an unknown model, and for a `dst` that exists.
    """
    if dst.exists():
        raise UserError(f"{dst} exists; give a new name or remove it")
    family, config = None, None
    if model is not None:
        known = lora_models()
        if model not in known:
            raise UserError(f"--model {model} is unknown; give one of {', '.join(known)}")
        family, config = known[model]
    file = load_adapter(src, family, config)
    names = file.family.lora
    renamed = (to == "native") != (file.dialect == "native")
    if names.placeholder_stack is not None and config is None and renamed:
        config = names.model_of(open_tensors(src))
        if config is None:
            released = ", ".join(each.name for each in file.family.published.values())
            raise UserError(
                f"nothing in {src} tells which layers of a {file.family.title} are of which of our "
                f"stacks; give --model, one of {released}, or load the file into a pipeline"
            )
        file = load_adapter(src, file.family, config)
    if config is not None:
        shapes = shapes_of(config)
        kernels = {path.removesuffix(".kernel"): shape for path, shape in shapes.items()}
        check_fits(file.adapter, kernels, str(src))
    written = save_adapter(dst, file.adapter, to, file.family, config=config, gate=file.gate)
    return [f"{src}: {file.summary}", *doubts(file), f"{dst}: {written}"]


def doubts(file: LoRAFile) -> list[str]:
    """A warning line if the family was guessed, else no lines."""
    if not file.guessed:
        return []
    others = [family for family in families() if family is not file.family]
    named = " or ".join(f"--model {family.name}" for family in others)
    said = (
        f"guessed to be of {file.family.title}: its layers are in other families' models alike, "
        f"and its widths in no released model or in several; for another, `convert lora` takes "
        f"{named}"
    )
    return [said]
