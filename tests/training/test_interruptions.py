"""Runs that are killed at random moments, again and again, end as one that never was."""

import random
import signal
import time

import numpy as np
import pytest

from tests.processes import ended, start_python
from tests.test_train_cli import command
from tests.training.checkpoints import logged, saved_checkpoint, saved_steps

pytestmark = pytest.mark.slow

KILLS = 20
SAVE_EVERY = 3
STEPS = 2_000
LONGEST_LIFE = 1.5
"""Seconds from the first new step that is logged, or from the start where none is awaited."""


def run(out_dir, environment):
    values = {
        "out_dir": str(out_dir),
        "resume": "true",
        "steps": str(STEPS),
        "save_every": str(SAVE_EVERY),
        "data__batch_size": "2",
    }
    return start_python("train.py", *command(**values), environment=environment)


def test_twenty_kills_change_nothing(tmp_path, environment):
    """Checkpoints are written nearly all the time here, so that many a kill cuts one short."""
    never = ended(run(tmp_path / "never", environment))
    assert never.returncode == 0, never.stderr[-3000:]
    draw = random.Random(0)
    killed, lost, cut_short = tmp_path / "killed", [], 0
    for number in range(KILLS):
        metrics = killed / "metrics.jsonl"
        before = inode(metrics)
        process = run(killed, environment)
        if number % 4:  # every fourth dies at any time from its start on
            await_step(process, metrics, before)
            time.sleep(draw.uniform(0, LONGEST_LIFE))
        else:
            time.sleep(draw.uniform(0, 4 * LONGEST_LIFE))
        assert process.poll() is None, "it ended before it could be killed: take more steps"
        process.send_signal(signal.SIGKILL)
        ended(process)
        reached = max((line["step"] for line in logged(killed)), default=0)
        newest = max(saved_steps(killed), default=0)
        lost.append(int(reached) - newest)
        folder = killed / "checkpoints"
        if folder.is_dir():
            cut_short += any(not path.name.isdigit() for path in folder.iterdir())
    print(f"steps lost at each kill: {lost}; {cut_short} kills left a checkpoint half written")
    # The newest that is complete, and one that was being written when the kill came.
    assert max(lost) <= 2 * SAVE_EVERY
    last = ended(run(killed, environment))
    assert last.returncode == 0, last.stderr[-3000:]
    assert "warning" not in last.stderr
    (ours, record), (theirs, expected) = (
        saved_checkpoint(folder, STEPS) for folder in (killed, tmp_path / "never")
    )
    assert record == expected
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if not np.array_equal(ours[name], theirs[name])]
    lines, never_lines = logged(killed), logged(tmp_path / "never")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in never_lines]


def await_step(process, file, before):
    """Returns when the run has logged a step since it began, which writes the file anew."""
    begun = None
    while process.poll() is None:
        if file.exists() and inode(file) != before:
            size = file.stat().st_size
            begun = size if begun is None else begun
            if size > begun:
                return
        time.sleep(0.05)


def inode(file):
    return file.stat().st_ino if file.exists() else None
