"""python -m taca_jax train|generate|page|convert|eval ...   (--help says what they do)"""

import sys
from collections.abc import Sequence
from importlib import import_module

from taca_jax.commands import PROGRAMS
from taca_jax.config.command_line import say
from taca_jax.config.fields import nearest

_CALLED = "python -m taca_jax"


def main(argv: Sequence[str]) -> None:
    """Runs the program that the first word names, with the others; see each program's `main`."""
    if not argv or argv[0] in ("-h", "--help"):
        lines = [f"  {name:<8}  {purpose}" for name, (_, purpose) in PROGRAMS.items()]
        say([f"usage: {_CALLED} PROGRAM ...", "", *lines, "", "PROGRAM --help says more"])
        return
    name, *rest = argv
    if name not in PROGRAMS:
        there = ", ".join(nearest(name, list(PROGRAMS)))
        print(f"error: unknown program {name}; there are {there}", file=sys.stderr)
        raise SystemExit(2)
    module, _ = PROGRAMS[name]
    import_module(module).main(rest, program=f"{_CALLED} {name}")


if __name__ == "__main__":
    main(sys.argv[1:])
