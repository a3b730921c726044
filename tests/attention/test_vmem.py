"""What the TPU kernels need of VMEM, and what runs where they do not fit. Nothing is compiled here.

That what is said to fit compiles is shown by tests/tpu.
"""

import re
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from taca_jax.attention import api, joint_attention, joint_attention_with_log_sums, pallas_tpu
from taca_jax.attention.pallas_tpu import target
from taca_jax.attention.pallas_tpu.blocks import default_blocks
from taca_jax.attention.pallas_tpu.tiles import Problem
from taca_jax.attention.pallas_tpu.vmem import NoRoomError, fitted, needed_vmem, smaller
from taca_jax.parallel.chips import CHIPS

MIB = 2**20
BF16, F32 = jnp.dtype("bfloat16"), jnp.dtype("float32")
KINDS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
DIRECTIONS = ("forward", "backward")


def problem(chip: str, direction: str, keys: int, head_dim: int = 128, dtype=BF16) -> Problem:
    return Problem(
        queries=keys,
        keys=keys,
        text_len=512,
        head_dim=head_dim,
        group=128 // head_dim,
        dtype=dtype,
        chip=CHIPS[chip],
        blocks=getattr(default_blocks(CHIPS[chip], head_dim), direction),
    )


def least_vmem(problem: Problem, direction: str) -> int:
    """With the smallest blocks."""
    return min(needed_vmem(x, direction) for x in smaller(problem, direction))


class TestCount:
    @pytest.mark.parametrize(
        ("chip", "direction", "keys", "head_dim", "compiled_mib"),
        [
            ("v4", "forward", 4608, 128, 8.54),
            ("v4", "backward", 1536, 128, 7.44),
            ("v5e", "forward", 4608, 128, 7.52),
            ("v5e", "backward", 4608, 128, 16.15),
            ("v5e", "backward", 16896, 128, 52.51),
            ("v5e", "backward", 16896, 64, 50.77),
            ("v6e", "forward", 16896, 128, 20.12),
            ("v6e", "backward", 16896, 128, 52.12),
            ("v6e", "backward", 4608, 64, 15.95),
        ],
    )
    def test_no_less_than_the_compiler_took_and_little_more(
        self, chip, direction, keys, head_dim, compiled_mib
    ):
        """For the default blocks in bfloat16, as libtpu reported it."""
        counted = needed_vmem(problem(chip, direction, keys, head_dim), direction) / MIB
        spilled = 16 * 256 * 768 * 4 / MIB  # the bound for the largest tiles
        assert compiled_mib <= counted <= compiled_mib + spilled

    def test_long_sequences_are_paid_by_the_key(self):
        """Backward, a key of 128 channels: k, v and both gradients twice in bfloat16, and both
        accumulators in float32."""
        short, long = (needed_vmem(problem("v5e", "backward", n), "backward") for n in (1536, 3072))
        assert long - short == 1536 * 128 * (4 * 2 * 2 + 2 * 4)

    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("dtype", [BF16, F32])
    @pytest.mark.parametrize("chip", CHIPS)
    def test_each_choice_of_smaller_blocks_needs_less(self, chip, dtype, direction):
        needs = [
            needed_vmem(x, direction)
            for x in smaller(problem(chip, direction, 4608, dtype=dtype), direction)
        ]
        assert needs == sorted(set(needs), reverse=True)


class TestFitting:
    @pytest.mark.parametrize("direction", DIRECTIONS)
    @pytest.mark.parametrize("head_dim", [64, 128])
    @pytest.mark.parametrize("keys", [333 + 4096, 512 + 4096, 512 + 16384])
    @pytest.mark.parametrize("chip", ["v5e", "v5p", "v6e"])
    def test_the_fastest_blocks_stay_where_they_fit(self, chip, keys, head_dim, direction):
        """FLUX and SD3.5 at 1024 and 2048 px."""
        given = problem(chip, direction, keys, head_dim)
        assert fitted(given, direction, may_shrink=True) == given

    def test_v4_holds_one_copy_of_fluxs_keys_in_the_backward_pass(self):
        given = problem("v4", "backward", 4608)
        found = fitted(given, "backward", may_shrink=True)
        assert needed_vmem(found, "backward") <= given.vmem < needed_vmem(given, "backward")
        assert found.blocks.key_buffers == 1
        assert found.blocks.queries == given.blocks.queries

    @pytest.mark.parametrize("may_shrink", [True, False])
    def test_what_does_not_fit_is_refused_with_the_least_that_it_needs(self, may_shrink):
        given = problem("v4", "backward", 8192)
        least = (least_vmem if may_shrink else needed_vmem)(given, "backward") / MIB
        message = (
            rf"8192 keys of head size 128 in bfloat16 needs {least:.1f} MiB of VMEM in its "
            r"backward pass, and a kernel may take 15\.0 MiB on .*; "
            r"take implementation='auto' or 'chunked'"
        )
        with pytest.raises(NoRoomError, match=message):
            fitted(given, "backward", may_shrink=may_shrink)


def on(chip: str, **axes: int):
    """A mesh of TPUs that are not there, for programs that are traced only."""
    device = AbstractDevice(device_kind=KINDS[chip], num_cores=None, platform="tpu")
    names = tuple(axes) or ("x",)
    return jax.sharding.use_abstract_mesh(
        AbstractMesh(
            tuple(axes.values()) or (1,),
            names,
            axis_types=(AxisType.Auto,) * len(names),
            abstract_device=device,
        )
    )


def kernels(function, *shape: int) -> list[str]:
    """The kernels in a function's program for queries, keys and values of that shape."""

    def names(jaxpr) -> list[str]:
        found = []
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append(equation.params["name"].removeprefix("taca_attention_"))
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                found += names(inner)
        return found

    return names(jax.make_jaxpr(function)(jax.ShapeDtypeStruct(shape, BF16)).jaxpr)


def attend(x, implementation="auto"):
    return joint_attention(x, x, x, text_len=512, gamma=1.2, implementation=implementation)


def gradient(x, implementation="auto"):
    return jax.grad(lambda x: attend(x, implementation).sum().astype(jnp.float32))(x)


@pytest.fixture
def log(caplog):
    """What a test logs, in `messages`. Warnings come once per process, which is forgotten here."""
    api._warn_of_chunks.cache_clear()
    yield caplog
    api._warn_of_chunks.cache_clear()


class TestAuto:
    @pytest.mark.parametrize("heads", [1, 24])
    def test_flux_runs_on_the_kernels_on_v4(self, heads, log):
        with on("v4"):
            assert kernels(attend, 1, 4608, heads, 128) == ["forward"]
            assert kernels(gradient, 1, 4608, heads, 128) == ["forward", "backward"]
        assert log.messages == []

    def test_a_forward_pass_that_does_not_fit_runs_in_chunks(self, log):
        with on("v4"):
            assert kernels(attend, 1, 40000, 2, 128) == []
            assert kernels(gradient, 1, 40000, 2, 128) == []
        assert len(log.messages) == 1
        assert re.fullmatch(
            r"warning: attention over 40000 keys of head size 128 in bfloat16 needs 2\d\.\d MiB of "
            r"VMEM in its forward pass, and a kernel may take 15\.0 MiB on TPU v4; "
            r"taking implementation='chunked', which is slower",
            log.messages[0],
        )

    def test_a_backward_pass_that_does_not_fit_costs_the_kernel_only_where_it_is_taken(self, log):
        with on("v4"):
            assert kernels(attend, 1, 8192, 2, 128) == ["forward"]
            assert log.messages == []
            assert kernels(jax.checkpoint(gradient), 1, 8192, 2, 128) == []
            assert kernels(gradient, 2, 8192, 2, 128) == []
        assert len(log.messages) == 1
        assert "MiB of VMEM in its backward pass" in log.messages[0]

    @pytest.mark.parametrize("keys", range(25024, 29024, 1000))
    def test_it_never_raises_near_the_limit(self, keys, log):
        """What is foreseen is what the kernel's call finds, whose text counts too."""
        with on("v4"):
            assert kernels(attend, 1, keys, 4, 64) == ([] if log.messages else ["forward"])

    def test_log_sums_of_what_does_not_fit(self, log):
        def sums(x):
            return joint_attention_with_log_sums(x, x, x, text_len=512)[1].text_mass

        with on("v4"):
            assert kernels(sums, 1, 8192, 2, 128) == ["forward"]
            assert kernels(sums, 1, 40000, 2, 128) == []
        assert len(log.messages) == 1

    def test_on_a_mesh_each_device_does_its_own_samples_and_heads(self, log):
        with on("v4", data=2, tensor=2, context=2):
            assert kernels(gradient, 2, 4608, 4, 128) == ["forward", "backward"]
            program = str(jax.make_jaxpr(gradient)(jax.ShapeDtypeStruct((2, 8192, 4, 128), BF16)))
            with pytest.raises(ValueError, match="3 heads do not divide over the mesh's 2 devices"):
                kernels(attend, 2, 8192, 3, 128)
        assert len(log.messages) == 1
        assert "pallas_call" not in program
        assert "bf16[1,8192,2,128]" in program  # one of two samples, two of four heads

    def test_chunks_instead_of_the_kernel_give_the_same_numbers(self, monkeypatch, log):
        """On a chip that is not known and has no VMEM, run on this machine."""
        monkeypatch.setattr(pallas_tpu, "device_kind", lambda: "TPU of tomorrow")
        monkeypatch.setattr(target, "device_kind", lambda: "TPU of tomorrow")
        monkeypatch.setattr(target, "UNKNOWN_KERNEL_VMEM", 1000)
        q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 40, 2, 8))
        call = partial(joint_attention, q, k, v, text_len=13, gamma=1.5)
        np.testing.assert_array_equal(call(), call(implementation="chunked"))
        assert len(log.messages) == 1

    def test_gradients_in_chunks_are_right(self, monkeypatch, log):
        """Where the kernel's forward pass fits and its backward pass does not."""
        monkeypatch.setattr(pallas_tpu, "device_kind", lambda: "TPU of tomorrow")
        monkeypatch.setattr(target, "device_kind", lambda: "TPU of tomorrow")
        q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 1000, 2, 8), jnp.bfloat16)
        forward = pallas_tpu.planned("forward", q.shape, keys=1000, text_len=13, dtype=BF16)
        monkeypatch.setattr(target, "UNKNOWN_KERNEL_VMEM", least_vmem(forward, "forward"))

        def loss(implementation, *inputs):
            *qkv, gamma = inputs
            call = partial(joint_attention, text_len=13, implementation=implementation)
            return jnp.sum(call(*qkv, gamma=gamma) * v)

        ours, chunked = (
            jax.grad(partial(loss, name), argnums=(0, 1, 2, 3))(q, k, v, 1.5)
            for name in ("auto", "chunked")
        )
        jax.tree.map(np.testing.assert_array_equal, ours, chunked)
        assert len(log.messages) == 1
        assert "in its backward pass" in log.messages[0]


class TestPallas:
    """Who asks for the kernel by name gets it or an error."""

    def test_a_forward_pass_that_does_not_fit(self):
        with on("v4"), pytest.raises(ValueError, match=r"2\d\.\d MiB .* 15\.0 MiB on TPU v4; take"):
            kernels(partial(attend, implementation="pallas"), 1, 40000, 2, 128)

    def test_a_backward_pass_that_does_not_fit(self):
        with on("v4"):
            assert kernels(partial(attend, implementation="pallas"), 1, 8192, 2, 128) == ["forward"]
            with pytest.raises(ValueError, match=r"1\d\.\d MiB .* 15\.0 MiB on TPU v4; take"):
                kernels(partial(gradient, implementation="pallas"), 1, 8192, 2, 128)

    def test_blocks_that_are_given_are_not_changed(self):
        sizes = default_blocks(CHIPS["v4"], 128)

        def attend(x):
            gamma = jnp.ones(1)
            return pallas_tpu.joint_attention(x, x, x, text_len=512, gamma=gamma, blocks=sizes)

        with on("v4"), pytest.raises(NoRoomError, match="forward pass"):
            kernels(attend, 1, 16384, 2, 128)
