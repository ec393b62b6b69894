"""The Hopper kernel's source, run by testing/emulator on CPU tensors; its layouts, which are plain index algebra."""

import numpy as np
import pytest
import torch

from ard_kernels.block_causal_attention.cuda import HEAD_DIMS
from ard_kernels.block_causal_attention.reference import block_causal_attention as reference
from ard_kernels.block_causal_attention.spec import block_causal
from ard_kernels.block_causal_attention.tiles import make_tables
from ard_kernels.common import extension
from testing import plain
from testing.oracle import assert_close

pytestmark = pytest.mark.simulated

BLOCK_M = BLOCK_N = 128
DTYPES = {torch.bfloat16: 1, torch.float16: 2}
MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "window2_sink1": (2, 1)}


@pytest.fixture
def cuda(emulated):
    return emulated


def views(*tensors):
    return tuple(map(extension.heads_view, tensors))


def serves(cuda, q, k, v, out, D=72, dtype=torch.bfloat16, scale=0.1, chip=90):
    """Whether the Hopper kernel takes these tensors, on that chip."""
    B, H, T, _ = q.shape
    sizes = (B, H, H, T, T), scale, extension.dtype_code(dtype), D, chip, 132
    blocks, *tile = cuda.attention_forward_kernel(*views(q, k, v, out), *sizes)
    assert not blocks or (blocks == 132 and tile == [BLOCK_M, BLOCK_N])
    return blocks > 0


def run(cuda, q, k, v, lengths, mask, scale=None, multiprocessors=3, seed=0, group=None):
    """(out, lse); both start as NaN, and so does what lies around `out`."""
    B, H, T, D = q.shape
    out = q.new_full((B, T + 2, H, D), float("nan"))
    lse = torch.full((B, H, T), float("nan"))
    own = out[:, 1:-1].transpose(1, 2)
    made = make_tables(block_causal(lengths, *mask), T, T, BLOCK_M, BLOCK_N, False)
    tables = *(table.ctypes.data for table in made), len(made[0]), group or B * H
    scale = D**-0.5 if scale is None else scale
    assert serves(cuda, q, k, v, own, D, q.dtype, scale)
    cuda.set_seed(seed)
    sizes = (B, H, H, T, T), scale, extension.dtype_code(q.dtype), D
    cuda.attention_forward(*views(q, k, v, own), lse.data_ptr(), tables, *sizes, multiprocessors, 0)
    cuda.set_seed(0)
    assert cuda.counts()["bank_conflicts"] == 0
    assert out[:, [0, -1]].isnan().all(), "wrote rows that are not its own"
    return own, lse


def packed(B, H, T, D, dtype):
    return (x.transpose(1, 2) for x in torch.randn(B, T, 3, H, D, dtype=dtype).unbind(2))


def check(cuda, q, k, v, lengths, mask, scale=None, **options):
    out, lse = run(cuda, q, k, v, lengths, mask, scale, **options)
    expected, expected_lse = reference(q, k, v, lengths, *mask, scale=scale)
    assert_close(out, plain.block_causal_attention(q, k, v, lengths, *mask, scale), expected, label="out")
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-5, atol=1e-5)
    return out, lse


CASES = {"equal": ([64], 192), "across": ([50, 70, 91], 211), "full": ([128], 256), "ragged": ([1, 3, 130, 100], 234)}


@pytest.mark.parametrize(
    ("D", "dtype", "mask"),
    [(72, torch.bfloat16, mask) for mask in MASKS]
    + [(D, torch.bfloat16, "M4") for D in HEAD_DIMS if D != 72]
    + [(D, torch.float16, "window2_sink1") for D in HEAD_DIMS],
)
def test_values_cuda(cuda, D, mask, dtype):
    for lengths, T in CASES.values():
        check(cuda, *packed(1, 2, T, D, dtype), lengths, MASKS[mask])


@pytest.mark.parametrize(
    ("D", "mask"),
    [(72, MASKS["M4"]), (128, MASKS["M2"])]
    + [pytest.param(D, MASKS["M4" if D in (64, 96) else "M2"], marks=pytest.mark.slow) for D in (64, 80, 96, 112)],
    ids=str,
)
def test_bit_equal_in_every_order_and_distribution_cuda(cuda, D, mask):
    """Thread orders, landing times, and few or many blocks: nothing of it shows in a single bit."""
    q, k, v = packed(2, 3, 300, D, torch.bfloat16)
    first = check(cuda, q, k, v, [100], mask, multiprocessors=18)
    for seed, multiprocessors, group in ((1, 1, 6), (2, 4, 4), (3, 7, 1), (4, 100, 2)):
        again = run(cuda, q, k, v, [100], mask, multiprocessors=multiprocessors, seed=seed, group=group)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("D", [64, 72])
def test_ring_wraps_cuda(cuda, D):
    """More key tiles in an item than the ring has stages, several times around."""
    check(cuda, *packed(1, 1, 1290, D, torch.float16), [1290], (None, 0), multiprocessors=2, seed=5)


@pytest.mark.parametrize(("lengths", "T"), [([1], 1), ([7], 21), ([129], 129), ([1], 9)], ids=str)
def test_fewer_tokens_than_a_tile_cuda(cuda, lengths, T):
    for mask in MASKS.values():
        check(cuda, *packed(2, 1, T, 72, torch.bfloat16), lengths, mask)


def test_contiguous_strided_and_offset_inputs_cuda(cuda):
    leaf = torch.randn(3, 2, 2, 2 * 140 + 1, 80, dtype=torch.bfloat16)
    check(cuda, *leaf[:, :, :, 1::2, 8:].unbind(0), [70], (None, 0))
    check(cuda, *(x.contiguous() for x in leaf[:, :, :, 1::2, 8:].unbind(0)), [70], (None, 0))


@pytest.mark.parametrize(("D", "padded"), [(72, 80), (112, 128)])
def test_what_lies_behind_a_row_is_not_read_cuda(cuda, D, padded):
    """The last columns of a padded tile are zeros, not the next head's numbers."""
    leaf = torch.full((1, 130, 3, padded), float("nan"), dtype=torch.bfloat16)
    leaf[..., :D] = torch.randn(1, 130, 3, D)
    check(cuda, *(x[:, None, :, :D] for x in leaf.unbind(2)), [130], (None, 0))


@pytest.mark.parametrize("scale", [0.0, 1.5])
def test_any_scale_cuda(cuda, scale):
    for lengths, T in CASES.values():
        check(cuda, *packed(1, 1, T, 72, torch.float16), lengths, (2, 0), scale)


def test_large_scores_cuda(cuda):
    q, k, v = packed(1, 1, 256, 72, torch.bfloat16)
    check(cuda, 30 * q, 30 * k, v, [64], (None, 0))


def test_what_it_refuses_cuda(cuda):
    q, k, v = packed(2, 2, 64, 72, torch.bfloat16)
    out = torch.empty_like(q)

    def takes(q=q, out=out, **settings):
        return serves(cuda, q, k, v, out, **settings)

    assert takes()
    assert not takes(chip=80) and not takes(chip=100)
    assert not takes(dtype=torch.float32) and not takes(D=88)
    assert not takes(scale=-0.1)
    wide = torch.empty(2, 2, 65, 76, dtype=torch.bfloat16)
    assert not takes(q=wide[:, :, :64, :72]), "row stride 76"
    assert not takes(q=wide.view(-1)[4:][: 2 * 2 * 64 * 72].view(2, 2, 64, 72)), "address 8 bytes off"
    assert not takes(q=q[:, :1].expand(2, 2, 64, 72)), "stride 0"
    assert not takes(out=wide[:, :, :64, :72])
    single = torch.empty(1, 1, 64, 72, dtype=torch.bfloat16).as_strided((1, 1, 64, 72), (0, 7, 72, 1))
    aligned = torch.empty(1, 1, 64, 72, dtype=torch.bfloat16)
    assert serves(cuda, single, single, single, aligned), "the stride of a dimension of one element does not matter"


@pytest.mark.parametrize("D", HEAD_DIMS)
@pytest.mark.parametrize("values", [False, True], ids=["scores", "values"])
def test_tile_layout_cuda(cuda, D, values):
    """Every element has its own place; boxes and descriptors agree with it; eight rows of a chunk fill all banks."""
    layouts = cuda.sm90
    tile = (layouts.value_layout if values else layouts.score_layout)(D, BLOCK_N)
    groups = tile.groups
    columns = -(-D // 16) * 16 + 16 * (D == 112)  # no swizzle has a span of 48 columns
    assert sum(group[1] for group in groups) == columns and groups[0][0] == 0
    place = np.array([[tile.offset(r, c) for c in range(columns)] for r in range(BLOCK_N)])
    assert len(np.unique(place)) == place.size and (place % 2 == 0).all()
    assert place.min() == 0 and place.max() + 2 == tile.bytes() == 2 * BLOCK_N * columns
    for start in range(0, columns, 8):
        assert (np.diff(place[:, start : start + 8], axis=1) == 2).all(), "16-byte chunks stay whole"
        banks = place[:, start].reshape(-1, 8) // 16 % 8
        assert (np.sort(banks, axis=1) == np.arange(8)).all()
    for g, (first, width, swizzle) in enumerate(groups):
        assert width * 2 % swizzle == 0 and place[0, first] % (8 * swizzle) == 0, "a pattern starts the group"
        bits = tile.value_descriptor(g)
        leading, stride = (bits >> 16 & 0x3FFF) * 16, (bits >> 32 & 0x3FFF) * 16
        assert stride == 8 * swizzle and bits >> 62 == {128: 1, 64: 2, 32: 3}[swizzle]
        if width * 2 > swizzle:
            assert leading == place[0, first + swizzle // 2] - place[0, first]
    for step in range(columns // 16):
        start = tile.step_offset(step)
        assert start == place[0, 16 * step], "row 0 is not permuted"
        bits = tile.score_descriptor(step)
        assert (bits >> 32 & 0x3FFF) * 16 == place[8, 16 * step] - start, "groups of 8 rows"


def test_fragments_cover_the_tile_cuda(cuda):
    held = {
        (cuda.sm90.accumulator_row(t, i), cuda.sm90.accumulator_column(t, i)) for t in range(128) for i in range(64)
    }
    assert held == {(r, c) for r in range(64) for c in range(128)}


def test_columns_below_cuda(cuda):
    for thread in range(4):
        columns = [cuda.sm90.accumulator_column(thread, i // 2 * 4 + i % 2) for i in range(32)]
        for stop in range(-140, 280):
            below = sum(1 << i for i, column in enumerate(columns) if column < stop)
            assert cuda.sm90.columns_below(thread, stop) == below


@pytest.mark.parametrize(("D", "expected"), [(64, 4), (72, 4), (80, 4), (96, 3), (112, 2), (128, 2)])
def test_stages_cuda(cuda, D, expected):
    assert cuda.sm90.stages(D) == expected
