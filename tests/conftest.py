"""What holds for every test: the CPU, no network, fixed seeds, and no fight over cores."""

import os

# Before anything imports JAX or transformers. Set JAX_PLATFORMS to test on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the time is compilation, of programs that run for milliseconds: LLVM's passes go, XLA's
# own, which fuse and reorder, stay. Subprocesses inherit it.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Nothing is kept in the user's folders; tests of the cache name one of their own.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Each worker would start a thread per core, in XLA (NPROC) and in PyTorch (OMP): with as many
    # workers as cores that is slower than one worker alone. Subprocesses inherit the share.
    share = str(max(1, (os.cpu_count() or 1) // int(workers)))
    os.environ["NPROC"] = share
    os.environ["OMP_NUM_THREADS"] = share

from hypothesis import settings

# The same examples every time; compiling a JAX function in an example is no reason to fail.
settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=25)
settings.load_profile("repeatable")
