"""The CUDA kernels of csrc/history_attention on their own, in the emulator, and their tables of tiles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ard_kernels.block_causal_attention.tiles import packed_bounds
from ard_kernels.common import extension
from ard_kernels.history_attention import cuda
from ard_kernels.history_attention.tiles import make_tables, schedule
from testing.devices import on_devices
from testing.drawing import TIERS
from testing.oracle import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [8, 64, 72, 128, 136, 256]


on_cuda = pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))


draw_tables = given(
    rows=st.integers(1, 40),
    cuts=st.lists(st.integers(0, 180), min_size=2, max_size=4, unique=True).filter(lambda cuts: len(cuts) % 2 == 0),
    blocks=st.tuples(st.sampled_from([1, 4, 16, 64]), st.sampled_from([1, 4, 16, 64])),
    splits=st.integers(1, 9),
)


@TIERS
def test_tables_equal_the_dense_mask(tier):
    settings(max_examples=(200, 2000)[tier])(draw_tables(check_tables))()


def check_tables(rows, cuts, blocks, splits):
    """Every row meets every column it sees once, in one of the splits; no tile is for nothing, full tiles are full."""
    cuts = sorted(cuts)
    seen, stop, (block_m, block_n) = list(zip(cuts[::2], cuts[1::2], strict=True)), cuts[-1], blocks
    items, masked, bounds, row_segments = make_tables(rows, seen, *blocks)
    assert items[:, 0].tolist() == list(range(0, rows, block_m))
    assert items[:, 1].tolist() == [min(row + block_m, rows) for row in range(0, rows, block_m)]
    columns = np.arange(stop)
    expected = np.any([(columns >= a) & (columns < b) for a, b in seen], axis=0)
    assert not row_segments.any() and len(row_segments) == rows + block_m
    for item in items:
        runs = item[2:6].reshape(2, 2)
        tiles = [(start + i * block_n, None) for start, tiles in runs for i in range(tiles)]
        for begin, end, at, _ in masked[item[6] : item[7]]:
            assert bounds[at] == packed_bounds(0, 0, end - begin), "rows see the whole tile"
            tiles.append((begin, end))
        count = np.zeros(stop, int)
        share = -(-len(tiles) // splits)
        for split in range(splits):
            for begin, end in tiles[split * share : (split + 1) * share]:
                tile = np.arange(begin, begin + block_n if end is None else min(begin + block_n, end))
                assert tile[-1] < stop
                visible = expected[tile]
                assert visible.all() if end is None else visible.any()
                count[tile] += visible
        assert (count == expected).all()


def test_tables_are_made_once():
    device = torch.device("cpu")
    tables, columns = schedule(256, ((0, 768),), 64, 64, device)
    assert columns == 12 and len(tables.items) == 4 and not tables.has_masked
    assert schedule(256, ((0, 768),), 64, 64, device)[0] is tables
    assert schedule(256, ((0, 100), (512, 768)), 64, 64, device)[1] == 1 + 1 + 4, "the sink's last 36 columns, masked"


def packed(B, H, L, D, dtype, device):
    qkv = (2 * torch.randn(B, L, 3, H, D, device=device) + 0.5).to(dtype)
    return tuple(x.transpose(1, 2) for x in qkv.unbind(2))


def appended(k, v, start=5):
    """The segment's keys and values of a cache; the rest of the cache stays as it was."""
    B, H, L, D = k.shape
    cache = torch.full((2, B, H, start + L + 3, D), float("nan"), dtype=k.dtype, device=k.device)
    cuda.append(k, v, *cache, start)
    assert cache[:, :, :, :start].isnan().all() and cache[:, :, :, start + L :].isnan().all()
    return cache[:, :, :, start : start + L]


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_append_is_exact(backend, device, D, dtype, seed):
    for shape in ((2, 3, 7, D), (1, 2, 300 // (D // 8), D)):  # less and more than one block of 256 units
        _, k, v = packed(*shape, dtype, device)
        assert torch.equal(appended(k, v), torch.stack([k, v]))
    expanded = k[:, :1, :1].expand(2, 3, 5, D)
    odd = torch.randn(1, 2, 5, D + 1, device=device).to(dtype)[..., 1:]  # rows not on 16 bytes: copied first
    for x in (expanded, odd):
        assert torch.equal(appended(x, x), torch.stack([x, x]))


def add_splits(partial, maximum, total, out):
    """partial (splits, B, H, L, D), maximum and total (splits, B, H, L), as the attention kernel leaves them."""
    splits, B, H, L, D = partial.shape
    statistics = torch.stack([maximum, total], -1)
    workspace = torch.cat([partial.flatten(), statistics.flatten()])
    dtype, stream = extension.dtype_code(out.dtype), extension.stream(out.device)
    view = extension.heads_view(out)
    extension.gpu(out.device).history_add_splits(workspace.data_ptr(), view, B, H, L, D, splits, dtype, stream)
    return out


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize(("splits", "D"), [(2, 72), (3, 8), (5, 128), (9, 64), (4, 256)])
def test_splits_add_up(backend, device, splits, D, dtype, seed):
    B, H, L = 2, 2, 11
    partial = torch.randn(splits, B, H, L, D, device=device)
    maximum = 5 * torch.randn(splits, B, H, L, device=device)
    total = 1 + torch.rand(splits, B, H, L, device=device)
    maximum[:, 1] *= 40  # exp2 of what lies between them is past fp32
    empty = torch.rand(splits, B, H, L, device=device) < 0.3
    empty[1] = False
    maximum[empty], total[empty], partial[empty] = float("-inf"), 0, 0
    out = torch.full((B, L, 3, H, D), float("nan"), dtype=dtype, device=device)
    got = add_splits(partial, maximum, total, out[:, :, 1].transpose(1, 2))
    assert out[:, :, 0].isnan().all() and out[:, :, 2].isnan().all()

    def combined(partial, maximum, total):
        weight = (maximum - maximum.amax(0)).exp2()
        return (weight[..., None] * partial).sum(0) / (weight * total).sum(0)[..., None]

    expected = combined(*(x.double() for x in (partial, maximum, total)))
    assert_close(got, combined(partial, maximum, total).to(dtype), expected)
    again = add_splits(partial, maximum, total, torch.empty(B, H, L, D, dtype=dtype, device=device))
    assert torch.equal(again, got)


@on_cuda
def test_what_it_refuses(backend, device):
    device = torch.device(device)
    assert cuda.refuses(device, torch.bfloat16, 72) is None
    assert "triton" in cuda.refuses(device, torch.float32, 72)
    assert "head dim 88" in cuda.refuses(device, torch.bfloat16, 88)
    assert "torch backend" in cuda.refuses(device, torch.float64, 72)
