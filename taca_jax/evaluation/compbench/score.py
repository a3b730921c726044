"""`compbench score`: scores pictures by BLIP-VQA and CLIPScore, and writes upstream's results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

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
from taca_jax.evaluation.digests import file_digest
from taca_jax.telling.bars import shown


@dataclass(frozen=True)
class Work:
    """A category to be scored by one judge: its pictures and their prompts by number.

    journal: None if the category's result is of another program.
    """

    judge: Judge
    category: str
    pictures: Mapping[int, Path]
    prompts: Mapping[int, str]
    result: Path
    journal: Journal | None


def score(config: ScoreConfig) -> None:
    """Scores what has no score yet, and prints each category's mean.

    A picture whose file has changed is scored anew. Raises UserError for problems that the user can
    fix, before any picture is scored.
    """
    score_run(Path(config.pictures), open_judges(config), config.batch_size)


def score_run(run: Path, judges: Sequence[Judge], batch_size: int) -> None:
    """`score` of a run's folder by judges that are there."""
    there = categories_in(run)
    work = [
        _open(judge, each, run) for judge in judges for each in judge.categories if each in there
    ]
    if not work:
        known = ", ".join(each for judge in judges for each in judge.categories)
        raise UserError(f"{run} has no pictures of {known}, which the given scorers judge")
    for each in work:
        _score(each, batch_size)
    for category in there:
        metric, file = METRICS[category].name, result_file(run / category, METRICS[category])
        if category not in [each.category for each in work] and not file.is_file():
            print(f"{category}: no {metric} yet; `compbench report` expects it in {file}")


def open_judges(config: ScoreConfig) -> list[Judge]:
    """The scorers that are given, loaded. Raises UserError for ones that are not there, or not
    what they should be."""
    judges: list[Judge] = []
    if config.blip is not None:
        judges.append(BLIPJudge(Path(config.blip), config.dtype, config.phrases))
    if config.clip is not None:
        judges.append(CLIPJudge(Path(config.clip), config.dtype))
    return judges


def _open(judge: Judge, category: str, run: Path) -> Work:
    """Raises UserError for pictures or prompts that cannot be judged, and for other settings."""
    pictures = pictures_in(run / category)
    if not pictures:
        raise UserError(f"{run / category} has no pictures; draw them, or remove the folder")
    prompts = prompts_of(run / category, pictures)
    judge.check(list(prompts.values()))
    result = result_file(run / category, judge.metric)
    file = result.with_name(JOURNAL)
    journal = None
    if file.is_file() or not result.is_file():
        journal = Journal(file, {"metric": judge.metric.name, **judge.settings})
    return Work(judge, category, pictures, prompts, result, journal)


def _score(work: Work, batch_size: int) -> None:
    category, pictures, prompts, journal = work.category, work.pictures, work.prompts, work.journal
    if journal is None:
        print(f"{category}: {work.result} is of another program, and is left as it is")
        return
    looked_at = shown(pictures.items(), f"{category}: which pictures are new", len(pictures))
    digests = {number: file_digest(path) for number, path in looked_at}
    done = journal.scores_of(digests)
    left = [number for number in pictures if number not in done]
    if left:
        work.result.unlink(missing_ok=True)  # it is not of these pictures
    starts = range(0, len(left), batch_size)
    for start in shown(starts, f"{category}: scoring batches", len(starts)):
        numbers = left[start : start + batch_size]
        filled = numbers + numbers[-1:] * (batch_size - len(numbers))  # one shape, one program
        found = work.judge.scores([pictures[n] for n in filled], [prompts[n] for n in filled])
        journal.add({n: (digests[n], said) for n, said in zip(numbers, found, strict=False)})
    answers = journal.scores_of(digests)
    write_result(work.result, answers)
    mean = np.mean([float(answer) for answer in answers.values()])
    print(f"{category}: {work.judge.metric.name} {mean:.4f}, {len(answers)} pictures")
