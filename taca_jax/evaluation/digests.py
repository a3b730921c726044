"""Digests of files and folders: the same wherever they are, another if their content changes."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import open_tensors
from taca_jax.pipelines.lora_choice import LoRAChoice
from taca_jax.weights.lora_files import gate_in
from taca_jax.weights.shipped import find_weights

WHOLE = 64 * 2**20
"""Files of more bytes than this are identified by their size and their ends."""

END = 2**20
"""How many bytes of each end that is."""


def file_digest(file: Path) -> str:
    """The sha256 of a file's size and content, in hexadecimal.

    Of a file above 64 MiB only the first and the last MiB are read: a change between them that
    keeps the size is not noticed. Training changes every tensor, also the last.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with file.open("rb") as content:
        if size <= WHOLE:
            digest.update(content.read())
        else:
            digest.update(content.read(END))
            content.seek(-END, 2)
            digest.update(content.read())
    return digest.hexdigest()


def digests_in(path: Path) -> dict[str, str]:
    """The digests of all files of a folder, by their names in it; of a file its own, as ".".

    Hidden files and folders, which programs leave behind, do not count.
    Raises UserError if nothing is there, or a file cannot be read.
    """
    if not path.exists():
        raise UserError(f"{path} is not there; name a file or folder that is")
    files = {file.relative_to(path): file for file in sorted([path, *path.rglob("*")])}
    try:
        return {
            name.as_posix(): file_digest(file)
            for name, file in files.items()
            if file.is_file() and not any(part.startswith(".") for part in name.parts)
        }
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})") from None


def digest_of(path: Path) -> str:
    """One digest of a file, or of all files of a folder and their names. Raises as `digests_in`."""
    return _joined(digests_in(path))


def digests_of_loras(loras: Sequence[LoRAChoice]) -> dict[str, str]:
    """The digests of LoRAs' files and of how they act: of one at its full strength and by its own
    gate those of its file, of others by their numbers, counted from 1. Raises as `digests_in`."""
    found = {}
    for number, lora in enumerate(loras, 1):
        path = find_weights(lora.path)
        digests = digests_in(path)
        acts = []
        if lora.gate is not None and lora.gate != (gate_in(open_tensors(path)) or "always"):
            acts.append(f"@{lora.gate}")
        acts += [] if lora.strength == 1 else [f":{lora.strength!r}"]
        if len(loras) == 1 and not acts:
            return digests
        found[str(number)] = " ".join([_joined(digests), *acts])
    return found


def digest_of_loras(loras: Sequence[LoRAChoice]) -> str:
    """One digest of LoRAs' files and of how they act. Raises as `digests_in`."""
    return _joined(digests_of_loras(loras))


def _joined(digests: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()
