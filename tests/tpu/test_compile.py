"""The training step and the denoising loop compile for a TPU, with no TPU in the machine.

In a process of its own: libtpu, once loaded, stays, and reads its settings from the environment.
"""

import importlib.util
import json

import jax
import pytest

from tests.processes import NOT_KEPT, OPTIMISED, last_line, run_python

HBM_BYTES = 16 * 2**30  # of one v5e chip
ENVIRONMENT = (
    OPTIMISED
    | {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
    | NOT_KEPT
)

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu)"
)


def compile_in_a_process(module: str, *arguments: str) -> dict:
    """What a script of this folder prints last."""
    done = run_python("-m", f"tests.tpu.{module}", *arguments, environment=ENVIRONMENT)
    return json.loads(last_line(done))


@pytest.fixture(scope="module")
def memory():
    """Bytes by program: {"train": {"arguments": .., "temporaries": .., "outputs": ..}, ..}."""
    return compile_in_a_process("compile_small_flux")


@pytest.mark.parametrize("program", ["train", "sample"])
def test_a_program_compiles_and_fits(memory, program):
    used = memory[program]
    print(program, {name: f"{size / 2**20:.1f} MiB" for name, size in used.items()})
    assert used["arguments"] > 0
    assert used["temporaries"] > 0
    assert sum(used.values()) < HBM_BYTES / 4  # the model has a few million parameters


def test_the_training_state_is_updated_in_place(memory):
    """Donated: outputs of the state's size share its memory."""
    used = memory["train"]
    assert used["aliased"] > 0.9 * used["outputs"]


def test_the_small_model_runs_on_the_kernel(memory):
    """The training step holds both kernels in both kinds of block, the denoising loop one each."""
    assert memory["train"]["kernels"] >= 4
    assert memory["sample"]["kernels"] >= 2


FLUX = [f"24,128,512,{image}" for image in (4096, 1024, 48 * 84)]
SD35 = [f"24,64,333,{image}" for image in (4096, 1024, 48 * 84)]
ODD = ["24,128,77,35", "3,64,0,100", "2,40,5,3", "24,128,512,16384"]


def check_attention(topology: str, shapes: list[str]) -> None:
    found = compile_in_a_process("compile_attention", topology, *shapes)
    for shape, program in found.items():
        heads, head_dim, text, image = map(int, shape.split(","))
        assert program["forward_kernels"] > 0
        assert program["backward_kernels"] > 0
        # Attention without its score matrix: some copies of the tensors, in float32 at most.
        tensors = 2 * heads * (text + image) * max(head_dim, 128) * 4
        assert program["temporaries"] < 12 * tensors + 2**20, shape


def test_attention_compiles_for_v6e():
    check_attention("v6e:1x1", [SD35[1]])


def test_attention_compiles_over_a_mesh():
    """Samples over one axis and heads over another, as in a sharded model."""
    check_attention("v5e:2x2", [FLUX[1]])


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:1x1", "v6e:1x1", "v5p:2x2x1", "v4:2x2x1", "v5e:2x4"])
def test_attention_compiles_at_every_size(topology):
    """FLUX and SD3.5 at 1024 px, 512 px and 768 x 1344, FLUX at 2048 px, and odd ones."""
    # Over a mesh, heads are shared, which must divide.
    shapes = [*FLUX, *SD35, *ODD] if topology.endswith(":1x1") else [*FLUX, *SD35]
    check_attention(topology, shapes)


@pytest.mark.slow
def test_training_compiles_in_chunks_where_the_backward_kernel_has_no_room():
    """8192 tokens on v4, over a mesh: without a kernel, and without whole score matrices."""
    shape = "4,128,512,7680"
    program = compile_in_a_process("compile_attention", "v4:2x2x1", shape)[shape]
    assert program["forward_kernels"] == program["backward_kernels"] == 0
    assert program["temporaries"] < 4 * 8192**2


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", ["64", "128"])
@pytest.mark.parametrize("topology", ["v4:2x2x1", "v5e:1x1", "v5p:2x2x1", "v6e:1x1"])
def test_the_longest_sequences_that_are_said_to_fit_compile(topology, head_dim):
    longest = compile_in_a_process("compile_longest", topology, head_dim)
    print(topology, head_dim, longest)
    for direction in ("forward", "backward"):
        assert longest[f"{direction}, any blocks"] > longest[f"{direction}, one copy of keys"]
        assert longest[f"{direction}, one copy of keys"] >= 512 + 4096


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v6e:1x1", "v5e:2x2"])
def test_full_size_blocks_hand_tensors_to_the_kernels_as_they_lie(topology):
    """Around the kernels of a FLUX.1 block nothing is copied into another layout."""
    found = compile_in_a_process("compile_flux_blocks", topology)
    assert found == {"forward": 2, "backward": 2, "turned": 0}


@pytest.mark.slow
def test_shared_parameters_are_gathered_and_not_passed_around_in_loops():
    """Nothing in a step of two blocks needs a loop; a partitioner's windowed products do."""
    found = compile_in_a_process("compile_gathered")
    assert found["while"] == 0
    assert found["all-gather"] + found["all-gather-start"] > 0
    # Those that the compiler makes of small sums.
    assert found["collective-permute-start"] < 50
    if jax.__version_info__ >= (0, 12):  # SparseCores gather
        assert found["asynchronous"] == 1
        assert found["hidden"] > 0.9


@pytest.mark.slow
def test_parameters_are_shared_where_less_is_recomputed_for_it():
    found = compile_in_a_process("choose_meshes", "v5p-8:4", "v5p-16:1")
    shared = [1, 4, "attention+qkv+mlp"], [4, 1, "attention+qkv"]
    assert found["v5p-8"] == shared[jax.__version_info__ < (0, 12)]
    assert found["v5p-16"] == [8, 1, "attention+qkv+mlp"]


def test_the_kernels_keep_their_cycles():
    """For FLUX's 24 heads at 1024 px on v6e. Small changes can spoil the compiler's schedule."""
    found = compile_in_a_process("count_cycles", "v6e:1x1", "1,128,512,4096")
    assert 0 < 24 * found["forward"] <= 0.87e6
    assert 0 < 24 * found["backward"] <= 2.0e6
