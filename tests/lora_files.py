"""LoRA files of random factors in several dialects, and whether two of them do the same."""

import numpy as np

from taca_jax.weights.lora_files import LoRAFile

Pair = tuple[np.ndarray, np.ndarray, float]
"""down `[r, in]`, up `[out, r]` and alpha of a layer."""

LORA_AB = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")


def named(pairs: dict[str, Pair], rename, down: str, up: str, alpha: bool = True) -> dict:
    tensors = {}
    for name, (a, b, strength) in pairs.items():
        scale = np.float32(1 if alpha else strength / len(a))  # in what knows no alpha: in up
        tensors[f"{rename(name)}.{down}"], tensors[f"{rename(name)}.{up}"] = a, b * scale
        if alpha:
            tensors[f"{rename(name)}.alpha"] = np.array(strength, np.float32)
    return tensors


def deltas(file: LoRAFile) -> dict:
    """What each layer's kernel gets, `[in, out]`."""
    return {
        place: factors.a.astype(np.float64) @ factors.b * factors.strength
        for place, factors in file.adapter.items()
    }


def same_deltas(ours: LoRAFile, theirs: LoRAFile) -> None:
    given, expected = deltas(ours), deltas(theirs)
    assert given.keys() == expected.keys()
    for place, delta in expected.items():
        error = np.linalg.norm(given[place] - delta)
        assert error <= 1e-6 * np.linalg.norm(delta), place
