"""LoRA files of kohya-ss/sd-scripts, and of trainers that follow it (`lora_unet_...lora_down`).

Layer names have underscores instead of dots. If q, k and v (and an MLP) are one layer, they share
one `lora_down`, or, if they were trained separately, `lora_up` is block-diagonal. alpha is divided
by the rank in the file.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from taca_jax.formats.key_table import Target
from taca_jax.formats.lora.dialect import Dialect, layer_of, pieces_of
from taca_jax.formats.lora.factors import Adapter, Factors

PREFIX = "lora_unet_"
PREFIXES = (PREFIX, "lora_transformer_")

_MLP_RATIO = 4
"""Hidden channels of an MLP, relative to those of its stream, in every released model."""


def tensors_of(
    adapter: Adapter, outputs: Mapping[str, int], dialect: Dialect
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The adapter's tensors in kohya's names, and the file's metadata; alpha is the rank.

    If only some parts of a fused layer have factors, the others get zeros. Their sizes are from
    `outputs`, the output channels by path, else from factors of other blocks, else from the
    proportions of the released models.
    """
    outputs = {path: factors.b.shape[1] for (path, _), factors in adapter.items()} | dict(outputs)
    keys = dict.fromkeys(piece.key for piece in pieces_of(adapter, dialect.table))
    tensors: dict[str, np.ndarray] = {}
    for key in keys:
        targets = dialect.table.find(key)
        factors = [adapter.get(layer_of(target)) for target in targets]
        if any(factors):
            down, up = _joined(targets, factors, outputs)
            module = PREFIX + key.removesuffix(".weight")
            tensors[f"{module}.lora_down.weight"] = down
            tensors[f"{module}.lora_up.weight"] = up
            tensors[f"{module}.alpha"] = np.array(len(down), np.float32)
    rank = max(len(array) for name, array in tensors.items() if name.endswith("down.weight"))
    return tensors, {"ss_network_dim": str(rank), "ss_network_alpha": str(rank)}


def _joined(
    targets: Sequence[Target], parts: Sequence[Factors | None], outputs: Mapping[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """`[r, in]` and `[out, r]` of one of their layers; a block-diagonal pair, unless all share one
    a."""
    there = [part for part in parts if part is not None]
    shared = all(np.array_equal(part.a, there[0].a) for part in there)
    down = there[0].a.T if shared else np.concatenate([part.a.T for part in there])
    rows, start = [], 0
    for target, part in zip(targets, parts, strict=True):
        if part is None:
            path, inputs = layer_of(target)[0], down.shape[1]
            ratio = _MLP_RATIO if path.endswith("mlp_in") else 1
            width = outputs.get(path, int(inputs * ratio))
            rows.append(np.zeros((width, len(down)), np.float32))
            continue
        b = np.zeros((len(down), part.b.shape[1]), np.float32)
        b[start : start + part.rank] = part.b * np.float32(part.strength)
        rows.append(target.transform.store(b))
        start += 0 if shared else part.rank
    return down, np.concatenate(rows)
