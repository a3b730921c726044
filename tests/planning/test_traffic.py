"""What is read from a compiled program: by hand on a small text, and on one that the TPU's compiler
makes."""

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from taca_jax.parallel.chips import CHIPS
from taca_jax.planning.hlo import Program
from taca_jax.planning.traffic import Moved, read_traffic
from tests.processes import NOT_KEPT, last_line, run_python

TEXT = (Path(__file__).parent / "small_program.hlo").read_text()
GATHER_BY_CALL = """
  %moving = ((), (), (s32[8]{0})) custom-call-start(), called_computations={%by_sparse_core}
  %given.1 = ((bf16[1,100,10]{2,1,0:S(1)}), bf16[1,400,10]{2,1,0:S(1)}, (s32[8]{0})) \
custom-call-update(%moving, %mine)
  %step = bf16[1,100,10]{2,1,0:S(1)} fusion(%mine), calls=%elsewhere, "estimated_cycles":"40"
  %arrived = bf16[1,400,10]{2,1,0:S(1)} custom-call-done(%given.1)
"""
CALLED = """
%elsewhere (mine.1: bf16[1,100,10]) -> bf16[1,100,10] {
  ROOT %mine.1 = bf16[1,100,10]{2,1,0:S(1)} parameter(0)
}

%by_sparse_core (part.3: bf16[1,100,10]) -> bf16[1,400,10] {
  %part.3 = bf16[1,100,10]{2,1,0} parameter(0)
  ROOT %gather.3 = bf16[1,400,10] all-gather(%part.3), channel_id=7, replica_groups=[1,4]<=[4]
}, execution_thread="sparsecore"

"""
BY_CALL = re.sub(r"\n  %going.*%arrived[^\n]*\n", GATHER_BY_CALL, TEXT, flags=re.DOTALL)
BY_CALL = BY_CALL.replace("%body (", f"{CALLED.lstrip()}%body (")
"""TEXT with its gather done by SparseCores, in a call, and not in three fusions."""
either = pytest.mark.parametrize("text", [TEXT, BY_CALL], ids=["in fusions", "by a call"])
CHIP = replace(
    CHIPS["v5e"], memory=1e9, flops=1e12, memory_bandwidth=1e9, wire_bandwidth=100.0, clock=1.0
)


@either
def test_loops_count_as_often_as_they_run(text):
    traffic = read_traffic(text, CHIP)
    layer = 100 * 10 * 2
    assert traffic.collectives == {
        "all-gather": Moved(5, 5 * 3 * layer, 5 * 3 * layer),
        "all-reduce": Moved(1, 2 * 3 / 4 * 80 * 4, 0.0),
    }
    assert traffic.together.count == 6


def test_a_loop_may_say_itself_how_often_it_runs():
    said = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert read_traffic(said, CHIP).collectives["all-gather"].count == 7


@either
def test_waiting_is_what_does_not_hide_behind_cycles(text):
    """A gather takes 60 s on these wires, of which the units spend 40 on something else."""
    traffic = read_traffic(text, CHIP)
    reduce = 480 / CHIP.wire_bandwidth
    assert traffic.waited == pytest.approx(5 * (60 - 40) + reduce)
    assert traffic.seconds == pytest.approx(5 * 60 + reduce)


@either
def test_of_a_stack_only_the_layer_that_is_taken_is_read(text):
    """Each turn reads one and counts on; what is gathered stays in the vector memory. The kernel at
    the end reads all, and its 80 numbers are written, read, written and received."""
    layer = 100 * 10 * 2
    counting = 4 * 4  # which layer, and the sum of two numbers
    numbers = 80 * 4
    at_the_end = 5 * layer + numbers + 2 * numbers + 2 * 3 / 4 * numbers
    assert read_traffic(text, CHIP).memory == 5 * (layer + counting) + at_the_end


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("direction=LT", "direction=NE", "the loop loop does not say how often it runs"),
        ("mesh['a'=2,'b'=2] {'a','b'}", "?", "total does not say between how many chips it is"),
    ],
)
def test_what_a_program_does_not_say_is_not_guessed(before, after, message):
    assert before in TEXT
    with pytest.raises(LookupError, match=message):
        read_traffic(TEXT.replace(before, after), CHIP)


@pytest.mark.parametrize(
    ("groups", "chips"),
    [
        ("{{0,1},{2,3}}", 2),
        ("{}", 4),
        ("[2,2]<=[4]", 2),
        ("mesh['a'=2,'b'=2] {'a'}", 2),
        ("mesh['a'=8] {'a':(1)2}", 2),
    ],
)
def test_groups_are_read_in_every_form(groups, chips):
    text = TEXT.replace("mesh['a'=2,'b'=2] {'a','b'}", groups)
    received = read_traffic(text, CHIP).collectives["all-reduce"].received
    assert received == 2 * (chips - 1) / chips * 320


def test_only_scheduled_programs_are_read():
    with pytest.raises(ValueError, match="does not say that it is scheduled"):
        Program.parse(TEXT.replace("is_scheduled=true, ", ""))


SCRIPT = """
import json
import jax, jax.numpy as jnp
from dataclasses import asdict
from jax.sharding import NamedSharding, PartitionSpec as P
from taca_jax.parallel.mesh import MeshConfig, make_mesh
from taca_jax.planning.plan import devices_of
from taca_jax.planning.slices import Slice
from taca_jax.planning.traffic import read_traffic
where = Slice.of("v5e-4")
mesh = make_mesh(MeshConfig(), devices_of(where))
def given(spec, *shape):
    return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
def run(x, stack):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]
lowered = jax.jit(run).lower(given(P("fsdp"), 4096, 512), given(P(None, "fsdp"), 6, 512, 512))
text = lowered.compile().as_text()
print(json.dumps(asdict(read_traffic(text, where.chip))))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu")
def test_a_stack_that_is_shared_is_gathered_once():
    """By gathers or in pieces from neighbours, ahead of the loop or not: three quarters of it."""
    traffic = json.loads(last_line(run_python("-c", SCRIPT, environment=NOT_KEPT)))
    received = sum(moved["received"] for moved in traffic["collectives"].values())
    assert received == pytest.approx(6 * 512 * 512 * 2 * 3 / 4)
    # At least what comes in and goes out; at most that of each layer.
    activations, weights = 4096 * 512 * 2 / 4, 6 * 512 * 512 * 2
    assert activations < traffic["memory"] < 6 * 2 * activations + 3 * weights
    assert 0 <= traffic["waited"] <= received / CHIPS["v5e"].wire_bandwidth + traffic["seconds"]
