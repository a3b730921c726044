"""`compbench score`: scores pictures by BLIP-VQA and CLIPScore, and writes upstream's results."""

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from taca_jax.errors import UserError
from taca_jax.evaluation.compbench.categories import METRICS
from taca_jax.evaluation.compbench.config import ScoreConfig
from taca_jax.evaluation.compbench.folders import (
    categories_in,
    pictures_in,
    prompts_of,
    result_file,
    write_result,
)
from taca_jax.evaluation.compbench.journal import JOURNAL, Journal
from taca_jax.evaluation.compbench.judges import BLIPJudge, CLIPJudge, Judge


def score(config: ScoreConfig) -> None:
    """Scores what has no score yet, and prints each category's mean.

    Raises UserError for problems that the user can fix, before any picture is scored.
    """
    run = Path(config.pictures)
    there = categories_in(run)
    judges = _judges(config)
    work = [(judge, each) for judge in judges for each in judge.categories if each in there]
    if not work:
        known = ", ".join(each for judge in judges for each in judge.categories)
        raise UserError(f"{run} has no pictures of {known}, which the given scorers judge")
    for judge, category in work:
        pictures = pictures_in(run / category)
        if not pictures:
            raise UserError(f"{run / category} has no pictures; draw them, or remove the folder")
        judge.check(list(prompts_of(run / category, pictures).values()))
    for judge, category in work:
        _score(judge, category, run / category, config.batch_size)
    for category in there:
        metric, file = METRICS[category].name, result_file(run / category, METRICS[category])
        if category not in [each for _, each in work] and not file.is_file():
            print(f"{category}: no {metric} yet; `compbench report` expects it in {file}")


def _judges(config: ScoreConfig) -> list[Judge]:
    judges: list[Judge] = []
    if config.blip is not None:
        judges.append(BLIPJudge(Path(config.blip), config.dtype, config.phrases))
    if config.clip is not None:
        judges.append(CLIPJudge(Path(config.clip), config.dtype))
    return judges


def _score(judge: Judge, category: str, folder: Path, batch_size: int) -> None:
    pictures = pictures_in(folder)
    prompts = prompts_of(folder, pictures)
    file = result_file(folder, judge.metric)
    if file.is_file() and not file.with_name(JOURNAL).is_file():
        print(f"{category}: {file} is of another program, and is left as it is")
        return
    journal = Journal(file.with_name(JOURNAL), {"metric": judge.metric.name, **judge.settings})
    left = [number for number in pictures if number not in journal.scores]
    for start in track(range(0, len(left), batch_size), category, console=Console(stderr=True)):
        numbers = left[start : start + batch_size]
        filled = numbers + numbers[-1:] * (batch_size - len(numbers))  # one shape, one program
        found = judge.scores([pictures[n] for n in filled], [prompts[n] for n in filled])
        journal.add(dict(zip(numbers, found, strict=False)))
    answers = {number: journal.scores[number] for number in pictures}
    write_result(file, answers)
    mean = np.mean([float(answer) for answer in answers.values()])
    print(f"{category}: {judge.metric.name} {mean:.4f}, {len(answers)} pictures")
