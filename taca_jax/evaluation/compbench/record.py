"""What a folder's pictures were drawn with, so that no others get between them."""

from pathlib import Path

from taca_jax.config.fields import difference, show
from taca_jax.config.json_text import from_json, to_json
from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.config import PicturesConfig
from taca_jax.evaluation.compbench.folders import PROMPTS, SAMPLES, prompts_text
from taca_jax.evaluation.compbench.prompts import Lists
from taca_jax.formats.atomic import whole_file

SETTINGS = "settings.json"
"""The configuration, beside the folders of the categories."""

FREE_FIELDS = ("prompts", "out", "categories", "limit")
"""Fields that may change while a folder is completed; none of them changes a picture."""


def check_record(config: PicturesConfig, lists: Lists) -> None:
    """Raises UserError if the folder has pictures of other settings, or of other prompts.

    That `base` and `lora` name the same files as before is not checked.
    """
    out = Path(config.out)
    if not any(out.glob(f"*/{SAMPLES}/*.png")):
        return
    settings = out / SETTINGS
    if not settings.is_file():
        raise UserError(f"{out} has pictures but no {SETTINGS}; draw elsewhere (out=...)")
    recorded = from_json(PicturesConfig, settings.read_text(), str(settings))
    differing = [
        f"{name} is {show(there)} there, {show(here)} here"
        for name, (there, here) in difference(recorded, config).items()
        if name.partition(".")[0] not in FREE_FIELDS
    ]
    if differing:
        raise UserError(
            f"{out} was drawn with other settings: {'; '.join(differing)}; draw elsewhere (out=...)"
        )
    for category, prompts in lists.items():
        file = out / category / PROMPTS
        if file.is_file() and file.read_text() != prompts_text(prompts, config.num_images):
            raise UserError(f"{file} has other prompts than {config.prompts}; draw elsewhere")


def write_record(config: PicturesConfig, lists: Lists) -> None:
    """Writes what `check_record` reads."""
    out = Path(config.out)
    for category, prompts in lists.items():
        with whole_file(out / category / PROMPTS) as file:
            file.write_text(prompts_text(prompts, config.num_images))
    with whole_file(out / SETTINGS) as file:
        file.write_text(to_json(config))
