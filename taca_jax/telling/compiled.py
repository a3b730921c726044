"""Compiled programs: kept from one start to the next, and how long they took.

JAX keeps them (its persistent compilation cache). Its own settings hold: JAX_COMPILATION_CACHE_DIR
names the folder, which may be in a bucket, and JAX_ENABLE_COMPILATION_CACHE=false turns it off.
"""

import os
import sys
import tempfile
from pathlib import Path
from threading import Timer, local
from typing import Any

import jax
from filelock import FileLock, Timeout

from taca_jax.caches import cache_folder
from taca_jax.parallel.processes import print_once
from taca_jax.telling.processor import processor
from taca_jax.telling.start import wrapped

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
OFF = "none"
"""The variable's value that keeps nothing."""

MOST_BYTES = 8 * 2**30
"""Of our own folder; the programs that have not been used for longest go first."""

LEAST_SECONDS = 0.1
"""Programs that compile faster are not kept."""

SAID_FROM_SECONDS, ANNOUNCED_AFTER_SECONDS = 1.0, 5.0
"""What took less is not said; what takes more is said while it compiles, too."""

PROGRAMS = {
    "train_step": "the training step",
    "_denoise": "the sampling loop",
    "_encode": "the text encoders",
    "_decode": "the decoder",
    "text": "the text encoders",
    "latents": "the encoder of pictures",
    "_shares": "the measurement of attention",
}
"""What users wait for, by the names of the jitted functions."""

_LOCK_SECONDS = 10
_unsaid: list[str] = []


def default_folder() -> Path:
    """Where compiled programs are kept unless the variable says otherwise. Each kind of processor
    has its own: a home may be shared, and programs for the CPU use what their machine can."""
    return cache_folder("compiled") / processor()


def keep_programs() -> None:
    """Turns JAX's persistent compilation cache on, in the folder that the user names, or ours.

    A folder that cannot be written is no error: a line says so when the first program compiles.
    """
    settings: Any = jax.config
    given = settings.jax_compilation_cache_dir
    if given == OFF:
        jax.config.update("jax_compilation_cache_dir", None)
        # For good, since in a notebook other commands follow in this process.
        jax.config.update("jax_enable_compilation_cache", False)
    if given == OFF or not settings.jax_enable_compilation_cache:
        return
    folder = given or str(default_folder())
    if "://" not in folder:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            jax.config.update("jax_compilation_cache_dir", None)
            _unsaid.append(
                f"compiled programs are not kept: {folder}: {error.strerror or error} ({VARIABLE} "
                f"names another folder, or {OFF})"
            )
            return
    jax.config.update("jax_compilation_cache_dir", folder)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", LEAST_SECONDS)
    if given is None and "JAX_COMPILATION_CACHE_MAX_SIZE" not in os.environ:
        jax.config.update("jax_compilation_cache_max_size", MOST_BYTES)
        remove_cut_off(Path(folder))


def remove_cut_off(folder: Path) -> None:
    """Removes entries whose writing was killed; JAX would neither read nor replace them.

    JAX writes the time of an entry's use beside it (`-atime`) when the entry is whole, and holds
    this lock meanwhile. Another process that holds it does no harm: the next start removes them.
    """
    try:
        with FileLock(folder / ".lockfile", timeout=_LOCK_SECONDS):
            for entry in folder.glob("*-cache"):
                if not entry.with_name(entry.name.removesuffix("cache") + "atime").exists():
                    entry.unlink(missing_ok=True)
    except (OSError, Timeout) as error:
        _unsaid.append(f"compiled programs in {folder} could not be looked through: {error}")


class _Teller:
    """Hears from JAX what compiles, and says it once it is done."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._timers: dict[str, Timer] = {}
        self._local = local()

    def event(self, event: str, **kwargs: str | int) -> None:
        """Hears whether the program that compiles in this thread came from the cache."""
        del kwargs
        if event == "/jax/compilation_cache/cache_hits":
            self._local.hit = True

    def duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        """JAX traces a function, lowers it and compiles it, with an event after each."""
        called = str(kwargs.get("fun_name", "")).removeprefix("jit(").removesuffix(")")
        what = PROGRAMS.get(called)
        if what is None:
            return
        kind = event.rpartition("/")[2]
        if kind == "jaxpr_trace_duration":
            self._seconds[called] = duration_secs
        elif kind == "jaxpr_to_mlir_module_duration":
            self._seconds[called] = self._seconds.get(called, 0.0) + duration_secs
            self._local.hit = False
            self._announce_later(called, what)
        elif kind == "backend_compile_duration":
            if timer := self._timers.pop(called, None):
                timer.cancel()
            self._done(what, self._seconds.pop(called, 0.0) + duration_secs)

    def _announce_later(self, called: str, what: str) -> None:
        timer = Timer(ANNOUNCED_AFTER_SECONDS, _say, [f"compiling {what} ..."])
        timer.daemon = True
        timer.start()
        self._timers[called] = timer

    def _done(self, what: str, seconds: float) -> None:
        while _unsaid:
            _say(_unsaid.pop(0))
        if seconds < SAID_FROM_SECONDS:
            return
        if getattr(self._local, "hit", False):
            _say(f"{what} came from the compilation cache in {seconds:.0f} s")
        else:
            _say(f"compiled {what} in {seconds:.0f} s")


def _say(line: str) -> None:
    print_once(wrapped(line), sys.stderr)


_teller: _Teller | None = None


def say_what_compiles() -> None:
    """From now on, says on stderr what large programs compile, how long it took, and whether they
    came from the cache."""
    global _teller
    if _teller is None:
        _teller = _Teller()
        jax.monitoring.register_event_listener(_teller.event)
        jax.monitoring.register_event_duration_secs_listener(_teller.duration)
