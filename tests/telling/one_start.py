"""One start of a program that trains a step and draws a picture, with what it says of compiling.

python tests/telling/one_start.py FOLDER
"""

import sys
from pathlib import Path

from taca_jax.parallel.processes import join_processes
from taca_jax.telling import compiled
from taca_jax.telling.command import begin
from taca_jax.training.run import train
from tests.training.tiny import tiny_config, tiny_pipeline


def main() -> None:
    compiled.SAID_FROM_SECONDS = 0.0
    begin()
    join_processes()
    train(tiny_config(Path(sys.argv[1]), steps=1))
    picture = tiny_pipeline()("a red circle", output="array").images
    print(picture.sum())


if __name__ == "__main__":
    main()
