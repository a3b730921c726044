"""Model folders: `config.json` beside `params/` (Orbax) or `model.safetensors`, or alone where a
model has no parameters.

`config.json` holds the fields of the model's config and its `kind`. Parameters go by their dotted
path ("double_blocks.img.qkv.q.kernel"; stacked blocks are one array with a leading layer axis).
Orbax restores each array straight onto its devices and is what conversion writes; a safetensors
file is what small weights are passed around in. LoRA factors are never part of a model folder.
"""

import itertools
import json
import logging
import math
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding
from jax.typing import DTypeLike

from taca_jax.atomic import whole_folder
from taca_jax.errors import UserError
from taca_jax.fields import from_json, to_json
from taca_jax.models.clip import CLIPConfig, CLIPTextEncoder
from taca_jax.models.flux import FluxConfig, FluxTransformer
from taca_jax.models.layers import Fixed, LoRAParam, Quantized
from taca_jax.models.low_bit import Quantization
from taca_jax.models.pixels import Pixels, PixelsConfig
from taca_jax.models.sd3 import SD3Config, SD3Transformer
from taca_jax.models.stack import Remat
from taca_jax.models.t5 import T5Config, T5Encoder
from taca_jax.models.tiny_vae import TinyVAE, TinyVAEConfig
from taca_jax.models.vae import AutoencoderKL, VAEConfig
from taca_jax.quantize import load_quantized
from taca_jax.quantize import quantize as quantize_kernels
from taca_jax.quiet import quiet
from taca_jax.streams import StreamedArray, put
from taca_jax.tensor_files import Shape, differences, open_tensors, write_tensors

KINDS: dict[str, tuple[type, type]] = {
    "flux": (FluxConfig, FluxTransformer),
    "sd3": (SD3Config, SD3Transformer),
    "t5": (T5Config, T5Encoder),
    "clip": (CLIPConfig, CLIPTextEncoder),
    "vae": (VAEConfig, AutoencoderKL),
    "tiny_vae": (TinyVAEConfig, TinyVAE),
    "pixels": (PixelsConfig, Pixels),
}
"""kind in config.json -> (config, module)."""

Model = (
    FluxTransformer
    | SD3Transformer
    | T5Encoder
    | CLIPTextEncoder
    | AutoencoderKL
    | TinyVAE
    | Pixels
)

Place = Callable[[str, str, Shape], Sharding]
"""(kind, path, shape) -> where a parameter goes, as `sharding.placement` says."""

CONFIG, PARAMS, SAFETENSORS = "config.json", "params", "model.safetensors"
PIPELINE_FILE = "pipeline.json"
"""Beside the model folders of a pipeline."""


def save_model(
    path: Path | str,
    model: Model,
    *,
    format: Literal["orbax", "safetensors"] = "orbax",
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a model folder, whole or not at all; a model folder that was there is replaced.

    Parameters are stored in `dtype`, or as they are. Raises UserError when `path` holds something
    else, or cannot be written, and for a quantised model.
    """
    path = Path(path)
    _check_free(path)
    params = flat_params(model)
    if any(isinstance(param, Quantized) for param in params.values()):
        raise UserError(
            f"{path}: a quantised model is not written; keep the one that it was made of, and "
            "quantise as you load it"
        )
    if format == "orbax" and params:
        arrays = {name: _streamed(param, dtype) for name, param in params.items()}
        return save_streamed(path, model.config, arrays)
    tensors = {name: _on_host(param, dtype) for name, param in params.items()}
    with whole_folder(path) as folder:
        if tensors:
            write_tensors(folder / SAFETENSORS, tensors)
        (folder / CONFIG).write_text(_config_text(model.config))
    return None


def save_streamed(path: Path, config: Any, arrays: Mapping[str, StreamedArray]) -> None:
    """A model folder of arrays that need not fit into memory. `arrays` goes by parameter path."""
    with whole_folder(path) as folder:
        _stream_orbax(folder / PARAMS, arrays)
        (folder / CONFIG).write_text(_config_text(config))


def load_config(path: Path | str) -> Any:
    """The config of a model folder; its class says what model it is.

    Raises UserError where config.json is missing, of an unknown kind, or not what the kind needs.
    """
    file = Path(path) / CONFIG
    try:
        tree = json.loads(file.read_text())
    except OSError:
        raise UserError(
            f"{path} is no model folder: it has no readable {CONFIG}; convert the original weights "
            "with `python -m convert`"
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); write the folder again") from None
    kind = tree.pop("kind", None) if isinstance(tree, dict) else None
    if kind not in KINDS:
        hint = "; original weights need `python -m convert` first" if kind is None else ""
        raise UserError(f"{file} says kind {kind!r}; expected one of {', '.join(KINDS)}{hint}")
    return from_json(KINDS[kind][0], json.dumps(tree), where=str(file))


def load_model(
    path: Path | str,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    remat: Remat = "none",
    place: Place | None = None,
    quantize: Quantization = "none",
) -> Any:
    """The model of a folder: computing in `dtype`, parameters in `param_dtype` or as stored.

    `place(kind, path, shape)` says where each parameter goes (`sharding.placement`); without it all
    are on the first device. `remat` is the transformers'. `quantize` is what the kernels of blocks
    are kept in, encoded a layer at a time as they are read. Raises UserError that names everything
    missing, left over or mis-shaped, for files that are absent, truncated or damaged, and for a
    model that cannot be quantised.
    """
    path = Path(path)
    config = load_config(path)
    if not shapes_of(config):  # pixels: the config is all
        return abstract_model(config, dtype=dtype, remat=remat)
    if (path / PARAMS).is_dir():
        stored = _open_orbax(path / PARAMS)
    elif (path / SAFETENSORS).is_file():
        stored = _open_safetensors(path / SAFETENSORS)
    else:
        raise UserError(f"{path} has neither {PARAMS}/ nor {SAFETENSORS}; write the folder again")
    if problems := differences(shapes_of(config), stored.shapes):
        raise UserError(f"{path} does not fit its {CONFIG}: {'; '.join(problems)}")
    return load_stored(
        config,
        stored,
        dtype=dtype,
        param_dtype=param_dtype,
        remat=remat,
        place=place,
        quantize=quantize,
    )


@dataclass(frozen=True)
class Stored:
    """The parameters of a model where they are kept, by dotted path.

    read: (path, dtype or None as it is stored) -> one of them, to be put on devices.
    matrix: (path, layer of a stack or ()) -> that matrix of it, on the host.
    """

    shapes: Mapping[str, Shape]
    read: Callable[[str, DTypeLike | None], StreamedArray]
    matrix: Callable[[str, tuple[int, ...]], np.ndarray]


def load_stored(
    config: Any,
    stored: Stored,
    *,
    dtype: DTypeLike,
    param_dtype: DTypeLike | None = None,
    remat: Remat = "none",
    place: Place | None = None,
    quantize: Quantization = "none",
) -> Any:
    """The model of a config with the parameters that `stored` has, one at a time.

    The other parameters are as of `load_model`; of stored ones, shapes are not compared here.
    """

    def placed(name: str, shape: Shape) -> Sharding:
        if place is None:
            return SingleDeviceSharding(jax.devices()[0])
        return place(kind_of(config), name, shape)

    model, wanted = abstract_model(config, dtype=dtype, remat=remat), shapes_of(config)
    arrays: dict[str, jax.Array] = {}
    quantize_kernels(model, kind_of(config), quantize)
    for name, param in flat_params(model).items():
        layer = name.removesuffix("_scale")
        if isinstance(param, Quantized) and name != layer:
            arrays[layer], arrays[name] = load_quantized(
                wanted[layer],
                quantize,
                path=layer,
                codes_at=placed(layer, wanted[layer]),
                scales_at=placed(name, param.shape),
                read=partial(stored.matrix, layer),
            )
    for name, shape in wanted.items():
        if name not in arrays:
            arrays[name] = put(stored.read(name, param_dtype), placed(name, shape))
    return filled(model, arrays)


def kind_of(config: Any) -> str:
    """The name under which a config's models are stored: `flux`, `t5`, ... ."""
    return next(kind for kind, (cls, _) in KINDS.items() if cls is type(config))


def abstract_model(config: Any, *, dtype: DTypeLike, remat: Remat = "none") -> Any:
    """The model of a config with shapes in place of parameters."""
    module = KINDS[kind_of(config)][1]
    options = {"remat": remat} if remat != "none" else {}
    return nnx.eval_shape(lambda: module(config, rngs=nnx.Rngs(0), dtype=dtype, **options))


def flat_params(model: nnx.Module) -> dict[str, Any]:
    """What is stored of a model, by dotted path: parameters and fixed tables, no LoRA factors."""
    base = nnx.state(model, nnx.All(nnx.Any(nnx.Param, Fixed), nnx.Not(nnx.OfType(LoRAParam))))
    return {".".join(map(str, path)): param for path, param in nnx.to_flat_state(base)}


def filled(model: Any, arrays: Mapping[str, jax.Array]) -> Any:
    """An abstract model with an array for every parameter."""
    graph, state = nnx.split(model)
    for path, param in nnx.to_flat_state(state):
        param.set_value(arrays[".".join(map(str, path))])
    return nnx.merge(graph, state)


@cache
def shapes_of(config: Any) -> Mapping[str, Shape]:
    """The parameters of a config's models by dotted path."""
    model = abstract_model(config, dtype=jnp.float32)
    return {path: param.shape for path, param in flat_params(model).items()}


def _open_safetensors(file: Path) -> Stored:
    tensors = open_tensors(file)

    def read(name: str, dtype: DTypeLike | None) -> StreamedArray:
        target = tensors.dtypes[name] if dtype is None else jnp.dtype(dtype)

        def pieces() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
            yield (), tensors.read(name).astype(target, copy=False)

        return StreamedArray(tensors.shapes[name], target, pieces, stacked=False)

    def matrix(name: str, layer: tuple[int, ...]) -> np.ndarray:
        if not layer:
            return tensors.read(name)
        return tensors.read(name, slice(layer[0], layer[0] + 1))[0]

    return Stored(tensors.shapes, read, matrix)


def _open_orbax(folder: Path) -> Stored:
    """What `_StreamedHandler` wrote: each array, or each layer of a stack, is the bytes of a file.

    They are read here as they are: Orbax's own reader would have whole stacks on the host and many
    at a time, and TensorStore's threads keep what they have freed.
    """
    stored = {array.name: _checked(array) for array in folder.iterdir() if array.is_dir()}

    def chunk_of(name: str, first: int) -> np.ndarray:
        shape, chunk, kept = stored[name]
        file = folder / name / ".".join(map(str, (first, *(0,) * (len(shape) - 1))))
        try:
            return np.fromfile(file, kept).reshape(chunk)
        except (OSError, ValueError) as error:
            raise _damaged(file, str(error)) from error

    def read(name: str, dtype: DTypeLike | None) -> StreamedArray:
        shape, chunk, kept = stored[name]
        stacked = chunk != shape
        target = kept if dtype is None else jnp.dtype(dtype)

        def pieces() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
            for layer in range(shape[0] if stacked else 1):
                piece = chunk_of(name, layer).astype(target, copy=False)
                yield ((layer,), piece[0]) if stacked else ((), piece)

        return StreamedArray(shape, target, pieces, stacked)

    def matrix(name: str, layer: tuple[int, ...]) -> np.ndarray:
        shape, chunk, _ = stored[name]
        return chunk_of(name, layer[0])[0] if chunk != shape else chunk_of(name, 0)[layer]

    return Stored({name: shape for name, (shape, _, _) in stored.items()}, read, matrix)


def _checked(array: Path) -> tuple[Shape, Shape, np.dtype]:
    """Shape, chunk and dtype of one stored array, all of whose chunks are there in full."""
    try:
        header = json.loads((array / ".zarray").read_text())
        shape, chunks = tuple(header["shape"]), tuple(header["chunks"])
        dtype = jnp.dtype(header["dtype"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(array, f"its .zarray: {error}") from error
    if chunks not in (shape, (1, *shape[1:])):
        raise _damaged(array, f"chunks of {chunks} of {shape}, expected layers or all")
    counts = [-(-size // chunk) for size, chunk in zip(shape, chunks, strict=True)]
    for index in itertools.product(*map(range, counts)):
        chunk = array / ".".join(map(str, index))
        size = chunk.stat().st_size if chunk.is_file() else None
        expected = math.prod(chunks) * dtype.itemsize
        if size != expected:
            found = "missing" if size is None else f"{size} bytes"
            raise _damaged(array, f"chunk {chunk.name} is {found}, expected {expected} bytes")
    return shape, chunks, dtype


def _damaged(folder: Path, reason: str) -> UserError:
    first_line = reason.strip().partition("\n")[0]
    return UserError(f"{folder} is incomplete or damaged ({first_line}); write it again")


def _stream_orbax(folder: Path, arrays: Mapping[str, StreamedArray]) -> None:
    registry = ocp.type_handlers.create_type_handler_registry((StreamedArray, _StreamedHandler()))
    # Orbax warns that there are no jax arrays and no OCDBT; both are meant.
    with quiet("absl", below=logging.ERROR):
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(folder.absolute(), ocp.args.PyTreeSave(_nested(arrays)))


class _StreamedHandler(ocp.type_handlers.NumpyHandler):
    """Writes StreamedArrays as Orbax stores numpy arrays, two pieces in memory at a time."""

    async def serialize(
        self,
        values: Sequence[Any],  # StreamedArray: what the registry sends here
        infos: Sequence[ocp.type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> list[Any]:
        del args
        for value, info in zip(values, infos, strict=True):
            await info.await_path_creation()
            folder = info.parent_dir / info.name
            await _created(
                ts.open(
                    {
                        "driver": "zarr",
                        "kvstore": {"driver": "file", "path": f"{folder}/"},
                        "metadata": {
                            "shape": value.shape,
                            "chunks": (1, *value.shape[1:]) if value.stacked else value.shape,
                            "dtype": _zarr_dtype(value.dtype),
                            "compressor": None,  # weights hardly shrink
                        },
                        # The whole folder is handed to the disk at its end.
                        "context": {"file_io_sync": False},
                    },
                    create=True,
                )
            )
            with ThreadPoolExecutor(max_workers=1) as writer:
                writing = None  # one piece, while the next one is read
                for index, piece in value.pieces():
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(_write_chunk, Path(folder), index, piece)
                if writing is not None:
                    writing.result()
        return []


def _write_chunk(folder: Path, index: tuple[int, ...], piece: np.ndarray) -> None:
    """One chunk of an array without compression: a file of its numbers, named by its place.

    TensorStore would copy it first, which takes ten times as long as writing.
    """
    array = np.ascontiguousarray(piece)
    place = (*index, *(0,) * piece.ndim)
    with (folder / ".".join(map(str, place))).open("wb") as file:
        file.write(array.reshape(-1).view(np.uint8).data)


async def _created(request: Awaitable[Any]) -> Any:
    """What TensorStore answers; its refusals to write become the OSError that they report."""
    try:
        return await request
    except ValueError as error:
        code = re.search(r"os_error_code='(\d+)'", str(error))
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def _on_host(param: nnx.Param, dtype: DTypeLike | None) -> np.ndarray:
    array = param.get_value()
    return np.asarray(array if dtype is None else array.astype(dtype))


def _streamed(param: nnx.Param, dtype: DTypeLike | None) -> StreamedArray:
    stored = param.get_value().dtype if dtype is None else jnp.dtype(dtype)

    def pieces() -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        yield (), _on_host(param, dtype)

    return StreamedArray(param.shape, stored, pieces, stacked=False)


def _zarr_dtype(dtype: np.dtype) -> str:
    return "bfloat16" if dtype == jnp.bfloat16 else dtype.str


def _config_text(config: Any) -> str:
    return json.dumps({"kind": kind_of(config), **json.loads(to_json(config))}, indent=2) + "\n"


def _check_free(path: Path) -> None:
    if path.is_dir() and any(path.iterdir()) and not (path / CONFIG).is_file():
        raise UserError(f"{path} exists and is no model folder; give an empty or a new one")


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
