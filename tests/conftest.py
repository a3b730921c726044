"""What holds for every test: the CPU, no network, fixed seeds, compiled programs that are kept, and
no fight over cores."""

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from taca_jax.telling.processor import processor

# Before anything imports JAX or transformers. Set JAX_PLATFORMS to test on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is compilation, of programs that run for milliseconds: LLVM's passes go, XLA's
# own, which fuse and reorder, stay. Subprocesses inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Nothing is kept in the user's folders. Here all that was compiled once is found by the workers, by
# subprocesses, and by the next run; tests of the cache name a folder of their own.
COMPILED = Path(__file__).resolve().parents[1] / ".pytest_cache" / "d" / "compiled" / processor()
MOST_COMPILED_BYTES = 2**30
os.environ |= {
    "JAX_COMPILATION_CACHE_DIR": str(COMPILED),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Each worker would start a thread per core, in XLA (NPROC) and in PyTorch (OMP): with as many
    # workers as cores that is slower than one worker alone. Subprocesses inherit the share.
    share = str(max(1, (os.cpu_count() or 1) // int(workers)))
    os.environ["NPROC"] = share
    os.environ["OMP_NUM_THREADS"] = share

# The same examples every time; compiling a JAX function in an example is no reason to fail.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("repeatable")


def pytest_sessionstart(session):
    """Empties the folder of compiled programs when it has grown large, before any worker starts."""
    if hasattr(session.config, "workerinput"):
        return
    if sum(file.stat().st_size for file in COMPILED.glob("*-cache")) > MOST_COMPILED_BYTES:
        shutil.rmtree(COMPILED)


MAPPINGS = Path("/proc/self/maps")
MOST_MAPPINGS = 30_000


@pytest.fixture(scope="module", autouse=True)
def few_programs():
    """Linux gives a process 65,530 mappings of memory, and each compiled program takes three: a
    single worker that runs all tests would end in a segmentation fault of the compiler."""
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax  # here, after the variables above are set

        jax.clear_caches()
