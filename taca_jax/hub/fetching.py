"""Fetches files of models from a Hugging Face hub into the cache that its library keeps.

The library resumes what was interrupted, takes the token of `hf auth login` or HF_TOKEN, and
draws progress bars; HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are its settings. It takes a third of
a second to import: import this module where something is fetched.
"""

import functools
import glob
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from httpx2 import HTTPError
from huggingface_hub import (
    HfApi,
    constants,
    get_cached_repo_tree,
    get_token,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)
from huggingface_hub.utils import disable_progress_bars
from rich.filesize import decimal

from taca_jax.errors import UserError
from taca_jax.hub.ids import FORMS, HubId, Select, shown

_LOG = logging.getLogger(__name__)

_CONFIG_OF = {"tokenizer": "tokenizer_config.json", "scheduler": "scheduler_config.json"}
"""Of the parts of a diffusers pipeline whose config.json has another name."""

_CONNECTIONS = 8
"""For headers, each of which is a question to the hub."""

_LOGIN = "log in with `hf auth login`, or set HF_TOKEN"


@functools.cache
def fetch(found: HubId, select: Select, *, download: bool = True) -> Path:
    """The local path of what `select` opens of a repository, with everything that it selects.

    Only files that are not in the cache are fetched, and the hub is asked once a process. If it
    does not answer, the cache must have all of them; without `download` it is not asked. Raises
    UserError for a repository, revision or file that is not there or may not be read, and for what
    the cache lacks.
    """
    refused: Exception | None = None
    if download:
        try:
            info = HfApi().model_info(found.repo, revision=found.revision, files_metadata=True)
        except (HTTPError, OSError) as error:  # of the hub, and of the connection to it
            refused = error
        else:
            sizes = {each.rfilename: each.size or 0 for each in info.siblings or ()}
            return _fetched(found, select, sizes, info.sha)
    return _cached(found, select, refused)


def fetch_headers(found: HubId, select: Select, folder: Path) -> Path:
    """Like `fetch`, but of weights that the cache lacks only headers are fetched.

    The files appear in a `folder` of the caller's: those in the cache as links, and other weights
    as files that have their headers, and a hole where the tensors are. Raises UserError as `fetch`
    does.
    """
    try:
        info = HfApi().model_info(found.repo, revision=found.revision)
    except (HTTPError, OSError):
        return fetch(found, select)  # which says why, or takes what is in the cache
    selection = select(found, [each.rfilename for each in info.siblings or ()])
    weights = [name for name in selection.files if name.endswith(".safetensors")]
    others = [name for name in selection.files if name not in weights]
    root = _downloaded(found, others) if others else folder

    def write(name: str) -> None:
        made = folder / found.repo / name
        made.parent.mkdir(parents=True, exist_ok=True)
        cached = try_to_load_from_cache(found.repo, name, revision=info.sha)
        if isinstance(cached, str):
            made.symlink_to(cached)
        elif name in weights:
            _write_header(found, name, info.sha, made)
        else:
            made.symlink_to(root / name)

    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        list(pool.map(write, selection.files))  # which raises what `write` does
    return folder / found.repo / selection.opened


def _write_header(found: HubId, name: str, commit: str | None, made: Path) -> None:
    """Writes a safetensors file with the header of the hub's, and a hole in place of its data."""
    try:
        header = HfApi().parse_safetensors_file_metadata(found.repo, name, revision=commit)
    except SafetensorsParsingError as error:
        raise UserError(f"{found.repo}:{name} is no safetensors file ({error})") from error
    except (HTTPError, OSError) as error:
        raise UserError(_why(found, error)) from error
    entries: dict[str, object] = {"__metadata__": header.metadata} if header.metadata else {}
    for tensor, about in header.tensors.items():
        offsets = list(about.data_offsets)
        entries[tensor] = {"dtype": about.dtype, "shape": about.shape, "data_offsets": offsets}
    text = json.dumps(entries).encode()
    end = max((about.data_offsets[1] for about in header.tensors.values()), default=0)
    with made.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def _fetched(found: HubId, select: Select, sizes: Mapping[str, int], commit: str | None) -> Path:
    selection = select(found, list(sizes))
    absent = [
        name
        for name in selection.files
        if not isinstance(try_to_load_from_cache(found.repo, name, revision=commit), str)
    ]
    if absent:
        size = decimal(sum(sizes[name] for name in absent))
        files = f"{len(absent)} files" if len(absent) > 1 else absent[0]
        _LOG.warning("fetching %s (%s) of %s", files, size, found.repo)
    return _downloaded(found, selection.files) / selection.opened


def _downloaded(found: HubId, names: Sequence[str]) -> Path:
    """The folder of a repository in the cache, with these files."""
    try:
        # Names are patterns here. The revision by its name, which is so found offline too.
        with _bars_of_terminals():
            folder = snapshot_download(
                found.repo,
                revision=found.revision,
                allow_patterns=[glob.escape(name) for name in names],
            )
    except (HTTPError, OSError) as error:
        if isinstance(error, RepositoryNotFoundError):
            raise UserError(_why(found, error)) from error
        raise UserError(
            f"{found.repo} could not be fetched whole ({_first_line(error)}); the same command "
            "goes on where it stopped"
        ) from error
    return Path(folder)


def _bars_of_terminals() -> AbstractContextManager[object]:
    """Within it the library draws its bars on a terminal only; one of them it draws everywhere."""
    if sys.stderr.isatty() or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None:
        return nullcontext()
    return disable_progress_bars()


def _cached(found: HubId, select: Select, refused: Exception | None) -> Path:
    why = "nothing is fetched here" if refused is None else _why(found, refused)
    try:
        # With no pattern nothing has to be there; the folder is found by branch, tag or commit.
        folder = Path(
            snapshot_download(
                found.repo, revision=found.revision, local_files_only=True, allow_patterns=[]
            )
        )
    except LocalEntryNotFoundError:
        if isinstance(refused, RepositoryNotFoundError | RevisionNotFoundError):
            raise UserError(why) from refused
        raise UserError(
            f"{found} is not here, nor as a model of the hub in its cache "
            f"({constants.HF_HUB_CACHE}): {why}"
        ) from refused
    names = _names_of(found, folder)
    try:
        selection = select(found, names)
    except UserError as error:
        raise UserError(f"{error}, as far as the cache knows: {why}") from refused
    if absent := [name for name in selection.files if not (folder / name).is_file()]:
        raise UserError(
            f"the cache lacks {len(absent)} files of {found.repo}: {shown(absent)}; {why}"
        ) from refused
    if refused is not None:
        _LOG.warning("%s is taken from the cache: %s", found, why)
    return folder / selection.opened


def _names_of(found: HubId, folder: Path) -> list[str]:
    """The files of a repository as its cached listing has them, else those in the cache with what
    their indices name."""
    try:
        tree = get_cached_repo_tree(found.repo, revision=found.revision)
    except CachedRepoTreeNotFoundError:
        here = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
        return sorted(here.union(*(_named_by(folder, name) for name in here)))
    return [each.path for each in tree]


def _named_by(folder: Path, name: str) -> set[str]:
    """The files that an index of shards, or of a diffusers pipeline, says there are."""
    file = folder / name
    if not (file.name == "model_index.json" or ".safetensors.index." in file.name):
        return set()
    try:
        content = json.loads(file.read_text())
        if file.name == "model_index.json":
            return {
                f"{part}/{_CONFIG_OF.get(part.partition('_')[0], 'config.json')}"
                for part, value in content.items()
                if isinstance(value, list) and value[0] is not None
            }
        parent = Path(name).parent
        return {(parent / shard).as_posix() for shard in content["weight_map"].values()}
    except (ValueError, LookupError, AttributeError, TypeError):
        raise UserError(f"{file} is no index; remove it, and fetch it again") from None


def _why(found: HubId, error: Exception) -> str:
    """Why the hub did not give what was asked for, and what to do."""
    page = f"{constants.ENDPOINT}/{found.repo}"
    if isinstance(error, GatedRepoError):
        return (
            f"{found.repo} is gated: accept its licence at {page}, then {_LOGIN} (a token of the "
            "account that accepted it)"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{found.repo} has no revision {found.revision} (the hub: {page})"
    if isinstance(error, RepositoryNotFoundError):
        token = "it has refused your token" if get_token() else f"it is private: {_LOGIN}"
        return (
            f"{found} is not here, and no public model of the hub ({page}); an id has the form "
            f"{FORMS}. Or {token}"
        )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so that the hub is not asked"
    return f"{constants.ENDPOINT} could not be reached ({_first_line(error)})"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
