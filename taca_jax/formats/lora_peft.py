"""LoRA files in PEFT's layout: those that diffusers writes and reads for FLUX, and PEFT's own.

They differ in how names begin, and in where the strengths are: diffusers has them in the file's
metadata, PEFT in `adapter_config.json` beside its `adapter_model.safetensors`.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from taca_jax.errors import UserError
from taca_jax.formats import flux_diffusers
from taca_jax.formats.lora_factors import Adapter, Factors, Place, depths_of
from taca_jax.formats.table import Table, Transform
from taca_jax.tensor_files import TensorFiles, summary

PREFIX, PEFT_PREFIX = "transformer.", "base_model.model."
METADATA, PEFT_CONFIG = "lora_adapter_metadata", "adapter_config.json"

_KEY = re.compile(
    rf"({re.escape(PREFIX)}|{re.escape(PEFT_PREFIX)})?"
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|alpha)"
)
_A, _B, _ALPHA = "lora_A.weight", "lora_B.weight", "alpha"


def parse(tensors: TensorFiles, table: Table = flux_diffusers.TABLE) -> dict[Place, Factors]:
    """The file's factors; names may begin with `transformer.`, `base_model.model.` or neither.

    A layer's strength is alpha / rank; alpha is its `.alpha` tensor, else what the metadata says
    (or, of names with PEFT's own prefix, `adapter_config.json` beside the file), else the rank.
    Every key is used: raises one UserError that names those that are of no layer of the model or
    have no partner, and factors whose shapes do not fit each other.
    """
    modules: dict[str, dict[str, str]] = {}
    problems = [f"{key} is there twice" for key in tensors.duplicates]
    for key in tensors.shapes:
        match = _KEY.fullmatch(key)
        if match is None or table.find(f"{match['module']}.weight") is None:
            problems.append(f"{key} is unknown")
        elif match["part"] in modules.setdefault(match["module"], {}):
            other = modules[match["module"]][match["part"]]
            problems.append(f"{key} and {other} are the same factor")
        else:
            modules[match["module"]][match["part"]] = key
    for module, keys in modules.items():
        problems += _unusable(module, keys, tensors)
    if problems or not modules:
        listed = summary(problems) or "it holds no lora_A and lora_B"
        raise UserError(
            f"{tensors.where} is no LoRA of {table.name}: {listed}; "
            "give a file that was trained for this kind of model"
        )
    config = _Config(tensors)
    adapter: dict[Place, Factors] = {}
    for module, keys in modules.items():
        path, layer, transform = _find(table, module)
        a, b = tensors.read(keys[_A]), tensors.read(keys[_B])
        rank = a.shape[0]
        alpha = tensors.read(keys[_ALPHA]).item() if _ALPHA in keys else config.alpha(module, rank)
        adapter[path, layer] = Factors(
            name=keys[_A].removesuffix("." + _A),
            a=a.astype(np.float32).T,
            b=transform.load(b.astype(np.float32)),
            strength=alpha / config.divisor(rank),
        )
    return adapter


def tensors_of(
    adapter: Adapter, table: Table = flux_diffusers.TABLE
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The adapter's tensors in PEFT's names, and the file's metadata; alpha is the rank."""
    depths = depths_of(adapter)
    modules = {
        (path, piece.layer): (piece.key.removesuffix(".weight"), piece.transform)
        for path in dict.fromkeys(path for path, _ in adapter)
        for piece in table.pieces(
            {f"{path}.kernel": (depths[path], 1, 1) if path in depths else (1, 1)}
        )
    }
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    for place, factors in adapter.items():
        module, transform = modules[place]
        tensors[f"{PREFIX}{module}.{_A}"] = factors.a.T
        tensors[f"{PREFIX}{module}.{_B}"] = transform.store(
            factors.b * np.float32(factors.strength)
        )
        ranks[module] = factors.rank
    return tensors, {"format": "pt", METADATA: json.dumps(_metadata(ranks), sort_keys=True)}


def _metadata(ranks: Mapping[str, int]) -> dict[str, Any]:
    """What PEFT's LoraConfig needs to know, under diffusers' prefix."""
    rank = max(ranks.values())
    others = {f"^{module}": other for module, other in ranks.items() if other != rank}
    return {
        f"{PREFIX}r": rank,
        f"{PREFIX}lora_alpha": rank,
        f"{PREFIX}rank_pattern": others,
        f"{PREFIX}alpha_pattern": others,
        f"{PREFIX}target_modules": sorted(ranks),
    }


def _find(table: Table, module: str) -> tuple[str, int | None, Transform]:
    found = table.find(f"{module}.weight")
    assert found is not None  # parse has looked
    path, layer, transform = found
    return path.removesuffix(".kernel"), layer, transform


def _unusable(module: str, keys: Mapping[str, str], tensors: TensorFiles) -> list[str]:
    missing = [part for part in (_A, _B) if part not in keys]
    if missing:
        return [f"{module} is without {' and '.join(missing)}"]
    a, b = tensors.shapes[keys[_A]], tensors.shapes[keys[_B]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        return [f"{keys[_A]} is {a} and {keys[_B]} is {b}; expected (rank, in) and (out, rank)"]
    if _ALPHA in keys and tensors.shapes[keys[_ALPHA]] not in ((), (1,)):
        return [f"{keys[_ALPHA]} is {tensors.shapes[keys[_ALPHA]]} instead of one number"]
    return []


class _Config:
    """What is said about strengths: PEFT's LoraConfig, if there is one in or beside the file."""

    def __init__(self, tensors: TensorFiles):
        where, text = _config_text(tensors)
        try:
            fields = {k.removeprefix(PREFIX): v for k, v in json.loads(text).items()}
            self._alpha = None if "lora_alpha" not in fields else float(fields["lora_alpha"])
            self._patterns = {k: float(v) for k, v in (fields.get("alpha_pattern") or {}).items()}
            self._stabilised = bool(fields.get("use_rslora", False))
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{where} cannot be read ({error}); write it again") from None

    def alpha(self, module: str, rank: int) -> float:
        """alpha of a layer; patterns are matched as PEFT does, at the end of the name."""
        for pattern, alpha in self._patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return alpha
        return float(rank) if self._alpha is None else self._alpha

    def divisor(self, rank: int) -> float:
        """What alpha is divided by: the rank, or its root for rank-stabilised LoRA."""
        return rank**0.5 if self._stabilised else float(rank)


def _config_text(tensors: TensorFiles) -> tuple[str, str]:
    """Where the JSON of a LoraConfig is, in words, and that JSON; an empty one where it is not."""
    if METADATA in tensors.metadata:
        return f"{tensors.where}: its metadata {METADATA}", tensors.metadata[METADATA]
    for name, (file, _) in tensors.places.items():
        beside = file.with_name(PEFT_CONFIG)
        if name.startswith(PEFT_PREFIX) and beside.is_file():
            return str(beside), beside.read_text(errors="replace")
    return tensors.where, "{}"
