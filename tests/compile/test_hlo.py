"""Collectives and traffic of programs written out here, against sums by hand."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_jax.compile import hlo

MESH = {"data": 2, "fsdp": 4}  # device = 4·data + fsdp

PROGRAM = """HloModule jit_step, is_scheduled=true

%add.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%cond.1 (state: (s32[], f32[8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(5)
  %state = (s32[], f32[8]) parameter(0)
  %index = s32[]{:T(128)} get-tuple-element(%state), index=0
  ROOT %less = pred[] compare(%index, %limit), direction=LT
}

%inner_cond.1 (state: (u32[], f32[8])) -> pred[] {
  %limit = u32[]{:T(128)} constant(3)
  ROOT %less = pred[] compare(%limit, %limit), direction=LT
}

%inner.1 (state: (u32[], f32[8])) -> (u32[], f32[8]) {
  %state = (u32[], f32[8]) parameter(0)
  %own = f32[8]{0} get-tuple-element(%state), index=1
  %send = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%own), source_target_pairs={{0,1},{1,2},{2,3},{3,0},{4,5},{5,6},{6,7},{7,4}}
  %moved = f32[8]{0} collective-permute-done(%send)
  ROOT %out = (u32[], f32[8]) tuple(%own, %moved)
}

%body.1 (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]) parameter(0)
  %part = bf16[16]{0} get-tuple-element(%state), index=1
  %whole = bf16[64]{0} all-gather(%part), replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp'}, dimensions={0}, metadata={op_name="jit(step)/gather"}
  %loop = (u32[], f32[8]) while(%state), condition=%inner_cond.1, body=%inner.1
  ROOT %out = (s32[], f32[8]) tuple(%whole, %part)
}

ENTRY %main.1 (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", backend_config={"body": {
}
}
  %loop = (s32[], f32[8]) while(%x), condition=%cond.1, body=%body.1
  %all = f32[100]{0} all-reduce(%x), replica_groups=[1,8]<=[8], to_apply=%add.1
  %rows = f32[10]{0} reduce-scatter(%x), replica_groups={{0,4},{1,5},{2,6},{3,7}}, dimensions={0}, to_apply=%add.1
  %alone = f32[10]{0} all-reduce(%x), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add.1
  ROOT %y = f32[8]{0} copy(%x)
}
"""


def test_loops_multiply_and_groups_name_their_axes() -> None:
    found = hlo.summed(hlo.collectives(PROGRAM, MESH))
    assert found == {
        ("all-gather", ("fsdp",)): (5, 5 * 128, 5 * 128 * 3 / 4),
        ("all-reduce", ("data", "fsdp")): (1, 400, 2 * 400 * 7 / 8),
        ("reduce-scatter", ("data",)): (1, 80, 80 / 2),  # its result is a half of what is reduced
        ("collective-permute", ("fsdp",)): (15, 15 * 32, 15 * 32.0),
    }, "an all-reduce of single devices speaks with nobody"


def test_largest_first_and_the_source_is_kept() -> None:
    found = hlo.collectives(PROGRAM, MESH)
    assert {one.source for one in found} == {"", "jit(step)/gather"}
    sent = [size for _, _, size in hlo.summed(found).values()]
    assert sent == sorted(sent, reverse=True)


@pytest.mark.parametrize(("text", "first"), [
    ("replica_groups={{0,2},{1,3}}", [[0, 2], [1, 3]]),
    ("replica_groups=[2,2]<=[4]", [[0, 1], [2, 3]]),
    ("replica_groups=[2,2]<=[2,2]T(1,0)", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3]]),
])
def test_every_way_of_writing_groups(text: str, first: list[list[int]]) -> None:
    np.testing.assert_array_equal(hlo._groups(f"%x = f32[2] all-reduce(%y), {text}, to_apply=%add", 4), first)


TRAFFIC = """HloModule m

%fused.1 (p0: f32[32,100], p1: s32[]) -> f32[100] {
  %p0 = f32[32,100]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %row = f32[1,100]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,100}
  ROOT %flat = f32[100]{0} bitcast(%row)
}

ENTRY %main (x: f32[32,100], i: s32[]) -> f32[100] {
  %x = f32[32,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[100]{0} fusion(%x, %i), kind=kLoop, calls=%fused.1
  %near = f32[100]{0:S(1)} copy(%row)
  ROOT %sum = f32[100]{0} add(%near, %row)
}
"""


def test_a_slice_counts_as_the_slice_and_scratch_memory_not_at_all() -> None:
    row, index = 400, 4
    # fusion: row + index read, row written; copy: row read (its result is scratch); add: row read, row written.
    assert hlo.traffic(TRAFFIC) == row + index + row + row + row + row
