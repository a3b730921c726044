"""Captions from the .txt and .json files beside pictures, and from tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from taca_jax.data.sources.bad_examples import BadExampleError, NoCaptionError

CAPTION_KEYS = ("caption", "captions", "text", "name")
"""Under which a JSON object may hold its caption; the first that is there counts."""


OWN = "{}"
"""In a caption that is given, what the picture's own caption replaces."""


@dataclass(frozen=True)
class GivenCaption:
    """A caption that is given for all pictures (`data.caption`).

    text: with `{}` in it, what becomes of each picture's own caption, which replaces `{}`; without,
    the caption of pictures that have none; None leaves all as they are.
    """

    text: str | None = None

    @property
    def default(self) -> str | None:
        """The caption of pictures that have none; None if they are left out."""
        return None if self.text is None or OWN in self.text else self.text

    def of(self, own: str | Sequence[str]) -> str | Sequence[str]:
        """What becomes of a picture's own caption, or of each of several."""
        if self.text is None or OWN not in self.text:
            return own
        if isinstance(own, str):
            return self.text.replace(OWN, own)
        return tuple(self.text.replace(OWN, each) for each in own)


def caption_from_json(record: Any) -> str | tuple[str, ...] | None:
    """The caption in a JSON object, several where it holds a list, and None where it holds none.

    Captions are stripped. Empty ones are left out of a list; alone, an empty one is "".
    """
    if not isinstance(record, dict):
        return None
    found = next((record[key] for key in CAPTION_KEYS if key in record), None)
    if isinstance(found, str):
        return found.strip()
    if not isinstance(found, list) or not all(isinstance(each, str) for each in found):
        return None
    captions = tuple(each.strip() for each in found if each.strip())
    return captions if len(captions) > 1 else "".join(captions)


def caption_from_text(content: bytes, name: str) -> str:
    """The caption that the bytes of a .txt hold.

    Raises NoCaptionError if it is empty, BadExampleError if it is not UTF-8.
    """
    try:
        caption = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadExampleError(f"{name} is not UTF-8") from error
    if not caption:
        raise NoCaptionError(f"{name} is empty")
    return caption
