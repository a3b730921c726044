"""A training run that tells itself to stop: python -m tests.training.stopped_run CONFIG [STEP]

When it asks for the data of its STEP-th step, counted from where it begins, it sends itself
SIGTERM; of several processes the last one does. It ends as train.py does.
"""

import os
import signal
import sys
from pathlib import Path

import jax

from taca_jax.commands import train as program
from taca_jax.config.json_text import from_json
from taca_jax.training import run
from taca_jax.training.config import TrainConfig


def main() -> None:
    config = from_json(TrainConfig, Path(sys.argv[1]).read_text())
    stop = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    real, calls = run._next_batch, 0

    def next_batch(*arguments):
        nonlocal calls
        calls += 1
        if calls == stop and jax.process_index() == jax.process_count() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*arguments)

    run._next_batch = next_batch
    program.parse_cli = lambda *_, **__: config
    program.main()


if __name__ == "__main__":
    main()
