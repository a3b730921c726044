"""What is said about the strengths of a LoRA: PEFT's LoraConfig, if there is one with the file.

diffusers has it in the file's metadata, PEFT in `adapter_config.json` beside its
`adapter_model.safetensors`.
"""

import json
import re

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import TensorFiles

PREFIX, PEFT_PREFIX = "transformer.", "base_model.model."
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"


class Alphas:
    """alpha of layers that have no tensor for it, and what alpha is divided by.

    Raises UserError where the LoraConfig is unreadable.
    """

    def __init__(self, tensors: TensorFiles):
        where, text = _config_text(tensors)
        try:
            fields = {k.removeprefix(PREFIX): v for k, v in json.loads(text).items()}
            self._alpha = None if "lora_alpha" not in fields else float(fields["lora_alpha"])
            self._patterns = {
                re.compile(rf"(.*\.)?({k})$"): float(v)
                for k, v in (fields.get("alpha_pattern") or {}).items()
            }
            self._stabilised = bool(fields.get("use_rslora", False))
        except (ValueError, TypeError, AttributeError, re.error, RecursionError) as error:
            raise UserError(f"{where} cannot be read ({error}); write it again") from None

    def alpha(self, module: str, rank: int) -> float:
        """alpha of a layer; patterns are matched as PEFT does, at the end of the name."""
        for pattern, alpha in self._patterns.items():
            if pattern.match(module):
                return alpha
        return float(rank) if self._alpha is None else self._alpha

    def divisor(self, rank: int) -> float:
        """What alpha is divided by: the rank, or its root for rank-stabilised LoRA."""
        return rank**0.5 if self._stabilised else float(rank)


def _config_text(tensors: TensorFiles) -> tuple[str, str]:
    """Where the JSON of a LoraConfig is, in words, and that JSON; an empty one where it is not."""
    if METADATA in tensors.metadata:
        return f"{tensors.where}: its metadata {METADATA}", tensors.metadata[METADATA]
    for name, place in tensors.places.items():
        beside = place.path.with_name(PEFT_CONFIG)
        if name.startswith(PEFT_PREFIX) and beside.is_file():
            return str(beside), beside.read_text(errors="replace")
    return tensors.where, "{}"
