"""The programs: `python -m taca_jax NAME ...`, or `taca-NAME ...` where the package is installed.

train.py, generate.py and app.py of a checkout are three of them.
"""

PROGRAMS = {
    "train": ("taca_jax.commands.train", "trains a TACA LoRA, or a model"),
    "generate": ("taca_jax.commands.generate", "draws pictures, with and without TACA"),
    "page": ("taca_jax.commands.page", "draws in the browser, plainly and with TACA side by side"),
    "convert": ("taca_jax.convert.cli", "original weights to model folders, LoRA files, and back"),
    "eval": ("taca_jax.evaluation.commands", "measures: shapes, sweeps, attention, T2I-CompBench"),
}
"""By name the module whose `main(argv, program)` is the program, and a line for the help."""
