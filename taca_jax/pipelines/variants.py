"""Ways of sampling one model that are set side by side."""

from dataclasses import dataclass

from taca_jax.taca import TacaConfig


@dataclass(frozen=True)
class Variant:
    """One way of sampling: TACA's settings (None: plain) and the LoRA's strength under them."""

    name: str
    taca: TacaConfig | None
    lora_strength: float
