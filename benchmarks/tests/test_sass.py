"""Machine code as blocks, loops and paths, on text whose counts are known by hand, and on what ptxas makes of PTX."""

import importlib.util
import subprocess
from pathlib import Path

import pytest

from benchmarks import chip, sass
from benchmarks.sass import Cost, Instruction

# A loop of two matrix products with a masked part and a store behind branches; a spin loop; code for diverged threads.
TEXT = """\
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R20 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
.L_x_1:
        /*0030*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24 ;
        /*0040*/                   BRA.DIV UR4, `(.L_x_9) ;
        /*0050*/               @P1 BRA `(.L_x_2) ;
        /*0060*/                   FSEL R25, R25, -INF , P1 ;
        /*0070*/                   FSEL R26, R26, -INF , P1 ;
.L_x_2:
        /*0080*/                   MUFU.EX2 R30, R30 ;
        /*0090*/                   HGMMA.64x16x16.F32.BF16 R88, R128, gdesc[UR24].tnspB, R88, gsb0 ;
        /*00a0*/                   BRA P2, `(.L_x_3) ;
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_3:
        /*00c0*/               @P3 BRA `(.L_x_1) ;
        /*00d0*/                   EXIT ;
.L_x_9:
        /*00e0*/                   WARPSYNC.COLLECTIVE R3, `(.L_x_9) ;
        /*00f0*/                   BRA `(.L_x_9);
.L_x_4:
"""


def operations(flow, way):
    return [instruction.operation for instruction in flow.instructions(way)]


def has_product(instruction):
    return instruction.operation in sass.TENSOR


def products(block):
    return sum(map(has_product, block))


def test_loops_are_found():
    flow = sass.flow_of(TEXT)
    spin, tiles = flow.loops
    assert operations(flow, spin.body) == ["SYNCS", "BRA"]
    assert operations(flow, sorted(tiles.body)).count("HGMMA") == 2
    assert flow.innermost(has_product) == [tiles]
    assert flow.around(tiles) is None


def test_ways_through_a_loop():
    flow = sass.flow_of(TEXT)
    (loop,) = flow.innermost(has_product)
    stores = frozenset(number for number, block in enumerate(flow.blocks) if "STG" in {i.operation for i in block})
    lean = flow.path(lambda block: (products(block), -len(block)), loop, stores)
    assert operations(flow, lean) == ["HGMMA", "BRA", "BRA", "MUFU", "HGMMA", "BRA", "BRA"]
    heavy = flow.path(lambda block: (len(block),), loop, stores)
    assert operations(flow, heavy).count("FSEL") == 2
    assert "STG" not in operations(flow, heavy)
    storing = flow.path(
        lambda block: (-len(block),), loop, count=lambda b: sum(i.operation == "STG" for i in b), wanted=1
    )
    assert operations(flow, storing).count("STG") == 1
    assert "FSEL" not in operations(flow, storing)
    with pytest.raises(ValueError, match=r"no way with a count of 2; there are \[0, 1\]"):
        flow.path(lambda block: (0,), loop, count=lambda b: sum(i.operation == "STG" for i in b), wanted=2)


def test_a_way_through_the_whole_kernel_passes_each_loop_once():
    flow = sass.flow_of(TEXT)
    whole = operations(flow, flow.path(lambda block: (products(block), -len(block))))
    assert whole.count("HGMMA") == 2
    assert whole[0] == "S2R"
    assert whole[-1] == "EXIT"
    assert "WARPSYNC" not in whole


def test_nested_loops():
    text = """\
.L_x_0:
        /*0000*/                   LDGSTS.E.BYPASS.128 [R15+0x400], [R2.64], !P0 ;
.L_x_1:
        /*0010*/                   HMMA.16816.F32.BF16 R8, R8, R8, RZ ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
        /*0030*/               @P1 BRA `(.L_x_0) ;
        /*0040*/                   EXIT ;
"""
    flow = sass.flow_of(text)
    (inner,) = flow.innermost(has_product)
    outer = flow.around(inner)
    assert operations(flow, inner.body) == ["HMMA", "BRA"]
    assert operations(flow, sorted(outer.body)) == ["LDGSTS", "HMMA", "BRA", "BRA"]


@pytest.mark.parametrize(
    ("opcode", "operands", "expected"),
    [
        # 64 x 128 x 16 at 4096 FLOPs a cycle of the multiprocessor: 64 cycles for the warpgroup's four warps. Its A and
        # B from shared memory: (64 + 128) x 16 x 2 bytes at 128 a cycle are 48 for all four.
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], RZ, !UPT", Cost(1, 64, 0, 12)),
        ("HGMMA.64x16x16.F32.BF16", "R88, R128, gdesc[UR24].tnspB, R88", Cost(1, 8, 0, 1)),
        ("HMMA.16816.F32.BF16", "R8, R8, R8, RZ", Cost(1, 4 / chip.MMA_SYNC_SHARE)),
        ("HMMA.1688.F32.BF16", "R8, R8, R8, RZ", Cost(1, 2 / chip.MMA_SYNC_SHARE)),
        ("MUFU.EX2", "R1, R2", Cost(1, 0, 8)),  # 4 a cycle and scheduler
        ("LDS", "R1, [R2]", Cost(1, 0, 0, 1)),
        ("LDS.128", "R4, [UR5+0x320c0]", Cost(1, 0, 0, 4)),
        ("LDSM.16.MT88.4", "R4, [R2]", Cost(1, 0, 0, 4)),
        ("LDSM.16.M88", "R4, [R2]", Cost(1, 0, 0, 1)),
        ("LDGSTS.E.BYPASS.128", "[R15+0x400], [R2.64], !P0", Cost(1, 0, 0, 4)),
        ("STG.E.128", "desc[UR4][R2.64], R4", Cost(1, 0, 0, 4, 512)),
        ("STG.E.U16", "desc[UR4][R2.64], R4", Cost(1, 0, 0, 0.5, 64)),
        ("LDG.E", "R1, desc[UR4][R2.64]", Cost(1, 0, 0, 1)),
        ("SHFL.BFLY", "PT, R1, R2, 0x1, 0x1f", Cost(1, 0, 0, 1)),
        ("FFMA", "R1, R2, R3, R4", Cost(1)),
    ],
)
def test_costs_of_instructions(opcode, operands, expected):
    assert sass.cost(Instruction("", opcode, operands)) == pytest.approx(expected)


def test_an_unknown_matrix_instruction_is_refused():
    with pytest.raises(ValueError, match=r"HMMA\.16832.*expected a shape of 16816, 1688"):
        sass.cost(Instruction("", "HMMA.16832.SP.F32", "R8, R8, R8, RZ"))


PTX = """\
.version 8.0
.target sm_90
.address_size 64
.visible .entry kernel(.param .u64 to, .param .u32 count)
{
  .reg .pred %p;
  .reg .b32 %i, %n, %a;
  .reg .f32 %f<5>;
  .reg .b64 %to;
  .shared .align 16 .b8 tile[16384];
  ld.param.u64 %to, [to];
  ld.param.u32 %n, [count];
  mov.u32 %i, 0;
  mov.u32 %a, tile;
  mov.f32 %f0, 0f00000000; mov.f32 %f1, %f0; mov.f32 %f2, %f0; mov.f32 %f3, %f0;
LOOP:
  .pragma "nounroll";
  ld.shared.f32 %f4, [%a];
  ex2.approx.ftz.f32 %f4, %f4;
  st.shared.f32 [%a], %f4;
  {PRODUCTS}
  add.u32 %a, %a, 64;
  add.u32 %i, %i, 1;
  setp.lt.u32 %p, %i, %n;
  @%p bra LOOP;
  st.global.v4.f32 [%to], {%f0, %f1, %f2, %f3};
  ret;
}
"""
PRODUCT = (
    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f0,%f1,%f2,%f3},{%i,%i,%i,%i},{%i,%n},{%f0,%f1,%f2,%f3};"
)


@pytest.mark.parametrize("count", [1, 5])
def test_what_ptxas_makes_of_a_loop(tmp_path, count):
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(PTX.replace("{PRODUCTS}", "\n".join([PRODUCT] * count)))
    ptxas = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "ptxas"
    subprocess.run([str(ptxas), "-arch=sm_90", str(source), "-o", str(cubin)], check=True)
    (flow,) = sass.disassemble(cubin).values()
    (loop,) = flow.innermost(has_product)
    way = flow.instructions(flow.path(lambda block: (products(block), -len(block)), loop))
    assert sass.flops(way) == count * 2 * 16 * 8 * 16
    taken = sum(map(sass.cost, way), Cost())
    assert taken.exp2 == 8
    assert taken.shared == 2
    assert taken.stored == 0
    assert sum(map(sass.cost, flow.instructions(range(len(flow.blocks)))), Cost()).stored == 32 * 16
