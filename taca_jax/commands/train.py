"""taca-train --config NAME [key=value ...]   (--help lists presets and keys)"""

import sys
from collections.abc import Sequence

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import StoppedError, ending_in_one_line
from taca_jax.training.config import TrainConfig


def main(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Trains as the command line says, by default that of this process.

    program: how the program is called, for the help; by default the file that runs.
    """
    config = parse_cli(sys.argv[1:] if argv is None else argv, TrainConfig, program=program)
    # Imports take seconds: a mistyped key is reported before these, and what is wrong with a run
    # before those that train it.
    from taca_jax.telling.command import begin

    begin(keep=config.plan is None)
    from taca_jax.parallel.processes import print_once
    from taca_jax.training.checks import check_run

    with ending_in_one_line(f"stopped; go on with resume=true out_dir={config.run_dir}"):
        if config.plan is not None:
            from taca_jax.planning.plan import plan

            plan(config)
            return
        checked = check_run(config)
        from taca_jax.training.run import train

        try:
            train(config, checked)
        except StoppedError as stopped:
            print_once(str(stopped), sys.stderr)
