"""LoRA files in our own names: `double_blocks.img.qkv.q.lora_a` `[layers, in, r]`, `.lora_b`.

Strengths are multiplied into b. A stack may have fewer layers than the model: the remaining layers
have no factors.
"""

import numpy as np

from taca_jax.errors import UserError
from taca_jax.formats.lora.factors import Adapter, Factors, LayerId, depths_of, stacked, unstacked
from taca_jax.formats.tensor_files import Tensors, summary

A, B = ".lora_a", ".lora_b"


def is_native(tensors: Tensors) -> bool:
    return any(name.endswith((A, B)) for name in tensors.shapes)


def parse(tensors: Tensors) -> dict[LayerId, Factors]:
    """The file's factors. Raises UserError for other names, and for shapes that do not fit."""
    problems = []
    adapter: dict[LayerId, Factors] = {}
    for name, shape in tensors.shapes.items():
        path, dot, kind = name.rpartition(".")
        pair = (path + A, path + B)
        if f"{dot}{kind}" not in (A, B):
            problems.append(f"{name} is no factor")
        elif any(each not in tensors.shapes for each in pair):
            problems.append(f"{name} is without its other factor")
        elif name == pair[0]:
            other = tensors.shapes[pair[1]]
            if len(shape) not in (2, 3) or (*shape[:-2], shape[-1]) != other[:-1]:
                problems.append(f"{pair[0]} is {shape} and {pair[1]} is {other}")
            else:
                adapter |= unstacked(path, *(tensors.read(each) for each in pair))
    if problems:
        raise UserError(f"{tensors.where} is no LoRA file of ours: {summary(problems)}")
    return adapter


def tensors_of(adapter: Adapter) -> dict[str, np.ndarray]:
    """The adapter's arrays by our names."""
    tensors = {}
    for path, (a, b) in stacked(adapter, depths_of(adapter)).items():
        tensors[path + A], tensors[path + B] = a, b
    return tensors
