"""The folders of a run: `CATEGORY/samples/PROMPT_000012.png`, prompts and results beside them.

A picture's number counts all pictures of its category; upstream calls it the question's id.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.categories import METRICS, Metric
from taca_jax.formats.atomic import whole_file

SAMPLES = "samples"
PROMPTS = "prompts.json"
"""The prompts of a category in a run that we drew, and how many pictures there are of each."""

RESULT = "vqa_result.json"
"""Upstream's name for the scores of every metric."""

NAME_BYTES = 255
"""The longest name of a file on common file systems."""


def picture_name(prompt: str, number: int) -> str:
    """The name of a picture's file, from which upstream's scorers read the prompt.

    What no file name may have, "/" and NUL, becomes a space, and what is too long is cut. Our own
    scorer reads prompts from `prompts.json`.
    """
    end = f"_{number:06}.png"
    said = prompt.replace("/", " ").replace("\0", " ").encode()
    return said[: NAME_BYTES - len(end)].decode(errors="ignore") + end


def pictures_in(category: Path) -> dict[int, Path]:
    """The pictures of a category's folder by number, in order.

    Raises UserError for a file without a number, and for two with the same.
    """
    found: dict[int, Path] = {}
    for path in sorted((category / SAMPLES).glob("*.png")):
        number = path.stem.rpartition("_")[2]
        if not (number.isascii() and number.isdigit()):
            raise UserError(f"{path} has no number; expected PROMPT_000012.png")
        if int(number) in found:
            raise UserError(f"{path} and {found[int(number)].name} have the same number")
        found[int(number)] = path
    return dict(sorted(found.items()))


def prompts_of(category: Path, numbers: Iterable[int]) -> dict[int, str]:
    """The prompts of these pictures: from prompts.json, or, in a run of upstream's, from the names
    of the pictures. Raises UserError if one has none."""
    file = category / PROMPTS
    if not file.is_file():
        named = {n: path.stem.rpartition("_")[0] for n, path in pictures_in(category).items()}
        if absent := sorted(set(numbers) - named.keys()):
            raise UserError(f"{category / SAMPLES} has no picture {absent[0]}, which is scored")
        return {number: named[number] for number in numbers}
    try:
        recorded = json.loads(file.read_text())
        prompts, num_images = recorded["prompts"], recorded["num_images"]
        return {number: prompts[number // num_images] for number in numbers}
    except (ValueError, KeyError, TypeError, IndexError, ZeroDivisionError):
        raise UserError(f"{file} is damaged or not of these pictures; draw them again") from None


def prompts_text(prompts: Sequence[str], num_images: int) -> str:
    """The contents of prompts.json: the prompts of a category, in the order of their pictures."""
    return json.dumps({"num_images": num_images, "prompts": list(prompts)}, indent=1) + "\n"


def check_prompts(run: Path, lists: Mapping[str, Sequence[str]], num_images: int) -> None:
    """Raises UserError if a category of the run has other prompts than its list."""
    for category, prompts in lists.items():
        file = run / category / PROMPTS
        if file.is_file() and file.read_text() != prompts_text(prompts, num_images):
            raise UserError(
                f"{file} has other prompts than the list of {category} has now; name another out"
            )


def write_prompts(run: Path, lists: Mapping[str, Sequence[str]], num_images: int) -> None:
    """Writes what `check_prompts` reads, and our scorer."""
    for category, prompts in lists.items():
        with whole_file(run / category / PROMPTS) as file:
            file.write_text(prompts_text(prompts, num_images))


def categories_in(run: Path) -> list[str]:
    """The categories that a run has pictures or results of. Raises UserError if there are none."""
    found: list[str] = [each for each in METRICS if (run / each).is_dir()]
    if not found:
        raise UserError(
            f"{run} has no folder of a category ({', '.join(list(METRICS)[:3])}, ...); give "
            "one that `compbench generate` wrote"
        )
    return found


def result_file(category: Path, metric: Metric) -> Path:
    return category / metric.folder / RESULT


def write_result(file: Path, answers: Mapping[int, str | float]) -> None:
    """Writes scores by picture as upstream does."""
    entries = [{"question_id": number, "answer": answer} for number, answer in answers.items()]
    with whole_file(file) as made:
        made.write_text(json.dumps(entries) + "\n")


def read_result(file: Path) -> dict[int, float]:
    """Scores by picture, of any of upstream's scorers. Raises UserError for a file without any."""
    try:
        entries = json.loads(file.read_text())
        scores = {int(each["question_id"]): float(each["answer"]) for each in entries}
    except (OSError, ValueError, KeyError, TypeError):
        scores = {}
    if not all(math.isfinite(score) for score in scores.values()) or not scores:
        raise UserError(
            f'{file} is not as upstream writes it: [{{"question_id": 0, "answer": "0.6900"}}, ...]'
        )
    return scores
