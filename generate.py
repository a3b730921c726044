"""python generate.py --config NAME prompt="..." [key=value ...]   (--help lists them)"""

import sys

from taca_jax.config import GenerateConfig, parse_cli
from taca_jax.errors import UserError
from taca_jax.generation import generate


def main() -> None:
    config = parse_cli(sys.argv[1:], GenerateConfig, attribute="GENERATE")
    try:
        generate(config)
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
