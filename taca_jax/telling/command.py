"""What every command does first."""

from taca_jax.telling.compiled import keep_programs, say_what_compiles
from taca_jax.telling.quiet import no_tpu_no_words, plain_log


def begin() -> None:
    """To be called once by a command that computes, before JAX looks for devices: logs become
    plain lines, compiled programs are kept for the next start, and what compiles is said."""
    plain_log()
    no_tpu_no_words()
    keep_programs()
    say_what_compiles()
