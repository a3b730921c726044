"""python train.py --config NAME [key=value ...]   (--help lists presets and keys)"""

import sys

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import StoppedError, UserError
from taca_jax.training.config import TrainConfig


def main() -> None:
    config = parse_cli(sys.argv[1:], TrainConfig)
    # These imports take seconds; a mistyped key is reported before them.
    from taca_jax.parallel.processes import print_once
    from taca_jax.planning.plan import plan
    from taca_jax.telling.command import begin
    from taca_jax.training.run import train

    begin()
    try:
        if config.plan is None:
            train(config)
        else:
            plan(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except StoppedError as stopped:
        print_once(str(stopped), sys.stderr)
    except KeyboardInterrupt:
        sys.exit(f"stopped; go on with resume=true out_dir={config.run_dir}")


if __name__ == "__main__":
    main()
