"""Collectives, read from the text of compiled programs as XLA writes it for CPU and TPU."""

import jax
import jax.numpy as jnp
import pytest

from lmjax.plan.collectives import by_kind, collectives

# The forms that XLA:TPU uses, cut down: a loop bounded by its condition, its first round taken out of it; a collective
# spread over two fusions; two of one channel; a reduce-scatter written as an all-reduce and a slice; groups given as
# positions in a mesh.
TPU = """\
HloModule jit_step, is_scheduled=true, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %add.1 = f32[]{:T(128)} add(%x, %y)
}

%cond (p: (s32[], bf16[16,64])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(13), metadata={op_name="lt"}
  ROOT %lt = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

%async_collective_fusion.1 (p: bf16[2,64]) -> bf16[16,64] {
  %all-gather.1 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={0}, metadata={op_name="jit(step)/reshard"}
}

%async_collective_fusion.2 (p: bf16[2,64]) -> bf16[16,64] {
  %all-gather.2 = bf16[16,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=5, \
replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}, dimensions={0}
}

%async_collective_fusion.3 (p: bf16[4,64]) -> bf16[32,64] {
  %all-gather.3 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="0"}, metadata={op_name="key"}
}

%async_collective_fusion.4 (p: bf16[4,64]) -> bf16[32,64] {
  %all-gather.4 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, \
replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, frontend_attributes={chain_id="1"}, metadata={op_name="value"}
}

%all-reduce-scatter.3 (input: f32[1024,8]) -> f32[128,8] {
  %all-reduce.5 = f32[1024,8]{1,0} all-reduce(%input), channel_id=6, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  ROOT %dynamic-slice.39 = f32[128,8]{1,0} dynamic-slice(%all-reduce.5, %multiply.5), dynamic_slice_sizes={128,8}
}

%body (p: (s32[], bf16[16,64])) -> (s32[], bf16[16,64]) {
  %fusion.1 = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.2 = bf16[16,64]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.2
  %fusion.3 = f32[128,8]{1,0} fusion(%g), kind=kCustom, calls=%all-reduce-scatter.3
  %fusion.4 = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.3
  %fusion.5 = bf16[32,64]{1,0} fusion(%x), kind=kCustom, calls=%async_collective_fusion.4
}

ENTRY %main (a: bf16[2,64]) -> bf16[2,64] {
  %constant.2 = s32[]{:T(128)} constant(1)
  %copy.1 = s32[]{:T(128)} copy(%constant.2)
  %tuple = (s32[]{:T(128)}, bf16[16,64]{1,0}) tuple(%copy.1, %a)
  %while.1 = (s32[]{:T(128)}, bf16[16,64]{1,0}) while(%tuple), condition=%cond, body=%body
  %all-reduce.7 = (f32[10]{0}, bf16[4]{0}) all-reduce(%a, %b), channel_id=9, \
replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %all-reduce.8 = f32[10]{0} all-reduce(%a), channel_id=10, replica_groups={{0},{1}}, to_apply=%add
  %all-reduce.9 = f32[100]{0} all-reduce(%a), channel_id=13, \
replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}, to_apply=%add
  %psum.36 = f32[1000]{0} all-reduce(%a), channel_id=12, replica_groups=[1,8]<=[8], to_apply=%add
  %send.33 = (bf16[48,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%b, %after), channel_id=14, \
frontend_attributes={_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %send.34 = (f32[8]{0}, u32[], token[]) send(%c, %after), channel_id=15, \
frontend_attributes={_xla_megascale_target="{1,2,3,4}x{0:1}",_xla_megascale_transfer_type="ALL_GATHER"}
  %rows = f32[64,8]{1,0} bitcast(%a)
  %ragged_all_to_all.1 = f32[512,8]{1,0} ragged-all-to-all(%rows, %room, %i, %j, %k, /*index=5*/%l), channel_id=1, \
replica_groups=[1,8]<=[8]
  %collective-permute.1 = f32[10]{0} collective-permute(%a), channel_id=11, source_target_pairs={{0,1},{1,0}}
  %all-gather-start.1 = (f32[2]{0}, f32[16]{0}) all-gather-start(%a), channel_id=12, \
replica_groups=[1,8]<=[8], dimensions={0}
}
"""


def test_the_forms_of_tpu_programs() -> None:
    found = {one.kind + str(one.bytes): one for one in collectives(TPU)}
    gather = found["all-gather2048"]
    assert gather.times == 12 and gather.group == (0, 4) and gather.name == "jit(step)/reshard"
    assert gather.sent == 12 * 2048 / 2
    assert gather.axes({"data": 2, "fsdp": 4}) == ("data",)
    scatter = found["reduce-scatter32768"]
    assert scatter.times == 12 and scatter.sent == 12 * 32768 * 7 / 8
    both = found["all-reduce48"]  # a tuple of two arrays; the one among groups of one device is left out
    assert both.group == (0, 4) and both.sent == 2 * 48 / 2
    assert found["collective-permute40"].sent == 40
    assert found["all-gather64"].sent == 64 * 7 / 8  # the result of a start holds its operand, too
    assert found["all-reduce400"].group == (0, 4)  # the devices in another order
    assert found["all-reduce4000"].sent == 2 * 4000 * 7 / 8  # of the channel of another
    between = found["all-reduce98304"]  # two slices of four devices
    assert between.group == (0, 4) and between.sent == 98304
    assert found["all-gather128"].group == (0, 2, 4, 6) and found["all-gather128"].sent == 96
    assert sorted(one.name for one in collectives(TPU) if one.bytes == 4096) == ["key", "value"]  # of one channel
    assert found["all-to-all2048"].sent == 2048 * 7 / 8  # of 64 rows, into room for those of eight devices
    assert len(found) == 11
    assert by_kind(list(found.values()))["reduce-scatter"] == scatter.sent


def test_a_program_of_one_device_sends_nothing() -> None:
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.scan(lambda x, _: (jnp.sin(x) @ x, None), x, length=3)[0]

    assert collectives(jax.jit(loop).lower(jnp.ones((4, 4))).compile().as_text()) == []


def test_a_loop_whose_rounds_the_data_decides_counts_once() -> None:
    def loop(x: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: x.sum() > 1.5, lambda x: x @ x, x)

    assert collectives(jax.jit(loop).lower(jnp.ones((4, 4))).compile().as_text()) == []
    unbounded = TPU.replace("s32[]{:T(128)} constant(13)", "s32[]{:T(128)} get-tuple-element(%p), index=2")
    times = {one.times for one in collectives(TPU)}, {one.times for one in collectives(unbounded)}
    assert times == ({1, 12}, {1}) and len(collectives(unbounded)) == len(collectives(TPU))


@pytest.mark.parametrize(
    "branches", ["branch_computations={%none, %little, %much}", "true_computation=%much, false_computation=%little"]
)
def test_of_a_switch_the_branch_that_sends_most_counts(branches: str) -> None:
    sums = "".join(
        f"%{name} (p: f32[{size}]) -> f32[{size}] {{\n  %r.{size} = f32[{size}]{{0}} all-reduce(%p), "
        f"channel_id={size}, replica_groups={{{{0,1}}}}, to_apply=%add\n}}\n\n"
        for name, size in (("little", 5), ("much", 7))
    )
    switch = f"ENTRY %main (a: f32[5]) -> f32[] {{\n  %c = f32[] conditional(%i, %a, %b), {branches}\n}}\n"
    text = f"HloModule one, num_partitions=2\n\n{sums}%none (p: f32[5]) -> f32[5] {{\n}}\n\n{switch}"
    assert [one.bytes for one in collectives(text)] == [28]


def test_another_text_is_refused() -> None:
    with pytest.raises(AssertionError, match="ENTRY"):
        collectives("module @jit_step {}")
