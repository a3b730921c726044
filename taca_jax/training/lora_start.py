"""The LoRA file that a run starts from (`lora.init`)."""

import re
from typing import Any

from taca_jax.errors import UserError
from taca_jax.families.base import Family
from taca_jax.formats.lora.factors import check_fits
from taca_jax.formats.tensor_files import summary
from taca_jax.nn.lora import LoRAConfig
from taca_jax.weights.hub_files import lora_files
from taca_jax.weights.lora_files import LoRAFile, check_lora_file, kernel_shapes, load_adapter
from taca_jax.weights.shipped import find_weights


def check_start(lora: LoRAConfig | None, family: Family, transformer: Any) -> None:
    """Raises UserError for a file of `lora.init` that is absent, damaged or of another model, as
    far as its header shows."""
    if lora is not None and lora.init is not None:
        check_lora_file(find_weights(lora.init, lora_files), family, transformer)


def open_start(lora: LoRAConfig | None, family: Family, transformer: Any) -> LoRAFile | None:
    """The file of `lora.init` for a transformer of this config; None if there is none.

    Raises UserError for a file that is absent, damaged or of another model, and for one that has
    layers which are not targets, or a larger rank than is trained.
    """
    if lora is None or lora.init is None:
        return None
    file = load_adapter(find_weights(lora.init, lora_files), family, transformer)
    check_fits(file.adapter, kernel_shapes(transformer), lora.init)
    targets = family.lora.targets if lora.targets is None else lora.targets
    beyond = {
        path: None
        for path, _ in file.adapter
        if not any(re.fullmatch(target, path) for target in targets)
    }
    if beyond:
        raise UserError(
            f"lora.init={lora.init} has factors of {summary([*beyond])}, which are no targets of "
            "this run; add them to lora.targets"
        )
    rank = max(file.summary.ranks)
    if rank > lora.rank:
        raise UserError(
            f"lora.init={lora.init} is of rank {rank}, and lora.rank is {lora.rank}; set "
            f"lora.rank={rank} or more"
        )
    return file
