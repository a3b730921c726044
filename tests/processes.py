"""Python in a process of its own, for what JAX and libtpu read once, when they start."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(
    *arguments: str, environment: Mapping[str, str] | None = None, devices: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python on the CPU in the repository's root, with these arguments.

    `environment` is added to ours; `devices` are how many virtual ones JAX finds, by default one.
    """
    ours = os.environ | {"JAX_PLATFORMS": "cpu"} | dict(environment or {})
    if devices is not None:
        count = f"--xla_force_host_platform_device_count={devices}"
        ours["XLA_FLAGS"] = f"{ours.get('XLA_FLAGS', '')} {count}"
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ours,
        capture_output=True,
        text=True,
        timeout=900,
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What it printed last; fails with its errors where it did."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]
