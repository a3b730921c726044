"""Which of a folder's safetensors belong together: shards with their index, and precisions."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

_VARIANT = r"(?:\.(?P<variant>(?:fp|bf|int|float)\d+\w*|non_ema))?"
_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index" + _VARIANT + r"\.json")
_WEIGHTS = re.compile(
    r"(?P<stem>.+?)" + _VARIANT + r"(?P<shard>-\d{5}-of-\d{5})?"
    r"(?:\.(?P<late>(?:fp|bf)16))?\.safetensors"
)


@dataclass(frozen=True)
class WeightSet:
    """The weights of one model in one precision.

    stem: of the files' names. variant: the precision that they name, or "". entry: the file to
    open: an index of shards, or the only file. files: all, the entry included.
    """

    stem: str
    variant: str
    entry: str
    files: tuple[str, ...]


def weight_sets(names: Sequence[str]) -> list[WeightSet]:
    """The sets among the names of a folder's files: one for each stem, of shards without an index
    one for each shard.

    If there are indices, other files do not count. Of several precisions the unnamed one is taken
    (`model.safetensors` before `model.fp16.safetensors`), else bf16, fp16, or the first.
    """
    shards: dict[tuple[str, str], list[str]] = {}
    for name in sorted(names):
        if found := _WEIGHTS.fullmatch(name):
            key = found["stem"], found["variant"] or found["late"] or ""
            shards.setdefault(key, []).append(name)
    indexed = [
        WeightSet(*key, entry=name, files=(name, *shards.get(key, ())))
        for name in sorted(names)
        if (found := _INDEX.fullmatch(name)) and (key := (found["stem"], found["variant"] or ""))
    ]
    single = [WeightSet(*key, name, (name,)) for key, files in shards.items() for name in files]
    best: dict[str, list[WeightSet]] = {}
    for each in indexed or single:
        best.setdefault(each.stem, []).append(each)
    return [each for sets in best.values() for each in _of_the_best_variant(sets)]


def _of_the_best_variant(sets: Sequence[WeightSet]) -> list[WeightSet]:
    order = ("", "bf16", "fp16")
    variants = sorted({each.variant for each in sets})
    chosen = next((each for each in order if each in variants), variants[0])
    return [each for each in sets if each.variant == chosen]
