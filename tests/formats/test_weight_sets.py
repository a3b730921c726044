"""Which files of a folder are one model's weights."""

import pytest

from taca_jax.formats.weight_sets import weight_sets

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"
FP16 = ["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"]
FP16_INDEX = "model.safetensors.index.fp16.json"
LATE = ["model-00001-of-00001.fp16.safetensors"]


@pytest.mark.parametrize(
    ("names", "entries", "files"),
    [
        (["model.safetensors", "config.json", "model.bin"], ["model.safetensors"], None),
        (["model.safetensors", "model.fp16.safetensors"], ["model.safetensors"], None),
        (["model.fp16.safetensors", "model.bf16.safetensors"], ["model.bf16.safetensors"], None),
        (["a.non_ema.safetensors"], ["a.non_ema.safetensors"], None),
        (["sd3.5_medium.safetensors"], ["sd3.5_medium.safetensors"], None),
        ([*SHARDS, INDEX], [INDEX], [INDEX, *SHARDS]),
        ([*SHARDS, *FP16, FP16_INDEX, INDEX], [INDEX], [INDEX, *SHARDS]),
        ([*FP16, FP16_INDEX], [FP16_INDEX], [FP16_INDEX, *FP16]),
        ([*LATE, FP16_INDEX], [FP16_INDEX], [FP16_INDEX, *LATE]),
        (["a.safetensors", "b.safetensors"], ["a.safetensors", "b.safetensors"], None),
        (SHARDS, SHARDS, None),
        (["flax_model.msgpack"], [], []),
    ],
)
def test_the_files_of_a_folder(names, entries, files):
    found = weight_sets(names)
    assert [each.entry for each in found] == entries
    assert [name for each in found for name in each.files] == (entries if files is None else files)
