"""Where parameters lie: the tables against whole models."""

import math
import re
from functools import cache

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from taca_jax.autoencoders.tiny_vae import TAEF1
from taca_jax.families.flux.family import FLUX_VAE
from taca_jax.families.flux.model import FLUX_DEV, FLUX_SCHNELL
from taca_jax.families.flux2.family import FLUX2_VAE
from taca_jax.families.flux2.model import KLEIN_BASE_4B
from taca_jax.families.sd3.model import SD3_MEDIUM, SD35_LARGE, SD35_MEDIUM
from taca_jax.nn.kinds import abstract_model, flat_params, kind_of
from taca_jax.nn.quantization import quantize
from taca_jax.parallel.rules import IN, OUT, gather, parameter_spec
from taca_jax.scorers.blip import BLIP_VQA
from taca_jax.scorers.clip import CLIP_VIT_B_32
from taca_jax.text.clip import CLIP_BIGG, CLIP_L
from taca_jax.text.qwen3 import QWEN3_4B
from taca_jax.text.t5 import T5_XXL
from tests.meshes import abstract_mesh

FULL_SIZE = {
    "dev": FLUX_DEV,
    "schnell": FLUX_SCHNELL,
    "SD3.5-Medium": SD35_MEDIUM,
    "SD3.5-Large": SD35_LARGE,
    "klein-4B": KLEIN_BASE_4B,
    "Qwen3-4B": QWEN3_4B,
    "T5-XXL": T5_XXL,
    "CLIP-L": CLIP_L,
    "CLIP-bigG": CLIP_BIGG,
}
SCORERS = (CLIP_VIT_B_32, BLIP_VQA)


@cache
def params_of(config, quantization):
    model = abstract_model(config, dtype=jnp.bfloat16)
    quantize(model, kind_of(config), quantization)
    return flat_params(model)


def shapes_of(config, quantization="none"):
    return {path: param.shape for path, param in params_of(config, quantization).items()}


def spec_of(config, path, shape, mesh):
    return parameter_spec(kind_of(config).sharding, path, shape, mesh)


def local_size(shape, spec, mesh):
    parts = 1
    for axes in spec:
        for axis in (axes,) if isinstance(axes, str) else axes or ():
            parts *= mesh.shape[axis]
    return math.prod(shape) // parts


@pytest.mark.parametrize(
    "config", [*FULL_SIZE.values(), *SCORERS, SD3_MEDIUM, FLUX_VAE, FLUX2_VAE, TAEF1]
)
def test_the_table_of_a_kind_is_about_every_parameter(config):
    for path, shape in shapes_of(config).items():
        spec_of(config, path, shape, abstract_mesh(fsdp=2, tensor=2))


@pytest.mark.parametrize("name", FULL_SIZE)
@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"fsdp": 4, "tensor": 4}, {"fsdp": 256}])
def test_full_size_models_are_shared_evenly(name, sizes):
    """All but norms, biases and what is too small to be cut: a chip holds its share, or nearly."""
    config, mesh = FULL_SIZE[name], abstract_mesh(**sizes)
    if name == "SD3.5-Large" and mesh.size == 256:
        pytest.skip("its 2,432 channels divide by 128 at most")
    shapes = shapes_of(config)
    held = sum(
        local_size(shape, spec_of(config, path, shape, mesh), mesh)
        for path, shape in shapes.items()
    )
    everything = sum(map(math.prod, shapes.values()))
    assert held < 1.15 * everything / mesh.size + 0.003 * everything


QUANTIZED = [name for name, config in FULL_SIZE.items() if kind_of(config).quantized]


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.parametrize("quantization", ["int8", "nf4"])
@pytest.mark.parametrize("sizes", [{"fsdp": 16}, {"fsdp": 4, "tensor": 2}, {"fsdp": 64}])
def test_quantised_models_are_shared_as_evenly(name, quantization, sizes):
    """Codes as the kernels that they are of, and their scales too."""
    config, mesh = FULL_SIZE[name], abstract_mesh(**sizes)
    plain, quantised = shapes_of(config), shapes_of(config, quantization)
    for path, shape in quantised.items():
        spec = spec_of(config, path, shape, mesh)
        kernel = path.removesuffix("_scale")
        if path == kernel:
            assert spec == spec_of(config, path, plain[path], mesh)
        else:
            # int8 has one block of inputs, which a tensor-parallel layer that sums up cannot share.
            parts = mesh.size if quantization == "nf4" else mesh.shape["fsdp"]
            assert local_size(shape, spec, mesh) <= math.prod(shape) // parts, path


def test_data_parallel_parameters_are_whole():
    for path, shape in shapes_of(FLUX_DEV).items():
        spec = spec_of(FLUX_DEV, path, shape, abstract_mesh(data=8, context=2))
        assert not any(spec), path


def test_the_autoencoder_is_whole_everywhere():
    for path, shape in shapes_of(FLUX_VAE).items():
        assert not any(spec_of(FLUX_VAE, path, shape, abstract_mesh(fsdp=8))), path


@pytest.mark.parametrize(
    ("path", "shape", "expected"),
    [
        ("double_blocks.img.qkv.q.kernel", (19, 3072, 3072), P(None, "fsdp", "tensor")),
        ("double_blocks.img.qkv.q.bias", (19, 3072), P(None, "tensor")),
        ("double_blocks.img.qkv.q.lora_a", (19, 3072, 64), P(None, "fsdp", None)),
        ("double_blocks.img.qkv.q.lora_b", (19, 64, 3072), P(None, None, ("tensor", "fsdp"))),
        ("double_blocks.txt.out.kernel", (19, 3072, 3072), P(None, "tensor", "fsdp")),
        ("double_blocks.txt.out.lora_a", (19, 3072, 64), P(None, ("tensor", "fsdp"), None)),
        ("double_blocks.txt.out.bias", (19, 3072), P(None, None)),
        ("double_blocks.img.qkv.q.kernel_scale", (19, 48, 3072), P(None, None, ("tensor", "fsdp"))),
        ("double_blocks.txt.out.kernel_scale", (19, 48, 3072), P(None, "tensor", "fsdp")),
        ("double_blocks.txt.out.kernel_scale", (19, 1, 3072), P(None, None, "fsdp")),
        ("single_blocks.qkv.q_norm.scale", (38, 128), P()),
        ("double_blocks.img.qkv.q.kernel", (19, 3070, 3072), P(None, None, "tensor")),
    ],
)
def test_what_follows_from_a_line_of_the_table(path, shape, expected):
    assert spec_of(FLUX_DEV, path, shape, abstract_mesh(fsdp=8, tensor=2)) == expected


def test_a_parameter_that_no_line_is_about_is_an_error():
    with pytest.raises(LookupError, match="0 lines of the sharding table are about triple_blocks"):
        spec_of(FLUX_DEV, "triple_blocks.q.kernel", (4, 4), abstract_mesh(fsdp=2))


def gathered_specs(function, *arrays):
    """The specs to which a function constrains arrays on a mesh of fsdp 4 and tensor 2."""
    with jax.sharding.use_abstract_mesh(abstract_mesh(fsdp=4, tensor=2)):
        text = str(jax.make_jaxpr(function)(*arrays))
    return re.findall(r"spec=(P\([^)]*\))", text)


@pytest.mark.parametrize(
    ("path", "shape", "dtype", "whole", "split"),
    [
        ("in.kernel", (8, 16), "float32", "P(None, 'tensor')", "P('fsdp', 'tensor')"),
        ("out.kernel", (8, 16), "float32", "P('tensor', None)", "P('tensor', 'fsdp')"),
        ("in.lora_a", (8, 4), "float32", "P(None, None)", "P('fsdp', None)"),
        ("out.lora_b", (4, 16), "float32", "P(None, None)", "P(None, 'fsdp')"),
        ("in.kernel", (8, 16), "int8", "P(None, 'tensor')", None),
    ],
)
def test_a_parameter_is_gathered_over_fsdp_alone_and_its_gradient_split(
    path, shape, dtype, whole, split
):
    """Products with pieces would be windowed loops on TPUs; `tensor` keeps its pieces."""
    table, parameter = {"in": IN, "out": OUT}, jnp.ones(shape, dtype)

    def use(parameter):
        return (gather(table, path, parameter) ** 2).sum()

    assert gathered_specs(use, parameter) == [whole]
    if split is not None:
        assert gathered_specs(jax.grad(use), parameter) == [whole, whole, split]


def test_without_fsdp_nothing_is_gathered():
    parameter = jnp.ones((8, 16))
    with jax.sharding.use_abstract_mesh(abstract_mesh(data=4, tensor=2)):
        assert "constraint" not in str(
            jax.make_jaxpr(lambda x: gather({"a": IN}, "a.kernel", x))(parameter)
        )
