"""Python in a process of its own, for what JAX and libtpu read once, when they start."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


TIMEOUT = 900

Environment = Mapping[str, str | None] | None

OPTIMISED = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
"""The environment of a process whose compiled programs are looked at."""

NOT_KEPT = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
"""That of one that compiles for chips which are not here: JAX could not read its programs again."""


def run_python(
    *arguments: str, environment: Environment = None, devices: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs Python on the CPU in the repository's root, with these arguments.

    `environment` is added to ours, less what is None in it; `devices` are how many virtual ones JAX
    finds, by default one.
    """
    return ended(start_python(*arguments, environment=environment, devices=devices))


def start_python(
    *arguments: str, environment: Environment = None, devices: int | None = None
) -> subprocess.Popen[str]:
    """As `run_python`, without waiting for it."""
    wanted = os.environ | {"JAX_PLATFORMS": "cpu"} | dict(environment or {})
    ours = {name: value for name, value in wanted.items() if value is not None}
    if devices is not None:
        count = f"--xla_force_host_platform_device_count={devices}"
        ours["XLA_FLAGS"] = f"{ours.get('XLA_FLAGS', '')} {count}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ours,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run_cluster(
    *arguments: str, processes: int, devices: int, environment: Environment = None
) -> list[subprocess.CompletedProcess[str]]:
    """Runs Python as so many processes, with so many virtual devices each, joined over gloo."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    cluster = {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes)}
    started = [
        start_python(
            *arguments,
            environment={**(environment or {}), **cluster, "JAX_PROCESS_ID": str(index)},
            devices=devices,
        )
        for index in range(processes)
    ]
    with ThreadPoolExecutor(processes) as readers:  # a full pipe would stop one, and so all
        return list(readers.map(ended, started))


def ended(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    """What a process left, once it has ended; kills it when that takes too long."""
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What it printed last; fails with its errors where it did."""
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]
