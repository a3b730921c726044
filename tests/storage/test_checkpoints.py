"""Checkpoints in a bucket: whole ones are used, half-written and damaged ones are not."""

import os
import signal
import time

import numpy as np
import pytest

from taca_jax.storage.places import place
from taca_jax.training.checkpoints import newest_step
from tests.processes import ended, start_python
from tests.storage.saving import main, opened, state_at


def restored():
    """The step, the weights and the position that a run would go on with, and what it is told."""
    said = []
    with opened() as checkpoints:
        found = checkpoints.restore(state_at(0), warn=said.append)
    assert found is not None
    state, data = found
    return int(state.step), np.asarray(state.weights), data["position"], said  # pyright: ignore


def steps(bucket, folder="checkpoints"):
    return {name.split("/")[2] for name in bucket.names(f"run/{folder}/")}


def test_the_newest_are_kept_and_read(bucket):
    main()
    assert steps(bucket) == {"2", "3"}
    assert newest_step(place("gs://bucket/run")) == 3
    step, weights, position, said = restored()
    assert (step, position, said) == (3, 3, [])
    assert np.array_equal(weights, np.asarray(state_at(3).weights))


@pytest.mark.parametrize(
    "last", ["state/manifest.ocdbt", "state/commit_success.txt", "commit_success.txt"]
)
def test_a_kill_while_one_is_written_loses_that_one_alone(bucket, last):
    """Killed, with -9, as it asks for that object of the third checkpoint to be written."""
    process = start_python("-m", "tests.storage.saving", environment=bucket.environment)

    def kill(method, _, name):
        if method == "POST" and name == f"run/checkpoints/3/{last}":
            bucket.refused = 503  # the request, too, is lost
            os.kill(process.pid, signal.SIGKILL)
            time.sleep(0.2)

    bucket.seen = kill
    done = ended(process)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    bucket.seen = bucket.refused = None
    assert "3" in steps(bucket)  # a part of it
    assert newest_step(place("gs://bucket/run")) == 2
    step, weights, position, said = restored()
    assert (step, position, said) == (2, 2, [])
    assert np.array_equal(weights, np.asarray(state_at(2).weights))
    assert "3" not in steps(bucket)
    main()
    assert newest_step(place("gs://bucket/run")) == 3


def test_a_damaged_one_is_set_aside(bucket):
    main()
    for name in bucket.names("run/checkpoints/3/state/ocdbt.process_0/d/"):
        bucket.write(name, b"torn")
    step, _, _, said = restored()
    assert step == 2
    assert "checkpoint 3 cannot be read" in said[0]
    assert steps(bucket, "damaged") == {"3"}
    assert steps(bucket) == {"2"}
