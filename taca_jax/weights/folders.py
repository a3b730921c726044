"""Model folders: `config.json` and, if the model has parameters, `model.safetensors`.

`config.json` holds the fields of the model's config and its `kind`. Parameters are named by their
dotted path ("double_blocks.img.qkv.q.kernel"; stacked blocks are one array with a leading layer
axis). LoRA factors are never part of a model folder.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from taca_jax.config.json_text import from_json, to_tree
from taca_jax.errors import UserError
from taca_jax.formats.atomic import whole_folder
from taca_jax.formats.tensor_files import (
    ArrayTensors,
    LazyTensor,
    Tensors,
    differences,
    in_file_order,
    open_tensors,
    write_streamed,
)
from taca_jax.nn.kinds import abstract_model, flat_params, kind_of, shapes_of
from taca_jax.nn.layers import Quantized
from taca_jax.parallel.processes import is_first, wait_for_all
from taca_jax.storage.places import Place, place
from taca_jax.weights.kinds import model_kinds
from taca_jax.weights.loading import AT_ONCE, LoadOptions, StoredParameters, load_parameters

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PIPELINE_FILE = "pipeline.json"
"""In the folder that contains the model folders of a pipeline."""

_ORBAX = "params"
"""The folder of the parameters in model folders of earlier versions."""


def save_model(path: Place | str, model: Any, *, dtype: DTypeLike | None = None) -> None:
    """Writes a model folder atomically; an existing model folder is replaced.

    Parameters are stored in `dtype`, or in their own if None, and moved to the host one layer at a
    time. With several processes all must call this: the first one writes. Raises UserError if
    `path` holds something else or cannot be written, and for a quantised model.
    """
    path = place(path)
    if path.exists() and not (path / CONFIG).is_file() and (path.is_file() or any(path.iterdir())):
        raise UserError(f"{path} exists and is no model folder; remove it or save elsewhere")
    params = flat_params(model)
    if any(isinstance(param, Quantized) for param in params.values()):
        raise UserError(
            f"{path}: a quantised model is not written; keep the one that it was made of, and "
            "quantise as you load it"
        )
    tensors = {name: _lazy(param, dtype) for name, param in params.items()}
    if is_first():
        save_streamed(path, model.config, tensors)
    else:
        for name in in_file_order(tensors):
            for _ in tensors[name].pieces():
                pass
    wait_for_all(f"a model in {path.name}")


def save_streamed(path: Place, config: Any, tensors: Mapping[str, LazyTensor]) -> None:
    """Writes a model folder of parameters, by path, that need not fit into memory."""
    with whole_folder(path, CONFIG) as folder:
        if tensors:
            write_streamed(folder / WEIGHTS, tensors)
        (folder / CONFIG).write_text(_config_text(config))


def load_config(path: Path | str) -> Any:
    """The config of a model folder; its class is that of the model's kind.

    Raises UserError if config.json is missing, of an unknown kind, or does not fit its kind.
    """
    file = Path(path) / CONFIG
    try:
        tree = json.loads(file.read_text())
    except OSError:
        raise UserError(
            f"{path} is no model folder: it has no readable {CONFIG}; convert the original weights "
            "with `taca-convert`"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); write the folder again") from None
    kinds = model_kinds()
    name = tree.pop("kind", None) if isinstance(tree, dict) else None
    if not isinstance(name, str) or name not in kinds:
        hint = "; original weights need `taca-convert` first" if name is None else ""
        raise UserError(f"{file} says kind {name!r}; expected one of {', '.join(kinds)}{hint}")
    return from_json(kinds[name].config, json.dumps(tree), where=str(file))


def load_model(path: Path | str, options: LoadOptions) -> Any:
    """Loads the model of a folder.

    Raises UserError that lists everything missing, left over or mis-shaped, for files that are
    absent, truncated or damaged, and for a model that cannot be quantised.
    """
    path = Path(path)
    config = load_config(path)
    if not shapes_of(config):  # pixels have no parameters
        return abstract_model(config, dtype=options.dtype)
    tensors = check_model(path)
    stored = StoredParameters(tensors.dtypes, lambda name, part: _read(tensors, name, part))
    return load_parameters(config, stored, options)


def check_model(path: Path) -> Tensors:
    """The parameters of a model folder, not yet read, which fit its config.

    Raises UserError that lists everything missing, left over or mis-shaped, and for files that are
    absent, truncated or damaged.
    """
    config, tensors = load_config(path), open_parameters(path)
    if problems := differences(shapes_of(config), tensors.shapes):
        raise UserError(f"{path} does not fit its {CONFIG}: {'; '.join(problems)}")
    return tensors


def open_parameters(path: Path) -> Tensors:
    """The parameters of a model folder by dotted path, not yet read; empty if the model has none.
    Raises UserError if they are absent or damaged."""
    if (path / WEIGHTS).is_file():
        return open_tensors(path / WEIGHTS)
    config = load_config(path)
    if (path / _ORBAX).is_dir():
        raise UserError(
            f"{path} was written by an older version, with its parameters in {_ORBAX}/; make it "
            f"anew: taca-convert {kind_of(config).name} --src ORIGINAL --dst NEW_FOLDER"
        )
    if shapes_of(config):
        raise UserError(f"{path} has no {WEIGHTS}; write the folder again")
    return ArrayTensors(str(path), {})


def _read(tensors: Tensors, name: str, part: tuple[slice, ...]) -> np.ndarray:
    """Reads whole rows, which are contiguous in the file, and slices them in memory: rows of each
    layer in a stack, of the first axis otherwise."""
    rows = min(len(part), 2 if len(part) > 2 else 1)
    return tensors.read(name, *part[:rows])[(slice(None),) * rows + part[rows:]]


def _lazy(param: nnx.Variable, dtype: DTypeLike | None) -> LazyTensor:
    array = param.get_value()
    target = jnp.dtype(array.dtype if dtype is None else dtype)

    def pieces() -> Iterator[np.ndarray]:
        whole = array.ndim < 3 or array.nbytes <= AT_ONCE
        for layer in [None] if whole else range(array.shape[0]):
            yield np.asarray(_copied(array, layer)).astype(target, copy=False)

    return LazyTensor(array.shape, target, pieces)


def _copied(array: jax.Array, layer: int | None) -> jax.Array:
    """A copy of an array, or of one layer of a stack, which this process has all of.

    It is a copy since what numpy is given of an array stays on the host as long as the array does.
    """
    if not array.is_fully_addressable:
        where = array.sharding
        assert isinstance(where, NamedSharding)
        return _taken(array, layer, NamedSharding(where.mesh, P()))
    if layer is None:
        return jax.device_put(array, array.sharding, may_alias=False)
    return _taken(array, layer, None)


@jax.jit(static_argnames=("where",))
def _taken(array: jax.Array, layer: int | None, where: Sharding | None) -> jax.Array:
    if layer is not None:
        array = jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
    return array if where is None else jax.lax.with_sharding_constraint(array, where)


def _config_text(config: Any) -> str:
    fields = {"kind": kind_of(config).name, **to_tree(config)}
    return json.dumps(fields, indent=2) + "\n"
