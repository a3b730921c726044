"""taca-generate --config NAME prompt="..." [key=value ...]   (--help lists them)"""

import sys
from collections.abc import Sequence

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import ending_in_one_line
from taca_jax.pipelines.config import GenerateConfig
from taca_jax.pipelines.saved import saved_drawing


def main(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Draws as the command line says, by default that of this process.

    program: how the program is called, for the help; by default the file that runs.
    """
    config = parse_cli(
        sys.argv[1:] if argv is None else argv,
        GenerateConfig,
        attribute="GENERATE",
        saved=saved_drawing,
        program=program,
    )
    # These imports take seconds, as in train.py.
    from taca_jax.telling.command import begin

    begin(keep=config.plan is None)
    from taca_jax.pipelines.generate import generate
    from taca_jax.planning.drawing import plan_drawing

    with ending_in_one_line("stopped; pictures reported as written are complete"):
        if config.plan is None:
            generate(config)
        else:
            plan_drawing(config)
