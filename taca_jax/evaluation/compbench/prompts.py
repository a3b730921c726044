"""Upstream's lists of prompts, or a list of one's own."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from taca_jax.errors import UserError

Lists = Mapping[str, Sequence[str]]
"""The prompts of each category."""

SOURCE = "github.com/Karine-Huang/T2I-CompBench"


def read_lists(prompts: str, categories: Sequence[str]) -> Lists:
    """The prompts of these categories: from upstream's lists in the folder `prompts`, or of one
    category from the file `prompts`.

    Raises UserError as `read_prompts` does, and for a file and several categories.
    """
    place = Path(prompts)
    if not place.is_file():
        return {category: read_prompts(place, category) for category in categories}
    if len(categories) > 1:
        raise UserError(
            f"prompts={prompts} is one list, and categories are {','.join(categories)}; give one, "
            "whose scorer is to judge the pictures"
        )
    return {categories[0]: _read(place, "give a prompt in each line")}


def read_prompts(folder: Path, category: str) -> list[str]:
    """The prompts of a category's validation list, one a line.

    As upstream reads them: line ends of any system, and of each line what comes before a tab.
    Raises UserError if the list is not there, is no text, or has an empty line, which would shift
    the numbers of all later pictures.
    """
    return _read(folder / f"{category}_val.txt", f"fetch it again from {SOURCE}")


def _read(file: Path, mend: str) -> list[str]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError:
        raise UserError(
            f"{file} is not there; fetch examples/dataset of {SOURCE} and give its folder as "
            "prompts=FOLDER, or a file of prompts of your own"
        ) from None
    except ValueError:
        raise UserError(f"{file} is no UTF-8 text; {mend}") from None
    prompts = [line.split("\t")[0] for line in lines]
    empty = [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]
    if empty or not prompts:
        where = f"line {empty[0]}" if empty else "all of it"
        raise UserError(f"{file}: {where} is empty; {mend}")
    return prompts
