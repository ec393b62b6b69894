"""History attention and qk_norm_rope by hand: trip counts against the mask, bytes, what a split adds, a token."""

import pytest

from benchmarks import history_launches, predict, row_launches, sass
from benchmarks.history_launches import Step, attended, growing, rolling, table_tiles, triton_tiles
from benchmarks.launches import FORWARD, Binary
from benchmarks.ops import attention_work, norm_rope_job
from benchmarks.sass import Cost
from testing.cases import Case

PRODUCT = "        /*0010*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24 ;\n"
# Tiles of 64 x 64 at D = 64; a branch around the append, then a loop over the cache and one over the own segment.
KERNEL = f"""\
        /*0000*/               @P0 BRA `(.L_x_1) ;
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0000*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_1:
{8 * PRODUCT}        /*0020*/               @P1 BRA `(.L_x_1) ;
.L_x_2:
{8 * PRODUCT}        /*0020*/                   FFMA R1, R2, R3, R4 ;
        /*0030*/               @P2 BRA `(.L_x_2) ;
        /*0040*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0050*/                   EXIT ;
"""
BINARY = Binary("by hand", sass.flow_of(KERNEL), 128, 128, 0, (64, 64), FORWARD)
RING = rolling(Case("history_attention", 1, (128,), H=2, D=64), 3, 1)


@pytest.mark.parametrize("mask", ["M4", "M2", "M3", "M2+sink"])
@pytest.mark.parametrize("lengths", [(128, 128, 128, 128), (64, 192, 128)])
def test_steps_issue_the_useful_flops_of_the_mask_and_no_more(mask, lengths):
    case = Case("history_attention", 3, lengths, H=2, D=64, mask=mask)
    steps = growing(case)
    assert sum(step.flops for step in steps) == attention_work(case, "forward")[0]
    for step in steps:
        by_tables = table_tiles(step, step.place.runs, (64, 64))
        assert by_tables[1] == 0
        for tiles in (triton_tiles(step, 64), by_tables):
            assert attended(step, BINARY, tiles).issued_flops == step.flops


def test_columns_that_fill_no_tile_are_issued_as_whole_ones():
    step = growing(Case("history_attention", 1, (100, 60), H=1, D=64))[1]
    assert triton_tiles(step, 64) == (2, 1)  # 100 earlier tokens, 60 own
    assert table_tiles(step, step.place.runs, (64, 64)) == (2, 1)  # 160 in one run
    assert attended(step, BINARY, (2, 1)).issued_flops == 4 * 64 * 64 * 192


def test_a_full_ring_sees_all_of_itself_and_moves_nothing_but_the_own_segment():
    assert sum(RING.past) + RING.length == 4 * 128
    assert RING.past == [128, 256]  # the own segment lies in the first slot behind the sink
    tensor = 2 * 128 * 64 * 2
    launch = attended(RING, BINARY, triton_tiles(RING, 64), appends=True)
    assert launch.hbm_bytes == 4 * tensor + 2 * 3 * tensor + 2 * tensor  # q, k, v, out; earlier keys and values; append
    tiles_read = 2 * 2 * 8 * 2 * 64 * 64 * 2  # row tiles x heads x column tiles, K and V
    assert launch.l2_bytes == 2 * tensor + 4 * tensor + tiles_read  # q, out; the append reads and writes
    alone = attended(RING, BINARY, triton_tiles(RING, 64))
    assert launch.hbm_bytes - alone.hbm_bytes == 2 * tensor
    assert history_launches.added(RING, 1).l2_bytes == tensor


def test_splits_share_the_tiles_and_only_the_first_appends():
    tiles = triton_tiles(RING, 64)
    assert tiles == (6, 2)
    whole, split = (attended(RING, BINARY, tiles, splits, appends=True) for splits in ((1, 8), (2, 4)))
    programs = 2 * 2  # row tiles x heads
    assert split.issued_flops == whole.issued_flops
    assert whole.amounts.issue == programs * 4 * (6 * 9 + 2 * 10 + 5)
    # Besides its loops a program has the branch, the copy's two instructions, a store and EXIT, in each of 4 warps.
    assert history_launches.append_share(BINARY) == Cost(4 * 2, 0, 0, 4 * (4 + 4), 4 * 512)
    assert split.amounts.issue - whole.amounts.issue == programs * 4 * 3
    rows, workspace = 2 * 128, 4 * 2 * (64 + 2)
    assert history_launches.workspace_bytes(RING, 2) == rows * workspace
    assert split.l2_bytes == whole.l2_bytes + rows * workspace  # q is read twice, out is not written
    assert split.hbm_bytes == whole.hbm_bytes - RING.segment_bytes  # out is written by the sum of the splits
    assert history_launches.added(RING, 2).l2_bytes == rows * (workspace + 2 * 64)


def test_split_programs_fill_the_chip():
    step = Step(RING.case, 64 * 66 // 2, RING.place)  # 66 programs
    each = [attended(step, BINARY, (6, 2), splits).busy for splits in ((1, 8), (2, 4))]
    assert each == pytest.approx([0.5, 1.0])


# A token of a CUDA kernel of qk_norm_rope: x, the sum over all heads or one, weights in fp32 or 16 bits, a table.
TOKEN = """\
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P0 BRA `(.L_x_3) ;
{shuffles}
        /*0030*/                   STS [R7], R8 ;
        /*0030*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
.L_x_1:
        /*0040*/                   LDS R5, [R6] ;
        /*0040*/                   FADD R5, R5, R6 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0050*/                   BRA `(.L_x_5) ;
.L_x_3:
        /*0060*/                   SHFL.IDX PT, R5, R6, R7, 0x1f ;
        /*0070*/               @P2 BRA `(.L_x_3) ;
        /*0080*/                   SHFL.IDX PT, R5, R6, R7, 0x1f ;
.L_x_5:
        /*0090*/                   MUFU.RSQ R5, R5 ;
        /*00a0*/               @P3 BRA `(.L_x_6) ;
        /*00b0*/                   LDG.E.64 R4, desc[UR4][R2.64] ;
        /*00b0*/                   BRA `(.L_x_7) ;
.L_x_6:
        /*00c0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00c0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
.L_x_7:
        /*00d0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00d0*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*00e0*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*00f0*/               @P4 BRA `(.L_x_0) ;
        /*0100*/                   EXIT ;
""".format(shuffles="\n".join(["        /*0030*/                   SHFL.BFLY PT, R5, R6, 0x10, 0x1f ;"] * 5))


@pytest.mark.parametrize(
    ("over", "issue"),
    [
        ("head", 2 + 4 * 2 + 1 + 2 + 6),  # sums over 9 units in four steps
        ("all", 2 + 7 + 6 * 3 + 1 + 2 + 6),  # 6 warps
    ],
)
def test_a_token_of_qk_norm_rope(over, issue, monkeypatch):
    monkeypatch.setattr(row_launches, "rope_geometry", lambda heads, head_dim: (9, 3, 1, 6))
    case = norm_rope_job(1, 256, 16, 72, over, "forward", 1.0).case
    token, program = row_launches.cuda_rope_cost(sass.flow_of(TOKEN), case, "forward")
    assert token.issue == issue
    assert program.issue == 2
    assert token.stored == 512


def test_a_way_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(row_launches, "rope_geometry", lambda heads, head_dim: (9, 3, 2, 6))
    case = norm_rope_job(1, 256, 16, 72, "head", "forward", 1.0).case
    with pytest.raises(ValueError, match="no way with a count"):  # of two heads of a thread
        row_launches.cuda_rope_cost(sass.flow_of(TOKEN), case, "forward")


def test_rows_of_the_tables_have_both_directions_in_order():
    for jobs in predict.by_case([*predict.attention_jobs(), *predict.row_jobs()]):
        assert [job.direction for job in jobs] == ["forward", "backward"]
