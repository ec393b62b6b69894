"""Bounds from loops and tile schedules: trip counts against the mask, each limit by hand, the document."""

import re
import shutil
from dataclasses import replace

import numpy as np
import pytest

from ard_kernels.block_causal_attention.spec import visibility
from ard_kernels.block_causal_attention.tiles import make_tables, useful_share
from benchmarks import chip, launches, predict, sass
from benchmarks.launches import DKV, DQ, FORWARD, Binary, Launch
from benchmarks.ops import attention_job, attention_work, segment_job
from benchmarks.sass import Cost
from testing import waves

# A loop of one 64 x 64 tile at D = 64 for a warpgroup: 4 + 4 steps of k = 16, of which those of dQ and dK, dV are more.
LOOP = """\
        /*0000*/                   LDG.E R0, desc[UR4][R2.64] ;
.L_x_1:
{products}
        /*0090*/                   MUFU.EX2 R30, R30 ;
{mask}
        /*00c0*/               @P3 BRA `(.L_x_1) ;
        /*00d0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00e0*/                   EXIT ;
"""
MASK = """\
        /*00a0*/               @P1 BRA `(.L_x_2) ;
        /*00a0*/                   FSEL R25, R25, -INF , P1 ;
.L_x_2:"""
PRODUCT = "        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;"


def binary(products=FORWARD, warps=4, steps=None, mask=MASK):
    """A kernel with tiles of 64 x 64 at D = 64. steps: wgmma of a pass of its loop; by default all of a tile."""
    lines = [PRODUCT] * (4 * products.matmuls if steps is None else steps)
    flow = sass.flow_of(LOOP.format(products="\n".join(lines), mask=mask))
    return Binary("by hand", flow, 128, 32 * warps, 0, (64, 64), products)


CASES = [
    attention_job(2, 256, 64, "M4", "forward", 1.0).case,
    attention_job(1, 256, 64, "M3", "forward", 1.0).case,
    segment_job((128,) * 6, "teacher-forcing", "forward", 1.0, H=4, kv_heads=2, D=64).case,
]


@pytest.mark.parametrize("products", [FORWARD, DQ, DKV], ids=["forward", "dQ", "dKV"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_full_tiles_issue_the_useful_flops_and_no_more(case, products):
    launch = launches.attention_launch(case, binary(products))
    pairs = visibility(case.segments, case.tokens, case.tokens).pairs
    assert launch.issued_flops == 2 * products.matmuls * case.D * pairs * case.B * case.H
    if products is FORWARD:
        assert launch.issued_flops == attention_work(case, "forward")[0]


@pytest.mark.parametrize("by_key", [False, True])
def test_boundary_tiles_issue_what_the_schedule_visits(by_key):
    case = segment_job((100, 60, 96), "block-causal", "forward", 1.0, B=3, H=4, kv_heads=2, D=64).case
    launch = launches.attention_launch(case, binary(DKV if by_key else FORWARD))
    matmuls = 4 if by_key else 2
    useful = attention_work(case, "forward")[0] * matmuls / 2
    share = useful_share(case.segments, case.tokens, case.tokens, (64, 64), by_key)
    assert launch.issued_flops == pytest.approx(useful / share)
    assert launch.issued_flops > useful


def test_costs_of_a_tile():
    costs = launches.tile_costs(binary(), 64)
    # A wgmma of 64 x 64 x 16: 32 cycles of each warp's tensor core, (64 + 64) x 16 x 2 bytes of shared memory in all.
    assert costs.full == Cost(4 * (8 + 3), 4 * 8 * 32, 4 * 8, 8 * 32)
    assert costs.masked == costs.full + Cost(4)
    assert costs.program == Cost(4 * 3, 0, 0, 4 * (1 + 4), 4 * 512)
    assert costs.flops == 2 * 2 * 64 * 64 * 64


def test_a_tile_of_several_passes_takes_a_loop_around():
    with pytest.raises(ValueError, match="2 passes of its loop are a tile; expected a loop around it"):
        launches.tile_costs(binary(steps=4), 64)
    outer = LOOP.replace(
        ".L_x_1:", ".L_x_0:\n        /*0008*/                   FFMA R1, R2, R3, R4 ;\n.L_x_1:"
    ).replace("        /*00d0*/", "        /*00c8*/               @P4 BRA `(.L_x_0) ;\n        /*00d0*/")
    flow = sass.flow_of(outer.format(products="\n".join([PRODUCT] * 4), mask=MASK))
    costs = launches.tile_costs(replace(binary(), flow=flow), 64)
    assert costs.flops == 2 * 2 * 64 * 64 * 64
    assert costs.full.tensor == 4 * 8 * 32
    assert costs.full.issue == 4 * (2 * (4 + 3) + 2)


def test_unrolled_tiles_are_refused():
    with pytest.raises(ValueError, match="more FLOPs than a tile"):
        launches.tile_costs(binary(steps=32), 64)


def test_shared_heads_of_keys_are_read_once_from_hbm():
    case = CASES[2]
    launch = launches.attention_launch(case, binary())
    q_or_out, k_or_v = case.tokens * case.H * case.D * 2, case.tokens * case.key_heads * case.D * 2
    assert launch.hbm_bytes == 2 * q_or_out + 2 * k_or_v + 4 * case.tokens * case.H
    assert launch.l2_bytes > launch.hbm_bytes


@pytest.mark.parametrize(
    ("change", "binds"),
    [
        ({"amounts": Cost(tensor=4e6)}, "tensor"),
        ({"amounts": Cost(exp2=4e6)}, "exp2"),
        ({"amounts": Cost(issue=4e6)}, "issue"),
        ({"amounts": Cost(shared=1e6)}, "shared"),
        ({"l2_bytes": 1e6 * chip.L2_BYTES / chip.MULTIPROCESSORS}, "L2"),
        ({"hbm_bytes": 1e6 / chip.MULTIPROCESSORS / chip.CLOCK * chip.HBM_BYTES["H200"]}, "HBM"),
    ],
)
def test_each_limit(change, binds):
    """1e6 cycles of one multiprocessor, or the chip's share of them."""
    seconds = 1e6 / chip.MULTIPROCESSORS / chip.CLOCK
    launch = replace(Launch("by hand", Cost(), 0.0, 0.0, 1.0), **change)
    assert predict.bound(launch) == (pytest.approx(seconds), binds)
    waiting = replace(launch, busy=0.5)
    assert predict.bound(waiting)[0] == pytest.approx(seconds if binds in ("L2", "HBM") else 2 * seconds)


@pytest.mark.parametrize(("resident", "persistent"), [(1, False), (4, False), (1, True)])
def test_a_last_wave_makes_multiprocessors_wait(resident, persistent):
    case = attention_job(1, 256, 64, "M1", "forward", 1.0, H=16).case  # 16 heads of 16 tiles: 256 equal programs
    items = make_tables(case.segments, case.tokens, case.tokens, 64, 64, False).items
    assert launches.busy_share(items, 16, 16, resident, persistent) == pytest.approx(256 / (2 * 132))


@pytest.mark.parametrize(
    ("costs", "multiprocessors", "resident", "expected"),
    [
        ([3, 1, 1, 1], 2, 1, 3),  # 3 | 1 1 1
        ([3, 1, 1, 1], 1, 2, 6),  # one multiprocessor is never idle
        ([4, 2], 1, 2, 6),
        ([4], 3, 2, 4),  # alone, a block has all of its multiprocessor
        ([2, 2, 2, 8], 2, 2, 10),  # 2 and 2 | 2 and 8
        ([1, 5, 1, 1, 1], 2, 2, 6),  # 1 and 1 until 2, then the last one until 3 | 5 and 1
    ],
)
def test_blocks_share_their_multiprocessor(costs, multiprocessors, resident, expected):
    costs = np.array(costs, float)
    assert waves.shared_makespan(costs, multiprocessors, resident) == pytest.approx(expected)
    assert waves.shared_makespan(costs, multiprocessors, 1) == waves.makespan(costs, multiprocessors)


def test_the_chip_has_its_peak_rates():
    """What the constants multiply up to are the rates of NVIDIA's data sheet."""
    peak = chip.MULTIPROCESSORS * chip.TENSOR_FLOPS * chip.CLOCK
    assert peak == pytest.approx(989.4e12, rel=1e-3)


def test_unknown_blocks_are_refused():
    with pytest.raises(ValueError, match="block 'typo'; expected one of constants, versions"):
        predict.refreshed("<!-- prediction: typo -->\n<!-- end of prediction -->", ["typo"])


def test_the_document_has_the_constants():
    text = predict.DOCUMENT.read_text()
    assert predict.refreshed(text, ["constants"]) == text
    assert sorted(name for _, name, _ in predict.BLOCK.findall(text)) == sorted(predict.BLOCKS)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_document_has_what_the_compiled_kernel_says():
    text = predict.DOCUMENT.read_text()
    version = predict.compilers()
    if version not in text:
        pytest.skip(f"the document's numbers are of other compilers than {version}")
    (forward,) = launches.cuda_attention("sm90.cu", 72)
    row = [str(cell) for cell in predict.kernel_row(forward, 72)]
    lines = [re.split(r" *\| *", line)[1:-1] for line in text.splitlines() if line.startswith("| wgmma forward")]
    assert row in lines
