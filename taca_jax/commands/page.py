"""taca-page [--config NAME] [key=value ...]   a page in the browser (--help lists the keys)"""

import sys
from collections.abc import Sequence

from taca_jax.config.command_line import parse_cli
from taca_jax.errors import ending_in_one_line
from taca_jax.page.config import PageConfig
from taca_jax.pipelines.config import GenerateConfig


def main(argv: Sequence[str] | None = None, program: str | None = None) -> None:
    """Serves the page as the command line says, by default that of this process.

    program: how the program is called, for the help; by default the file that runs.
    """
    config = parse_cli(
        sys.argv[1:] if argv is None else argv,
        PageConfig,
        attribute="GENERATE",
        preset_kind=GenerateConfig,
        default="shapes_taca",
        program=program,
    )
    # These imports take seconds, as in training.
    from taca_jax.telling.command import begin

    begin()
    from taca_jax.page.serve import serve

    with ending_in_one_line("stopped"):
        serve(config)
