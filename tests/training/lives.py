"""train.py in processes of their own that need not import everything again."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path


def start_train(arguments: Sequence[str], output: Path) -> BaseProcess:
    """`python train.py ARGUMENTS`, forked from a server that has imported it and done nothing else.

    What it prints goes to `output`. The server starts with the first call, and has its environment.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "taca_jax.training", __name__])
    process = context.Process(target=_train, args=(list(arguments), output))
    process.start()
    return process


def _train(arguments: list[str], output: Path) -> None:
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import train

    sys.argv = ["train.py", *arguments]
    train.main()
