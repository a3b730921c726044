"""LoRA files that name layers as in another layout: what a dialect is, and how files are read."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import jax.numpy as jnp
import numpy as np

from taca_jax.errors import UserError
from taca_jax.formats.key_table import Piece, Table, Target
from taca_jax.formats.lora.alphas import Alphas
from taca_jax.formats.lora.factors import Adapter, Factors, LayerId, depths_of
from taca_jax.formats.tensor_files import Shape, TensorFiles, summary

_KEY = re.compile(
    r"(?P<module>.+?)\.(?:"
    r"(?P<a>lora_A(\.default)?\.weight|lora_down\.weight|lora\.down\.weight|down\.weight)|"
    r"(?P<b>lora_B(\.default)?\.weight|lora_up\.weight|lora\.up\.weight|up\.weight)|"
    r"(?P<alpha>alpha))"
)
_A, _B, _ALPHA = "a", "b", "alpha"

_REASONS = (
    (r".*(lora_magnitude_vector.*|dora_scale)", "a magnitude of DoRA"),
    (r".*\.(hada_|lokr_|oft_|boft_|a1\.|b1\.).*", "of LyCORIS, no pair of factors"),
    (r".*\.lora_mid\.weight", "a third factor, of a convolution"),
    (r".*\.bias", "a bias"),
    (r".*\.(diff|diff_b|set_weight)", "a whole difference, no pair of factors"),
    (r".*norm.*\.(scale|weight)", "a whole norm, no pair of factors"),
)
"""Keys in files of unsupported adapters, and a description of each."""

_TEXT_ENCODERS = re.compile(r"(lora_te\d?_|(base_model\.model\.)?text_encoders?(_\d)?[._]).*")
"""Keys of text encoders, in all dialects."""


@dataclass(frozen=True)
class Dialect:
    """A naming of layers in LoRA files: the names of `table`, with one of `prefixes`."""

    name: str
    table: Table
    prefixes: tuple[str, ...]

    def find(self, key: str) -> "Key | None":
        """The meaning of a key in such a file; None if it is not of this dialect."""
        match = _KEY.fullmatch(key)
        if match is None:
            return None
        kind = next(kind for kind in (_A, _B, _ALPHA) if match[kind])
        for prefix in self.prefixes:
            if match["module"].startswith(prefix):
                module = match["module"].removeprefix(prefix)
                targets = self.table.find(f"{module}.weight")
                if targets and all(target.path.endswith(_KERNEL) for target in targets):
                    return Key(module, kind, targets)
        return None


_KERNEL = ".kernel"


@dataclass(frozen=True)
class Key:
    """A factor or the alpha of one of their layers, which may be several of ours."""

    module: str
    kind: str
    targets: tuple[Target, ...]


def underscored(table: Table) -> Table:
    """The table's linear layers, with underscores instead of dots in their names."""
    rules = tuple(
        replace(rule, theirs=f"{rule.theirs.removesuffix('.weight').replace('.', '_')}.weight")
        for rule in table.rules
        if rule.ours.endswith(_KERNEL)
    )
    return Table(table.name, rules)


def pieces_of(adapter: Adapter, table: Table) -> list[Piece]:
    """The kernels of the adapter's layers in the table's layout, with all layers of their stacks.

    Raises UserError for a layer that is a convolution there, or is not in the table.
    """
    depths = depths_of(adapter)
    shapes = {
        f"{path}.kernel": (
            *((depths[path],) if path in depths else ()),
            factors.a.shape[0],
            factors.b.shape[1],
        )
        for (path, _), factors in adapter.items()
    }
    try:
        pieces = list(table.pieces(shapes))
    except LookupError as error:
        raise UserError(f"these factors have no names in {table.name}: {error}") from None
    others = sorted({piece.path for piece in pieces if len(piece.shape) != 2})
    if others:
        raise UserError(
            f"{summary(others)} is a convolution in {table.name}, whose factors are not written; "
            "leave it out of lora.targets"
        )
    return pieces


def is_text_encoders(key: str) -> bool:
    """Whether a key is of a text encoder, in any dialect."""
    return _TEXT_ENCODERS.fullmatch(key) is not None


def layer_of(target: Target) -> LayerId:
    """The layer that has this kernel."""
    return target.path.removesuffix(_KERNEL), target.layer


def parse(tensors: TensorFiles, dialect: Dialect) -> dict[LayerId, Factors]:
    """The file's factors, without those of text encoders.

    A layer's strength is alpha / rank, with the rank in the file; alpha is the layer's `.alpha`
    tensor, else that of a LoraConfig, else the rank. A layer of theirs that is several of ours is
    split, and each part drops the ranks in which its b is zero. Raises one UserError that lists all
    keys that are not used, and factors whose shapes do not fit each other.
    """
    modules: dict[str, dict[str, str]] = {}
    targets: dict[str, tuple[Target, ...]] = {}
    problems = [f"{key} is there twice" for key in tensors.duplicates]
    for key in tensors.shapes:
        if is_text_encoders(key):
            continue
        if (found := dialect.find(key)) is None:
            problems.append(_unknown(key))
            continue
        targets[found.module] = found.targets
        other = modules.setdefault(found.module, {}).setdefault(found.kind, key)
        if other != key:
            problems.append(f"{key} and {other} are the same factor")
    for keys in modules.values():
        problems += [
            f"{key} is of {tensors.dtypes[key]}, quantised in a way that is not read"
            for kind, key in keys.items()
            if kind != _ALPHA and not jnp.issubdtype(tensors.dtypes[key], jnp.floating)
        ]
    for module, keys in modules.items():
        problems += _unusable(keys, tensors.shapes, len(targets[module]))
    if problems or not modules:
        listed = summary(problems) or "it holds no factors of it"
        raise UserError(
            f"{tensors.where} is no LoRA of {dialect.table.name}: {listed}; "
            "give a file that was trained for this kind of model"
        )
    alphas = Alphas(tensors)
    adapter: dict[LayerId, Factors] = {}
    for module, keys in modules.items():
        a, b = (tensors.read(keys[kind]).astype(np.float32) for kind in (_A, _B))
        rank = a.shape[0]
        alpha = tensors.read(keys[_ALPHA]).item() if _ALPHA in keys else alphas.alpha(module, rank)
        name = _KEY.sub(r"\g<module>", keys[_A])
        if not math.isfinite(alpha):
            raise UserError(f"{tensors.where}: alpha of {name} is {alpha}; train or save it again")
        whole = Factors(name, a.T, b, float(alpha) / alphas.divisor(rank))
        adapter.update(_cut(whole, targets[module]))
    return adapter


def _cut(whole: Factors, targets: Sequence[Target]) -> Iterator[tuple[LayerId, Factors]]:
    """The factors of each of our layers; `whole.b` is `[out, r]`, as in the file."""
    if len(targets) == 1:
        yield layer_of(targets[0]), replace(whole, b=targets[0].transform.load(whole.b))
        return
    # In every layout that fuses layers, all parts but the last have as many outputs as inputs.
    width = whole.a.shape[0]
    cuts = [width * part for part in range(1, len(targets))]
    for target, rows in zip(targets, np.split(whole.b, cuts), strict=True):
        b = target.transform.load(rows)
        used: np.ndarray = np.any(b, axis=1, keepdims=True)[:, 0]
        used[0] |= not used.any()  # at least rank 1 remains
        yield layer_of(target), replace(whole, a=whole.a[:, used], b=b[used])


def _unknown(key: str) -> str:
    for pattern, what in _REASONS:
        if re.fullmatch(pattern, key):
            return f"{key} is {what}, which is not supported"
    return f"{key} is unknown"


def _unusable(keys: Mapping[str, str], shapes: Mapping[str, Shape], parts: int) -> list[str]:
    if _A not in keys or _B not in keys:
        return [f"{next(iter(keys.values()))} is without its other factor"]
    a, b = shapes[keys[_A]], shapes[keys[_B]]
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or not a[0]:
        return [f"{keys[_A]} is {a} and {keys[_B]} is {b}; expected (rank, in) and (out, rank)"]
    if b[0] <= a[1] * (parts - 1):
        return [f"{keys[_B]} is {b}; expected {parts} times {a[1]} rows or more"]
    if _ALPHA in keys and shapes[keys[_ALPHA]] not in ((), (1,)):
        return [f"{keys[_ALPHA]} is {shapes[keys[_ALPHA]]} instead of one number"]
    return []
