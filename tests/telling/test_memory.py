"""What is said about memory."""

from dataclasses import dataclass
from typing import Any

import jax
import pytest

import taca_jax as tj
from taca_jax.telling import memory


@dataclass(frozen=True)
class Device:
    stats: dict[str, int] | None
    platform: str = "tpu"
    device_kind: str = "TPU v5 lite"
    id: int = 0

    def memory_stats(self) -> Any:
        return self.stats


GB = 10**9
FULL = {"bytes_in_use": 10 * GB, "bytes_limit": 17 * GB, "peak_bytes_in_use": 12 * GB}


@pytest.mark.parametrize(
    ("device", "line"),
    [
        (Device(FULL), "TPU v5 lite: 10.0 GB of 17.0 GB in use, 12.0 GB at most so far"),
        (Device({"bytes_in_use": GB}), "TPU v5 lite: 1.0 GB in use"),
        (Device(None), "TPU v5 lite: does not say"),
        (Device(None, "cpu", "cpu"), "cpu: uses this machine's memory"),
    ],
)
def test_a_device_has_a_line(monkeypatch, device, line):
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    assert tj.memory().splitlines()[0] == line


def test_several_devices_are_numbered(monkeypatch):
    monkeypatch.setattr(jax, "local_devices", lambda: [Device(None, id=2), Device(None, id=3)])
    monkeypatch.setattr(jax, "local_device_count", lambda: 2)
    first, second, _ = tj.memory().splitlines()
    assert (first, second) == ("TPU v5 lite 2: does not say", "TPU v5 lite 3: does not say")


def test_the_machine_has_the_last_line(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", meminfo)
    assert tj.memory().splitlines()[-1] == "this machine: does not say"
    meminfo.write_text("MemTotal: 50000000 kB\nMemFree: 1 kB\nMemAvailable: 30000000 kB\n")
    assert tj.memory().splitlines()[-1] == "this machine: 20.5 GB of 51.2 GB in use"
