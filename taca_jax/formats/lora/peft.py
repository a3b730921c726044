"""LoRA files in PEFT's layout, as diffusers and PEFT read and write them."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from taca_jax.formats.key_table import Table
from taca_jax.formats.lora.alphas import METADATA, PREFIX
from taca_jax.formats.lora.dialect import pieces_of
from taca_jax.formats.lora.factors import Adapter


def tensors_of(adapter: Adapter, table: Table) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The adapter's tensors in PEFT's names, and the file's metadata; alpha is the rank."""
    modules = {
        (piece.path.removesuffix(".kernel"), piece.layer): (
            piece.key.removesuffix(".weight"),
            piece.transform,
        )
        for piece in pieces_of(adapter, table)
    }
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for layer, factors in adapter.items():
        module, transform = modules[layer]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = factors.a.T
        tensors[f"{PREFIX}{module}.lora_B.weight"] = transform.store(
            factors.b * np.float32(factors.strength)
        )
        ranks[module] = factors.rank
    return tensors, {"format": "pt", METADATA: json.dumps(_metadata(ranks), sort_keys=True)}


def _metadata(ranks: Mapping[str, int]) -> dict[str, Any]:
    """The fields of PEFT's LoraConfig, with diffusers' prefix."""
    rank = max(ranks.values())
    others = {f"^{module}": other for module, other in ranks.items() if other != rank}
    return {
        f"{PREFIX}r": rank,
        f"{PREFIX}lora_alpha": rank,
        f"{PREFIX}rank_pattern": others,
        f"{PREFIX}alpha_pattern": others,
        f"{PREFIX}target_modules": sorted(ranks),
    }
