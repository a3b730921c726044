"""The presets, a module each: what `--config NAME` takes.

An installed package has them here. In a checkout they are the files in its folder configs/.
"""

from pathlib import Path

_HERE = Path(__file__).parent
if not list(_HERE.glob("[!_]*.py")):
    __path__.append(str(_HERE.parents[1] / "configs"))
