"""python app.py [--config NAME] [key=value ...]   a page in the browser (--help lists the keys)"""

import sys

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import UserError
from taca_jax.page.config import PageConfig
from taca_jax.pipelines.config import GenerateConfig


def main() -> None:
    config = parse_cli(
        *(sys.argv[1:], PageConfig),
        attribute="GENERATE",
        preset_kind=GenerateConfig,
        default="shapes_taca",
    )
    # These imports take seconds, as in train.py.
    from taca_jax.page.serve import serve

    try:
        serve(config)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped")


if __name__ == "__main__":
    main()
