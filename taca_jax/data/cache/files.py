"""The files of a cache beside its records: sizes, indices of shards, and their errors."""

import io
from collections.abc import Sequence

import numpy as np

from taca_jax.data.order import Bucket
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_file
from taca_jax.storage.places import Place

EMPTY, SIZES, SHARDS = "empty.bin", "sizes.npy", "shards"
RECORDS, INDEX = "records.array_record", "index.npy"


def write_sizes(folder: Place, buckets: Sequence[Bucket], count: int, resolution: int) -> None:
    """Writes the size that each of `count` examples is brought to by its bucket.

    The pictures of a bucket without a size are squares of `resolution` pixels a side.
    """
    sizes = np.zeros((count, 2), np.int32)
    for bucket in buckets:
        sizes[np.concatenate(bucket.parts)] = bucket.size or (resolution, resolution)
    with whole_file(folder / SIZES) as file, file.open("wb") as opened:
        np.save(opened, sizes)


def encoded(folder: Place) -> np.ndarray:
    """int64 [m], rising: the indices of the examples that are in whole shards."""
    rows = [index["example"] for _, index in shards(folder)]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *rows]))


def read_sizes(folder: Place) -> np.ndarray:
    """int32 [n, 2], see the module. Raises UserError where it cannot be read."""
    try:
        return _load(folder / SIZES)
    except (FileNotFoundError, ValueError, EOFError) as error:
        raise UserError(f"{folder} is damaged ({error}); remove it to encode anew") from error
    except OSError as error:
        raise not_opened(folder / SIZES, error.strerror or str(error)) from error


def shards(folder: Place) -> list[tuple[Place, np.ndarray]]:
    """The folder and the index of each shard, in the order of their names."""
    paths = sorted(path.parent for path in (folder / SHARDS).glob(f"[!.]*/{INDEX}"))
    return [(path, _read_index(path)) for path in paths]


def _load(file: Place) -> np.ndarray:
    return np.load(io.BytesIO(file.read_bytes()), allow_pickle=False)


def _read_index(shard: Place) -> np.ndarray:
    try:
        return _load(shard / INDEX)
    except (ValueError, EOFError) as error:
        raise damaged_shard(shard, str(error).partition("\n")[0]) from error
    except OSError as error:
        raise not_opened(shard / INDEX, error.strerror or str(error)) from error


def damaged_shard(shard: Place, reason: str) -> UserError:
    return UserError(
        f"{shard} is damaged ({reason}); remove that folder, and start again to encode what was in "
        "it"
    )


def not_opened(file: Place, reason: str) -> UserError:
    return UserError(f"{file} cannot be opened ({reason}); see to that, and start again")
