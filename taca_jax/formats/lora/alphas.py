"""The alphas of a LoRA file that are not among its tensors: those of PEFT's LoraConfig, if any.

diffusers stores the LoraConfig in the file's metadata, PEFT in `adapter_config.json` beside its
`adapter_model.safetensors`.
"""

import json
import re

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import TensorFiles

PREFIX, PEFT_PREFIX = "transformer.", "base_model.model."
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"


class Alphas:
    """The alpha of layers that have no tensor for it, and its divisor.

    Raises UserError if the LoraConfig is unreadable.
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
        """The alpha of a layer; patterns match the end of its name, as in PEFT."""
        for pattern, alpha in self._patterns.items():
            if pattern.match(module):
                return alpha
        return float(rank) if self._alpha is None else self._alpha

    def divisor(self, rank: int) -> float:
        """The divisor of alpha: the rank, or its square root for rank-stabilised LoRA."""
        return rank**0.5 if self._stabilised else float(rank)


def _config_text(tensors: TensorFiles) -> tuple[str, str]:
    """The source of the LoraConfig, for messages, and its JSON; `{}` if there is none."""
    if METADATA in tensors.metadata:
        return f"{tensors.where}: its metadata {METADATA}", tensors.metadata[METADATA]
    for name, stored in tensors.stored.items():
        beside = stored.path.with_name(PEFT_CONFIG)
        if name.startswith(PEFT_PREFIX) and beside.is_file():
            return str(beside), beside.read_text(errors="replace")
    return tensors.where, "{}"
