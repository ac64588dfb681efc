"""Reading compiled programs: by hand on small texts, and on a program that this machine compiles."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from rlae_jax import hlo

TEXT = """\
HloModule jit_f, is_scheduled=true, input_output_alias={ {0}: (0, {}, may-alias), {2}: (1, {}, must-alias) }, entry={x}

%region_0.1 (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add.1 = f32[] add(%a, %b)
}

%fused_computation (p: bf16[4,64]) -> bf16[4,64] {
  %p = bf16[4,64]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %copy.9 = bf16[4,64]{0,1:T(8,128)(2,1)} copy(%p)
}

%inner (t: (s32[])) -> (s32[]) {
  %t = (s32[]) parameter(0)
  ROOT %x.2 = (s32[]) fusion(%t), kind=kLoop, calls=%nothing, backend_config={"estimated_cycles":"5"}
}

%until (t: (s32[])) -> pred[] {
  ROOT %less = pred[]{:T(512)} constant(false)
}

%fused_computation.2 (p: bf16[4,64]) -> bf16[4,64] {
  %p.2 = bf16[4,64]{1,0} parameter(0)
  %copy.8 = bf16[4,64]{0,1} copy(%p.2)
  ROOT %negate = bf16[4,64]{0,1} negate(%copy.8)
}

%branch_a (t: s32[]) -> s32[] {
  ROOT %x.3 = s32[] add(%t, %t), backend_config={"estimated_cycles":"7"}
}

%branch_b (t: s32[]) -> s32[] {
  ROOT %x.4 = s32[] add(%t, %t), backend_config={"estimated_cycles":"11"}
}

%body (t: (s32[], bf16[4,64], /*index=2*/f32[8])) -> (s32[], bf16[4,64], f32[8]) {
  %t = (s32[]{:T(128)}, bf16[4,64]{1,0:T(8,128)(2,1)}, /*index=2*/f32[8]{0:T(128)S(1)}) parameter(0)
  %fusion.1 = bf16[4,64]{0,1} fusion(%t), calls=%fused_computation, backend_config={"estimated_cycles":"100"}
  %all-reduce.1 = (f32[8]{0}, f32[4,2]{1,0}) all-reduce(%t, %t), to_apply=%region_0.1, metadata={op_name="jit(f)/dot"}
  %ag = (f32[2]{0}, f32[8]{0}) all-gather-start(%t), dimensions={0}
  %agd = f32[8]{0} all-gather-done(%ag)
  %start = (bf16[4,64]{1,0:S(1)}, bf16[4,64]{1,0}, u32[]) copy-start(%fusion.1)
  %there = bf16[4,64]{1,0:S(1)} copy-done(%start)
  %fusion.2 = bf16[4,64]{0,1} fusion(%there), kind=kLoop, calls=%fused_computation.2
  %copy.4 = bf16[4,64]{1,0} copy(%fusion.1)
  %back = (bf16[4,64]{1,0}, bf16[4,64]{1,0:S(1)}, u32[]) copy-start(%there)
  %while.2 = (s32[]) while(%t), condition=%until, body=%inner, backend_config={"known_trip_count":{"n":"3"}}
  %choose = s32[] conditional(%t, %t, %t), branch_computations={%branch_a, %branch_b}
  ROOT %out = (s32[], bf16[4,64], /*index=2*/f32[8]) tuple(%t, %fusion.1, %agd)
}

%condition (t: (s32[], bf16[4,64], f32[8])) -> pred[] {
  ROOT %less.1 = pred[] constant(true)
}

ENTRY %main.5 (x: bf16[4,64]) -> (s32[], bf16[4,64], f32[8]) {
  %x = bf16[4,64]{1,0} parameter(0)
  %copy.2 = bf16[4,64]{1,0} copy(%x)
  %cp = f32[8]{0} collective-permute(%x), source_target_pairs={{0,1}}
  ROOT %while.1 = (s32[], bf16[4,64], /*index=2*/f32[8]) while(%x), condition=%condition, body=%body
}
"""


@pytest.fixture(scope="module")
def module():
    return hlo.parse(TEXT)


def test_computations_and_instructions(module):
    assert module.entry == "main.5"
    assert module.aliases == 2
    assert list(module.computations)[:2] == ["region_0.1", "fused_computation"]
    fusion = module.computations["body"][1]
    assert (fusion.name, fusion.opcode, fusion.calls, fusion.cycles) == (
        "fusion.1",
        "fusion",
        ("fused_computation",),
        100,
    )
    assert fusion.shapes == (hlo.Shape("bf16", (4, 64)),)
    assert fusion.nbytes == 512
    assert fusion.operands == ("t",)
    assert module.computations["body"][-1].operands == ("t", "fusion.1", "agd")
    assert module.computations["body"][2].op_name == "jit(f)/dot"


def test_tuples_end_where_their_own_bracket_is_closed(module):
    carried = module.computations["body"][0]
    assert carried.opcode == "parameter"
    assert list(map(str, carried.shapes)) == ["s32[]", "bf16[4,64]", "f32[8]"]
    assert [shape.space for shape in carried.shapes] == [0, 0, 1]


def test_loops_and_what_they_run(module):
    outer, inner = module.loops()
    assert (outer.name, outer.body, outer.trips) == ("while.1", "body", None)
    assert (inner.name, inner.trips) == ("while.2", 3)
    assert set(module.reach("body")) == {
        *("body", "fused_computation", "fused_computation.2", "region_0.1", "inner", "until", "branch_a", "branch_b")
    }
    assert {"copy.9", "x.2", "x.4"} <= {i.name for i in module.inside(outer)}
    assert [i.name for i in module.outside_loops()] == ["x", "copy.2", "cp", "while.1"]


def test_a_loop_is_found_by_what_it_carries(module):
    assert module.loop_carrying(hlo.Shape("bf16", (4, 64))).name == "while.1"
    with pytest.raises(ValueError, match=r"no loop carries f32\[9\]"):
        module.loop_carrying(hlo.Shape("f32", (9,)))


def test_collectives_count_where_they_start(module):
    inside = module.inside(next(module.loops()))
    assert hlo.collectives(inside) == {
        ("all-reduce", ("f32[8]", "f32[4,2]")): 1,
        ("all-gather", ("f32[2]", "f32[8]")): 1,
    }
    assert hlo.collective_bytes(inside) == 32
    assert hlo.collectives(module.outside_loops()) == {("collective-permute", ("f32[8]",)): 1}
    assert hlo.collective_bytes(module.inside(list(module.loops())[1])) == 0


def test_copies_within_the_main_memory(module):
    """A fusion that ends in one counts; copies to a TPU's vector memory and back do not, nor those within a fusion."""
    inside = module.inside(next(module.loops()))
    assert [i.name for i in module.copies(inside, 512)] == ["fusion.1", "copy.4"]
    assert module.copies(inside, 513) == []


def test_cycles_of_branches_and_inner_loops(module):
    assert module.cycles("body") == 100 + 3 * 5 + 11


def test_sizes():
    assert hlo.Shape("pred", (3,)).nbytes == 3
    assert hlo.Shape("s4", (2, 3)).nbytes == 3
    assert hlo.Shape("f8e4m3fn", (2, 3)).nbytes == 6
    assert hlo.Shape("c64", ()).nbytes == 8
    assert hlo.Shape("token", ()).nbytes == 0


def test_other_text_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        hlo.parse("module @jit_f {}")


def test_a_real_program():
    """A loop that updates an array in place, under its donation."""

    def f(x, n):
        return lax.while_loop(lambda c: c[1] < n, lambda c: (c[0].at[c[1]].set(c[1]), c[1] + 1), (x, 0))

    compiled = jax.jit(f, donate_argnums=0).lower(jnp.zeros(1000, jnp.int32), 5).compile()
    module = hlo.parse(compiled.as_text())
    loop = module.loop_carrying(hlo.Shape("s32", (1000,)))
    assert module.aliases == 1
    assert module.copies(module.inside(loop), 4000) == []
    assert hlo.collectives(module.inside(loop)) == {}
