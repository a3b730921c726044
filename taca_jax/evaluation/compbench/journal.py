"""Scores as they are computed, so that a stopped run goes on where it was."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from taca_jax.errors import UserError

JOURNAL = "scores.jsonl"
"""Beside the result: a line of settings, then a line for each batch."""


def settings_of(file: Path) -> dict[str, Any] | None:
    """The settings that a journal's scores are of; None if there is no journal."""
    if not file.is_file():
        return None
    with file.open() as lines:
        return json.loads(next(lines))["settings"]


class Journal:
    """A file of scores by picture, which only grows.

    scores: those that are there. Raises UserError if they are of other settings.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]):
        self._file = file
        self.scores: dict[int, str | float] = {}
        first = json.dumps({"settings": dict(settings)})
        lines = file.read_text().split("\n") if file.is_file() else []
        # The last element is empty, or a line that was not finished.
        whole = lines[:-1]
        if whole and whole[0] != first:
            raise UserError(
                f"{file} was made with other settings: {whole[0]}, and now {first}; remove its "
                "folder to score anew"
            )
        for line in whole[1:]:
            self.scores |= {int(number): score for number, score in json.loads(line).items()}
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("r+" if file.is_file() else "w") as text:
            text.truncate(sum(len(line.encode()) + 1 for line in whole))
        if not whole:
            self._append(first)

    def add(self, scores: Mapping[int, str | float]) -> None:
        """Adds scores, which are on disk when this returns."""
        self._append(json.dumps(dict(scores)))
        self.scores |= scores

    def _append(self, line: str) -> None:
        with self._file.open("a") as text:
            text.write(line + "\n")
            text.flush()
            os.fsync(text.fileno())
