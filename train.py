"""python train.py --config NAME [key=value ...]   (--help lists presets and keys)"""

import sys

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import StoppedError, UserError
from taca_jax.training.config import TrainConfig


def main() -> None:
    config = parse_cli(sys.argv[1:], TrainConfig)
    # Seconds of imports, which a mistyped key need not wait for.
    from taca_jax.parallel.processes import is_first
    from taca_jax.planning.plan import plan
    from taca_jax.training.run import train

    try:
        if config.plan is None:
            train(config)
        else:
            plan(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except StoppedError as stopped:
        if is_first():
            print(stopped, file=sys.stderr)
    except KeyboardInterrupt:
        sys.exit(f"stopped; go on with resume=true out_dir={config.run_dir}")


if __name__ == "__main__":
    main()
