"""How much memory the devices and the machine have, and use."""

from pathlib import Path
from typing import Any

import jax

from taca_jax.telling.start import size

_MEMINFO = Path("/proc/meminfo")


def memory() -> str:
    """How much memory is in use: a line for each of this process's devices, and one for the
    machine.

    A device's peak is since the process began. Where one does not say how much it uses, as a CPU,
    whose memory is the machine's, the line says that.
    """
    several = jax.local_device_count() > 1
    lines = [
        f"{device.device_kind}{f' {device.id}' if several else ''}: {_used(device)}"
        for device in jax.local_devices()
    ]
    return "\n".join([*lines, f"this machine: {_used_of_machine(_MEMINFO)}"])


def _used(device: Any) -> str:
    stats = device.memory_stats() or {}
    if "bytes_in_use" not in stats:
        return "uses this machine's memory" if device.platform == "cpu" else "does not say"
    said = size(stats["bytes_in_use"])
    if "bytes_limit" in stats:
        said += f" of {size(stats['bytes_limit'])}"
    said += " in use"
    if "peak_bytes_in_use" in stats:
        said += f", {size(stats['peak_bytes_in_use'])} at most so far"
    return said


def _used_of_machine(meminfo: Path) -> str:
    """meminfo: Linux's file of it, in kB."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):  # not Linux
        return "does not say"
    return f"{size(total - free)} of {size(total)} in use"
