"""The embeddings of a few prompts in a cache, of which samples are drawn while training."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from taca_jax.data.cache.writer import Caption
from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import open_tensors, write_tensors
from taca_jax.storage.fetching import fetch
from taca_jax.storage.places import Place, in_bucket, stats

PROMPTS = "prompts.safetensors"
"""The file, in the cache's folder; a cache that was made without such prompts has none."""

_TEXTS = "prompts"  # in the file's metadata: the prompts as a JSON list


def write_prompts(folder: Place, prompts: Mapping[str, Caption]) -> None:
    """Writes all prompts of a cache. Raises UserError if they cannot be written."""
    arrays = {
        name: np.stack([caption[name] for caption in prompts.values()])
        for name in ("txt", "pooled")
    }
    write_tensors(folder / PROMPTS, arrays, {_TEXTS: json.dumps([*prompts])})


def read_prompts(folder: Place) -> dict[str, Caption]:
    """The prompts that a cache has. Raises UserError for a damaged file."""
    file = folder / PROMPTS
    if (found := stats([file])[0]) is None:
        return {}
    copy = fetch(folder, {PROMPTS: found}) / PROMPTS if in_bucket(folder) else file
    tensors = open_tensors(Path(copy))
    try:
        texts = json.loads(tensors.metadata[_TEXTS])
        txt, pooled = tensors.read("txt"), tensors.read("pooled")
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}); remove it to encode them anew") from error
    return {text: Caption(txt=txt[i], pooled=pooled[i]) for i, text in enumerate(texts)}
