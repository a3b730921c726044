"""Captions from the .txt and .json files beside pictures, and from tables."""

from typing import Any

from taca_jax.data.sources.bad_examples import BadExampleError

CAPTION_KEYS = ("caption", "captions", "text", "name")
"""Under which a JSON object may hold its caption; the first that is there counts."""


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
    """The caption that the bytes of a .txt hold. Raises BadExampleError if empty or not UTF-8."""
    try:
        caption = content.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadExampleError(f"{name} is not UTF-8") from error
    if not caption:
        raise BadExampleError(f"{name} is empty")
    return caption
