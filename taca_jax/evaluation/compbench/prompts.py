"""Upstream's lists of prompts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from taca_jax.errors import UserError

Lists = Mapping[str, Sequence[str]]
"""The prompts of each category."""

SOURCE = "github.com/Karine-Huang/T2I-CompBench"


def read_prompts(folder: Path, category: str) -> list[str]:
    """The prompts of a category's validation list, one a line.

    As upstream reads them: line ends of any system, and of each line what comes before a tab.
    Raises UserError if the list is not there, is no text, or has an empty line, which would shift
    the numbers of all later pictures.
    """
    file = folder / f"{category}_val.txt"
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError:
        raise UserError(
            f"{file} is not there; fetch examples/dataset of {SOURCE} and give its folder as "
            "prompts=FOLDER"
        ) from None
    except ValueError:
        raise UserError(f"{file} is no UTF-8 text; fetch it again from {SOURCE}") from None
    prompts = [line.split("\t")[0] for line in lines]
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty or not prompts:
        where = f"line {empty[0]}" if empty else "all of it"
        raise UserError(f"{file}: {where} is empty; fetch it again from {SOURCE}")
    return prompts
