"""Weights that change under their name."""

from pathlib import Path


def change_last_byte(file: Path) -> None:
    """Changes the last tensor of a safetensors file, which stays readable and as long as it was."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
