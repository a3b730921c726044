"""The table of a program's operations, from the text of a small program as libtpu prints them."""

import pytest

from taca_jax.parallel.chips import CHIPS
from taca_jax.planning.operations import operations
from taca_jax.planning.traffic import read_traffic

CHIP = CHIPS["v6e"]
KERNEL = (
    'custom_call_target="tpu_custom_call", backend_config={"custom_call_config":{"body":"TUz=",'
    '"cost_estimate":{"flops":"5000000000","transcendentals":"7","bytes_accessed":"9"}}}'
)
TEXT = f"""HloModule step, is_scheduled=true, entry_computation_layout={{()->f32[]}}, num_partitions=1

%fused (a: bf16[4,512,256], b: bf16[256,1024]) -> bf16[4,512,1024] {{
  %a = bf16[4,512,256]{{2,1,0}} parameter(0)
  %b = bf16[256,1024]{{1,0}} parameter(1)
  %k = bf16[1,256,1024]{{2,1,0}} bitcast(%b)
  ROOT %c = bf16[4,512,1024]{{2,1,0}} convolution(%a, %k), window={{size=1}}, dim_labels=0bf_0io->0bf
}}

%body (p: (s32[], bf16[4,512,256], bf16[256,1024])) -> (s32[], bf16[4,512,256], bf16[256,1024]) {{
  %p = (s32[], bf16[4,512,256]{{2,1,0}}, bf16[256,1024]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = bf16[4,512,256]{{2,1,0}} get-tuple-element(%p), index=1
  %w = bf16[256,1024]{{1,0}} get-tuple-element(%p), index=2
  %made = bf16[4,512,1024]{{2,1,0}} fusion(%x, %w), kind=kOutput, calls=%fused, metadata={{op_name="jit(step)/mlp_in/dot_general"}}, backend_config={{"estimated_cycles":"7000"}}
  %seen = bf16[4,512,256]{{2,1,0}} custom-call(%made), {KERNEL}
  ROOT %t = (s32[], bf16[4,512,256]{{2,1,0}}, bf16[256,1024]{{1,0}}) tuple(%i, %seen, %w)
}}

%condition (q: (s32[], bf16[4,512,256], bf16[256,1024])) -> pred[] {{
  %q = (s32[], bf16[4,512,256]{{2,1,0}}, bf16[256,1024]{{1,0}}) parameter(0)
  ROOT %less = pred[] constant(true)
}}

ENTRY %main (u: (s32[], bf16[4,512,256], bf16[256,1024])) -> (s32[], bf16[4,512,256], bf16[256,1024]) {{
  %u = (s32[], bf16[4,512,256]{{2,1,0}}, bf16[256,1024]{{1,0}}) parameter(0)
  ROOT %loop = (s32[], bf16[4,512,256]{{2,1,0}}, bf16[256,1024]{{1,0}}) while(%u), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
}}
"""  # noqa: E501 - lines as the compiler prints them


def test_each_operation_has_its_time_and_its_limit():
    kernel, product = operations(TEXT, CHIP)
    assert (kernel.name, kernel.times, product.name, product.times) == ("seen", 3, "made", 3)
    assert product.source == "jit(step)/mlp_in/dot_general"
    assert product.shape == (4, 512, 1024)
    assert product.seconds == pytest.approx(7000 / CHIP.clock)
    assert product.flops == 2 * 4 * 512 * 256 * 1024
    assert product.moved == 2 * (4 * 512 * 256 + 256 * 1024 + 4 * 512 * 1024)
    # This small product is bound by memory; the kernel by its FLOPs.
    assert product.limit(CHIP) == pytest.approx(product.moved / CHIP.memory_bandwidth)
    assert kernel.flops == 5e9
    assert kernel.seconds == pytest.approx(5e9 / CHIP.flops / CHIP.attention_share)
    assert kernel.limit(CHIP) == pytest.approx(5e9 / CHIP.flops)


def test_together_they_are_the_schedules_time():
    whole = sum(each.times * each.seconds for each in operations(TEXT, CHIP))
    assert read_traffic(TEXT, CHIP).seconds == pytest.approx(whole)
