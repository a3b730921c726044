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
    """A file of scores by picture, which only grows: each with the digest of the picture's file.

    Opening it changes nothing. Raises UserError if its scores are of other settings, or if it is
    damaged.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]):
        self._file = file
        self._scores: dict[int, tuple[str, str | float]] = {}
        self._first = first = json.dumps({"settings": dict(settings)})
        lines = file.read_text().split("\n") if file.is_file() else []
        # The last element is empty, or a line that was not finished.
        whole = lines[:-1]
        if whole and whole[0] != first:
            raise UserError(
                f"{file} was made with other settings: {whole[0]}, and now {first}; remove its "
                "folder to score anew"
            )
        try:
            for line in whole[1:]:
                for number, (digest, score) in json.loads(line).items():
                    self._scores[int(number)] = digest, score
        except (ValueError, TypeError, AttributeError):
            raise UserError(f"{file} is damaged; remove its folder to score anew") from None
        self._whole = sum(len(line.encode()) + 1 for line in whole)

    def scores_of(self, digests: Mapping[int, str]) -> dict[int, str | float]:
        """The scores of those pictures whose files still have these digests."""
        return {
            number: self._scores[number][1]
            for number, digest in digests.items()
            if number in self._scores and self._scores[number][0] == digest
        }

    def add(self, scores: Mapping[int, tuple[str, str | float]]) -> None:
        """Adds pairs of digest and score by picture, which are on disk when this returns."""
        line = json.dumps(dict(scores)) + "\n"
        if not self._whole:
            line = self._first + "\n" + line
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as text:
            text.truncate(self._whole)  # removes a line that was not finished
            text.write(line.encode())
            text.flush()
            os.fsync(text.fileno())
        self._whole += len(line.encode())
        self._scores |= scores
