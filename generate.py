"""python generate.py --config NAME prompt="..." [key=value ...]   (--help lists them)"""

import sys

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import UserError
from taca_jax.pipelines.config import GenerateConfig


def main() -> None:
    config = parse_cli(sys.argv[1:], GenerateConfig, attribute="GENERATE")
    # These imports take seconds, as in train.py.
    from taca_jax.pipelines.generate import generate
    from taca_jax.planning.drawing import plan_drawing
    from taca_jax.telling.command import begin

    begin()
    try:
        if config.plan is None:
            generate(config)
        else:
            plan_drawing(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; pictures reported as written are complete")


if __name__ == "__main__":
    main()
