"""Which kind of processor this machine has."""

import hashlib
import platform
from pathlib import Path


def processor() -> str:
    """Of this machine's processor its architecture and a digest of its instruction sets."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = [platform.processor()]
    sets = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return f"{platform.machine()}-{hashlib.sha256(sets.encode()).hexdigest()[:8]}"
