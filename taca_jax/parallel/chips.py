"""The generations of TPU, by what JAX calls their devices."""

_GENERATIONS = {
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
}


def generation(device_kind: str) -> str | None:
    """`v5e`, `v5p` or `v6e`; None for any other device."""
    return _GENERATIONS.get(device_kind)
