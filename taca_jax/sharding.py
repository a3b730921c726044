"""Which parameter lies where: a table per model, and the mesh that the tables are for.

A table names layers by regular expression and says over which axes the two sides of their kernels
are shared. The rest follows: a bias lies as its kernel's outputs do over `tensor`, LoRA's A as the
inputs and B as the outputs, both over `fsdp` too, as do the scales of a quantised kernel, and the
layer axis of stacked blocks is never shared. `fsdp` stands where a kernel would otherwise be whole
on each device: XLA gathers it, layer by layer, where it is used.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from taca_jax.errors import UserError
from taca_jax.mesh import AXES, BATCH_AXES, TENSOR_AXIS, dividing_axes

Axes = tuple[str, ...]
_FSDP: Axes = ("fsdp",)
_TENSOR: Axes = (TENSOR_AXIS,)
_WHOLE: Axes = ()
_IN = (_FSDP, _TENSOR)  # from whole channels to those of heads, of MLPs, of modulations
_OUT = (_TENSOR, _FSDP)  # and back
_EMBEDDING = (_WHOLE, (TENSOR_AXIS, "fsdp"))

FLUX: Mapping[str, tuple[Axes, Axes]] = {
    r"(img_in|final_out)": (_WHOLE, _FSDP),
    r"txt_in": (_FSDP, _WHOLE),
    r"(time|vector|guidance)_in\.linear_1": _IN,
    r"(time|vector|guidance)_in\.linear_2": _OUT,
    r"double_blocks\.(img|txt)\.mod": _IN,
    r"double_blocks\.(img|txt)\.(qkv\.[qkv]|mlp_in)": _IN,
    r"double_blocks\.(img|txt)\.(out|mlp_out)": _OUT,
    r"single_blocks\.mod": _IN,
    r"single_blocks\.(qkv\.[qkv]|mlp_in)": _IN,
    # Its inputs are heads and MLP side by side: a device's pieces of them would not be neighbours.
    r"single_blocks\.out": _IN,
    r"final_mod": _IN,
}
SD3: Mapping[str, tuple[Axes, Axes]] = {
    r"(img_in|final_out)": (_WHOLE, _FSDP),
    r"position_embed": _EMBEDDING,
    r"txt_in": (_FSDP, _WHOLE),
    r"(time|vector)_in\.linear_1": _IN,
    r"(time|vector)_in\.linear_2": _OUT,
    r"(dual_blocks|joint_blocks|last_block)\.(img|txt)\.mod": _IN,
    r"(dual_blocks|joint_blocks|last_block)\.(img|txt)\.(qkv\.[qkv]|mlp_in)": _IN,
    r"(dual_blocks|joint_blocks|last_block)\.(img|txt)\.(out|mlp_out)": _OUT,
    r"dual_blocks\.img_attn\.qkv\.[qkv]": _IN,
    r"dual_blocks\.img_attn\.out": _OUT,
    r"final_mod": _IN,
}
T5: Mapping[str, tuple[Axes, Axes]] = {
    r"token_embed": _EMBEDDING,
    r"relative_bias": (_WHOLE, _WHOLE),
    r"blocks\.(attn\.[qkv]|ff\.wi_(gate|value))": _IN,
    r"blocks\.(attn\.o|ff\.wo)": _OUT,
}
CLIP: Mapping[str, tuple[Axes, Axes]] = {
    r"(token|position)_embed": _EMBEDDING,
    r"blocks\.(attn\.[qkv]|ff\.wi)": _IN,
    r"blocks\.(attn\.o|ff\.wo)": _OUT,
    r"projection": _IN,
}
TABLES: Mapping[str, Mapping[str, tuple[Axes, Axes]]] = {
    "flux": FLUX,
    "sd3": SD3,
    "t5": T5,
    "clip": CLIP,
    # Small beside a transformer, and convolutions have no side to share: whole everywhere.
    "vae": {r".*": (_WHOLE, _WHOLE)},
    "tiny_vae": {r".*": (_WHOLE, _WHOLE)},
    "pixels": {},
}
"""kind of model (as in its config.json) -> layer -> the axes of its kernel's inputs and outputs."""

_NORMS = r"(.*\.)?\w*norm\w*"


@dataclass(frozen=True)
class MeshConfig:
    """How many devices share the work along each axis; the product is the number of devices.

    One of them may be -1, which is as many devices as the others leave. On one device nothing is
    shared, whatever stands here.

    data: shares the samples; parameters are whole on each.
    fsdp: shares the samples and the parameters. 0 is the devices that the others leave; in training
        `data` gets those where they have room for whole parameters (`training.mesh_choice`).
    context: shares the tokens of each sample.
    tensor: shares heads and the MLPs' hidden channels; divides the number of heads.
    """

    data: int = 1
    fsdp: int = 0
    context: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = self._asked()
        for axis, size in sizes.items():
            if size < 1 and size != -1:
                least = "0 (open)" if axis == "fsdp" else "1"
                raise UserError(
                    f"mesh.{axis} is {size}; it must be {least} or more, or -1 for the rest"
                )
        if list(sizes.values()).count(-1) > 1:
            raise UserError("only one axis of mesh may be -1, the devices that the others leave")

    @property
    def open(self) -> bool:
        """Whether parameters may be shared or not."""
        return self.fsdp == 0 and self.data == 1 and -1 not in (self.context, self.tensor)

    def _asked(self) -> dict[str, int]:
        others = (self.data, self.context, self.tensor)
        asked = {
            "data": self.data,
            "fsdp": self.fsdp or (1 if -1 in others else -1),
            "context": self.context,
            "tensor": self.tensor,
        }
        return {axis: asked[axis] for axis in AXES}

    def sizes(self, devices: int) -> dict[str, int]:
        """Devices along each axis. Raises UserError where `devices` cannot be shared so."""
        sizes = self._asked()
        known = int(np.prod([size for size in sizes.values() if size != -1]))
        asked = ", ".join(f"mesh.{axis}={size}" for axis, size in sizes.items())
        if -1 in sizes.values():
            if devices % known:
                raise UserError(f"{asked}: {known} does not divide the {devices} devices")
            return {axis: devices // known if n == -1 else n for axis, n in sizes.items()}
        if known != devices:
            raise UserError(f"{asked}: that is {known} devices, and there are {devices}")
        return sizes


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of `devices` (by default all) that `config` asks for, near devices side by side.

    Raises UserError as `MeshConfig.sizes` does.
    """
    devices = jax.devices() if devices is None else devices
    sizes = config.sizes(len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def parameter_spec(kind: str, path: str, shape: Sequence[int], mesh: Mesh | AbstractMesh) -> P:
    """Where one parameter of a model lies, by its dotted path.

    Axes over which its sides do not divide evenly leave it whole. Raises LookupError for a
    parameter that not exactly one line of the table is about: the table is wrong.
    """
    layer, _, name = path.rpartition(".")
    if name == "scale" or re.fullmatch(_NORMS, layer):
        return P()
    matching = [axes for pattern, axes in TABLES[kind].items() if re.fullmatch(pattern, layer)]
    if len(matching) != 1:
        raise LookupError(f"{len(matching)} lines of the {kind} table are about {path}")
    ((inputs, outputs),) = matching
    sides = {
        "kernel": (inputs, outputs),
        "embedding": (inputs, outputs),
        # Blocks of inputs are few: what fsdp shares of them are the outputs.
        "kernel_scale": (tuple(axis for axis in inputs if axis != "fsdp"), _with_fsdp(outputs)),
        "bias": (outputs if outputs == _TENSOR else _WHOLE,),
        "lora_a": (_with_fsdp(inputs), _WHOLE),
        "lora_b": (_WHOLE, _with_fsdp(outputs)),
    }[name]
    ours = shape[len(shape) - len(sides) :]
    found = [dividing_axes(mesh, axes, size) for axes, size in zip(sides, ours, strict=True)]
    return P(*[None] * (len(shape) - len(sides)), *found)


def _with_fsdp(axes: Axes) -> Axes:
    """A factor has one long side, and three more arrays of its shape in the optimizer."""
    return axes if "fsdp" in axes else (*axes, "fsdp")


def placement(mesh: Mesh | None) -> Callable[[str, str, Sequence[int]], NamedSharding] | None:
    """`parameter_spec` on a mesh, as `checkpoint.load_model` asks; None where there is no mesh."""
    if mesh is None:
        return None
    return lambda kind, path, shape: NamedSharding(mesh, parameter_spec(kind, path, shape, mesh))


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """Of arrays whose axis `leading` is that of the samples."""
    axes = tuple(axis for axis in BATCH_AXES if mesh.shape[axis] > 1)
    return NamedSharding(mesh, P(*[None] * leading, axes or None))


def put_rows(local: np.ndarray, mesh: Mesh | None, *, leading: int = 0) -> jax.Array:
    """This process's rows, `local_rows` of axis `leading`, as a part of the array of all."""
    if mesh is None:
        return jax.device_put(local)
    return jax.make_array_from_process_local_data(batch_sharding(mesh, leading=leading), local)


def local_rows(mesh: Mesh, samples: int) -> np.ndarray:
    """int [n], rising: which of a batch's samples this process's devices hold."""
    places = batch_sharding(mesh).addressable_devices_indices_map((samples,))
    rows = [np.arange(samples)[index] for index in places.values()]
    return np.unique(np.concatenate(rows))


def own_rows(mesh: Mesh, samples: int) -> np.ndarray:
    """int [n], rising: those of `local_rows` that this process alone answers for, the one whose
    device is the first of a sample's. Axes that do not divide a batch may lie over processes, which
    then hold the same samples."""
    places = batch_sharding(mesh).devices_indices_map((samples,))
    owners = np.full(samples, -1)
    for device, index in places.items():  # in the mesh's order, the same in every process
        held = owners[index]  # a view
        held[held < 0] = device.process_index
    return np.flatnonzero(owners == jax.process_index())


def samples_together(mesh: Mesh) -> int:
    """A batch must be a multiple of this many samples."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))
