"""train.py in processes of their own that need not import everything again."""

import multiprocessing
import os
import sys
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import jax

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_disable_most_optimizations",
)
"""Of JAX, that hold for the tests here and so for their processes."""


def start_train(arguments: Sequence[str], output: Path) -> BaseProcess:
    """`python train.py ARGUMENTS`, forked from a server that has imported it and done nothing else.

    What it prints goes to `output`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train", "taca_jax.training", __name__])
    settings = {name: getattr(jax.config, name) for name in SETTINGS}
    process = context.Process(target=_train, args=(list(arguments), output, settings))
    process.start()
    return process


def _train(arguments: list[str], output: Path, settings: dict[str, object]) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import train

    sys.argv = ["train.py", *arguments]
    train.main()
