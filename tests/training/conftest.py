"""Compiling a training step takes far longer than running it: it is done only once."""

import os

import jax
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache


@pytest.fixture(scope="session")
def compiled_folder(tmp_path_factory):
    """Where compiled programs are kept for the session, by all its workers."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if base.name.startswith("popen-") else base) / "compiled"


@pytest.fixture(scope="package", autouse=True)
def environment(compiled_folder):
    """Environment variables for subprocesses that are to run the very programs of these tests."""
    settings = {
        "jax_compilation_cache_dir": (None, str(compiled_folder)),
        "jax_persistent_cache_min_compile_time_secs": (1.0, 0.0),
        "jax_persistent_cache_min_entry_size_bytes": (0, -1),
    }
    for name, (_, here) in settings.items():
        jax.config.update(name, here)
    _forget_programs()
    yield os.environ | {name.upper(): str(here) for name, (_, here) in settings.items()}
    for name, (default, _) in settings.items():
        jax.config.update(name, default)
    _forget_programs()


def _forget_programs() -> None:
    """Or those compiled before would be taken, whose last bits differ, and the folder not be read:
    whether there is one is asked once."""
    jax.clear_caches()
    reset_cache()
