"""Runs that are killed at random moments, again and again, end as one that never was."""

import random
import time

import numpy as np
import pytest

from tests.test_train_cli import command
from tests.training.checkpoints import logged, saved_checkpoint, saved_steps
from tests.training.lives import start_train

pytestmark = pytest.mark.slow

KILLS = 20
SAVE_EVERY = 3
STEPS = 500
LONGEST_LIFE = 20
"""Steps that are seen in the log before the kill, which comes in the middle of a later one."""


def arguments(out_dir):
    values = {
        "out_dir": str(out_dir),
        "resume": "true",
        "steps": str(STEPS),
        "save_every": str(SAVE_EVERY),
        "data__batch_size": "2",
    }
    return command(**values)


def test_twenty_kills_change_nothing(tmp_path, monkeypatch):
    """Checkpoints are written nearly all the time here, so that many a kill cuts one short."""
    # A kill may cut short a program that is being kept, too.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    never, killed, said = (tmp_path / name for name in ("never", "killed", "said"))
    run_to_its_end(never, said)
    draw = random.Random(0)
    lost, cut_short = [], 0
    for number in range(KILLS):
        metrics = killed / "metrics.jsonl"
        before = inode(metrics)
        process = start_train(arguments(killed), said)
        if number % 4:
            await_steps(process, metrics, before, draw.randint(0, LONGEST_LIFE))
            time.sleep(draw.uniform(0, 0.2))
        else:  # at any time from its start on
            time.sleep(draw.uniform(0, 10))
        assert process.is_alive(), f"it ended before it could be killed: {said.read_text()}"
        process.kill()
        process.join()
        reached = max((line["step"] for line in logged(killed)), default=0)
        lost.append(int(reached) - max(saved_steps(killed), default=0))
        folder = killed / "checkpoints"
        if folder.is_dir():
            cut_short += any(not path.name.isdigit() for path in folder.iterdir())
    print(f"steps lost at each kill: {lost}; {cut_short} kills left a checkpoint half written")
    # Those since the newest complete one, while the next was being written.
    assert max(lost) <= 2 * SAVE_EVERY
    assert "warning" not in run_to_its_end(killed, said)
    (ours, record), (theirs, expected) = (
        saved_checkpoint(folder, STEPS) for folder in (killed, never)
    )
    assert record == expected
    assert ours.keys() == theirs.keys()
    assert not [name for name in theirs if not np.array_equal(ours[name], theirs[name])]
    lines, never_lines = logged(killed), logged(never)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["loss"] for line in lines] == [line["loss"] for line in never_lines]


def run_to_its_end(out_dir, said):
    """What it says."""
    process = start_train(arguments(out_dir), said)
    process.join()
    assert process.exitcode == 0, said.read_text()
    return said.read_text()


def await_steps(process, file, before, count):
    """Returns when the run has logged more than `count` steps since it wrote the file anew."""
    begun = None
    while process.is_alive():
        if file.exists() and inode(file) != before:
            lines = file.read_bytes().count(b"\n")
            begun = lines if begun is None else begun
            if lines > begun + count:
                return
        time.sleep(0.02)


def inode(file):
    return file.stat().st_ino if file.exists() else None
