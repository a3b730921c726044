"""Names of models on a Hugging Face hub, and what to fetch of them. Nothing is fetched here."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from taca_jax.errors import UserError

FORMS = "owner/repo, owner/repo@revision, owner/repo:file or owner/repo@revision:file"

_ID = re.compile(
    r"(?P<repo>\w[\w.-]*/\w[\w.-]*)"
    r"(?:@(?P<revision>[^\s:@]+))?"
    r"(?::(?P<inside>[^\s:/][^\s:]*))?"
)
_FILES = (".safetensors", ".json", ".pt", ".pth", ".bin", ".ckpt")
"""Ends of names that are files' and no repository's."""

_LISTED = 6


@dataclass(frozen=True)
class HubId:
    """A model on the hub.

    revision: a branch, tag or commit; None is the newest. inside: a file or folder of the
    repository; "" is all of it.
    """

    repo: str
    revision: str | None = None
    inside: str = ""

    def __str__(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"{self.repo}{revision}" + (f":{self.inside}" if self.inside else "")


@dataclass(frozen=True)
class Selection:
    """What to fetch of a repository, and what of it to open then ("" is the whole folder)."""

    files: tuple[str, ...]
    opened: str


Select = Callable[[HubId, Sequence[str]], Selection]
"""(what is asked for, all files of the repository) -> what to fetch. Raises UserError if what is
asked for is not there, or could be several things."""


def hub_id(text: str) -> HubId | None:
    """The id that a text is, or None for a text of another form.

    `owner/repo` is a path if the folder `owner` exists, or if it has the end of a file's name;
    with a revision or a file inside it is always an id.
    """
    found = _ID.fullmatch(text)
    if found is None or ".." in re.split("[/:]", text) or _looks_local(text, found):
        return None
    return HubId(found["repo"], found["revision"], (found["inside"] or "").rstrip("/"))


def _looks_local(text: str, found: re.Match[str]) -> bool:
    owner, _, name = found["repo"].partition("/")
    return text == found["repo"] and (Path(owner).is_dir() or name.endswith(_FILES))


def hint(path: str | Path) -> str:
    """For the message that nothing is at `path`: how a model of the hub is given instead."""
    text = str(path)
    found = _ID.fullmatch(text)
    if found is not None and _looks_local(text, found) and not text.endswith(_FILES):
        owner = text.partition("/")[0]
        return f"{owner} is a folder here; if {text} is a model of the hub, write {text}@main"
    return "a model of the hub is given as owner/repo"


def names_in(found: HubId, names: Sequence[str], folder: str) -> list[str]:
    """The names of a folder's files, folders within it included, relative to it.

    Raises UserError if there is no such folder; "" is the whole repository.
    """
    if not folder:
        return list(names)
    inside = [name.removeprefix(f"{folder}/") for name in names if name.startswith(f"{folder}/")]
    if not inside:
        raise UserError(f"{found.repo} has no {folder}; it has {shown(top_level(names))}")
    return inside


def top_level(names: Sequence[str]) -> list[str]:
    """The files and, with a slash, the folders at the top."""
    return list(dict.fromkeys(re.sub(r"/.*", "/", name) for name in sorted(names)))


def shown(names: Sequence[str]) -> str:
    rest = len(names) - _LISTED
    listed = ", ".join(names[:_LISTED]) or "nothing"
    return f"{listed} and {rest} more" if rest > 0 else listed
