"""The contents of a LoRA file, in any dialect: two factors for each adapted layer of a model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from taca_jax.errors import UserError
from taca_jax.formats.tensor_files import Shape, summary
from taca_jax.nn.lora import append_lora, linears

LayerId = tuple[str, int | None]
"""A linear layer: its dotted path, and its index in a stack of layers (None: not stacked)."""


@dataclass(frozen=True)
class Factors:
    """Factors of kernel + strength * a b: a `[in, r]`, b `[r, out]`; `name` is as in the file."""

    name: str
    a: np.ndarray
    b: np.ndarray
    strength: float = 1.0

    @property
    def rank(self) -> int:
        return self.a.shape[1]


Adapter = Mapping[LayerId, Factors]


@dataclass(frozen=True)
class LoRASummary:
    """A summary of an adapter; `str()` is one line.

    targets: paths of the layers. left_out: keys in the file that are of text encoders.
    """

    dialect: str
    ranks: tuple[int, ...]
    strengths: tuple[float, ...]
    layers: int
    targets: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        said = f"{self._sizes}, on {_grouped(self.targets)}"
        if not self.left_out:
            return said
        names = summary(self.left_out, limit=3)
        return f"{said}; left out: {len(self.left_out)} tensors of text encoders: {names}"

    @property
    def brief(self) -> str:
        """Without the names of layers and of what is left out."""
        if not self.left_out:
            return self._sizes
        return f"{self._sizes}; left out: {len(self.left_out)} tensors of text encoders"

    @property
    def _sizes(self) -> str:
        return (
            f"{self.dialect} LoRA of {self.layers} layers, rank {_range(self.ranks)}, "
            f"strength {_range(self.strengths)}"
        )


def summarise(adapter: Adapter, dialect: str, left_out: tuple[str, ...] = ()) -> LoRASummary:
    """The summary of an adapter; ranks and strengths are sorted and distinct."""
    return LoRASummary(
        dialect,
        tuple(sorted({factors.rank for factors in adapter.values()})),
        tuple(sorted({factors.strength for factors in adapter.values()})),
        len(adapter),
        tuple(sorted({path for path, _ in adapter})),
        left_out,
    )


def append_adapter(
    adapter: Adapter,
    model: nnx.Module,
    put: Callable[[str, np.ndarray], jax.Array] = lambda _, factor: jnp.asarray(factor),
) -> None:
    """Attaches the factors to the model's layers, in float32, as one more LoRA of it.

    Strengths are multiplied into b, so that all layers of a stack have strength 1. `put` places a
    factor on devices, by its path in the model. The factors must fit (`check_fits`).
    """
    kernels = kernels_of(model)
    depths = {path: kernels[path][0] for path, index in adapter if index is not None}
    factors = {
        path: (put(f"{path}.lora_a", a), put(f"{path}.lora_b", b))
        for path, (a, b) in stacked(adapter, depths).items()
    }
    append_lora(model, factors)


def fill_adapter(adapter: Adapter, model: nnx.Module) -> None:
    """Sets the factors that a model has, of one LoRA, to those of a file, so that they act as it
    does: where a layer has a larger rank, the rest of its b stays as it is, and zero in new ones.

    Layers that the file lacks stay as they are. The model has factors of all of the file's layers.
    """
    layers = dict(linears(model))
    for (path, index), factors in adapter.items():
        layer = layers[path]
        assert layer.lora_a is not None
        assert layer.lora_b is not None
        at = () if index is None else (index,)
        a, b = (np.array(each.get_value()) for each in (layer.lora_a, layer.lora_b))
        a[at][:, : factors.rank] = factors.a
        b[at][: factors.rank] = factors.b * (factors.strength / layer.lora_alpha_over_rank)
        layer.lora_a.set_value(jnp.asarray(a))
        layer.lora_b.set_value(jnp.asarray(b))


def kernels_of(model: nnx.Module) -> dict[str, Shape]:
    """The shapes of the kernels of a model's linear layers, by path."""
    return {path: layer.kernel.shape for path, layer in linears(model)}


def check_fits(adapter: Adapter, kernels: Mapping[str, Shape], where: str) -> None:
    """Raises UserError, with both sizes, for factors that fit none of these kernel shapes."""
    problems = [
        problem
        for (path, index), factors in adapter.items()
        if (problem := _misfit(index, factors, kernels.get(path)))
    ]
    if problems:
        raise UserError(
            f"{where} is a LoRA of another model: {len(problems)} of its {len(adapter)} layers do "
            f"not fit: {summary(problems, limit=4)}"
        )


def depths_of(adapter: Adapter) -> dict[str, int]:
    """For each stacked path, one more than the highest layer that the adapter has."""
    depths: dict[str, int] = {}
    for path, layer in adapter:
        if layer is not None:
            depths[path] = max(depths.get(path, 0), layer + 1)
    return depths


def stacked(
    adapter: Adapter, depths: Mapping[str, int]
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """float32 a and b by path, strengths multiplied into b; layers of a path are stacked.

    depths: number of layers of each stacked path. Missing layers and ranks are filled with zeros.
    """
    members: dict[str, dict[int | None, Factors]] = {}
    for (path, index), factors in adapter.items():
        members.setdefault(path, {})[index] = factors
    arrays = {}
    for path, layers in members.items():
        first = next(iter(layers.values()))
        stack = (depths[path],) if path in depths else ()
        rank = max(factors.rank for factors in layers.values())
        a = np.zeros((*stack, first.a.shape[0], rank), np.float32)
        b = np.zeros((*stack, rank, first.b.shape[1]), np.float32)
        for index, factors in layers.items():
            at = () if index is None else (index,)
            a[at][:, : factors.rank] = factors.a
            b[at][: factors.rank] = factors.b.astype(np.float32) * np.float32(factors.strength)
        arrays[path] = a, b
    return arrays


def adapter_of(model: nnx.Module) -> dict[LayerId, Factors]:
    """The factors attached to a model, strengths multiplied into b; empty if there are none.

    Layers of a stack whose factors are all zero, such as those missing in a file, are left out.
    """
    adapter: dict[LayerId, Factors] = {}
    for path, layer in linears(model):
        if layer.lora_a is None or layer.lora_b is None:
            continue
        a = np.asarray(layer.lora_a.get_value(), np.float32)
        b = np.asarray(layer.lora_b.get_value(), np.float32) * np.float32(
            layer.lora_alpha_over_rank
        )
        adapter |= unstacked(path, a, b)
    return adapter


def unstacked(path: str, a: np.ndarray, b: np.ndarray) -> dict[LayerId, Factors]:
    """The factors of each layer, from `[in, r]`, `[r, out]`, or with a leading layer axis."""
    if a.ndim == 2:
        return {(path, None): Factors(path, a, b)}
    return {
        (path, index): Factors(path, a[index], b[index])
        for index in range(len(a))
        if a[index].any() or b[index].any()
    }


def _misfit(index: int | None, factors: Factors, kernel: Shape | None) -> str | None:
    """The reason why these factors do not fit the kernel, as a message; None if they do."""
    if kernel is None:
        return f"{factors.name} is no layer of this model"
    *stack, inputs, outputs = kernel
    if index is not None and index >= stack[0]:
        return f"{factors.name} is beyond the model's {stack[0]} layers"
    if (factors.a.shape[0], factors.b.shape[1]) != (inputs, outputs):
        return (
            f"{factors.name} maps {factors.a.shape[0]} to {factors.b.shape[1]} channels instead of "
            f"{inputs} to {outputs}"
        )
    return None


def _grouped(paths: Sequence[str]) -> str:
    """The paths, grouped as in `double_blocks (img.out img.qkv.q), img_in`."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        first, _, rest = path.partition(".")
        groups.setdefault(first, []).append(rest)
    return ", ".join(
        f"{first} ({' '.join(rests)})" if any(rests) else first for first, rests in groups.items()
    )


def _range(values: tuple[int, ...] | tuple[float, ...]) -> str:
    low, high = f"{values[0]:g}", f"{values[-1]:g}"
    return low if low == high else f"{low} to {high}"
