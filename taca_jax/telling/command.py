"""What every command does first."""

from taca_jax.telling.compiled import keep_programs, say_what_compiles
from taca_jax.telling.quiet import no_tpu_no_words, plain_log


def begin(*, keep: bool = True) -> None:
    """To be called once by a command that computes, before JAX looks for devices, and before
    libraries are imported that set logs up themselves, as Orbax does: logs become plain lines,
    compiled programs are kept for the next start, and what compiles is said.

    keep: False where programs are for chips that are not here, which JAX cannot read again.
    """
    plain_log()
    no_tpu_no_words()
    if keep:
        keep_programs()
    say_what_compiles()
