"""The CUDA kernels of csrc/history_attention on their own, in the emulator, and their tables of tiles."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ard_kernels import HeadNorm
from ard_kernels.block_causal_attention.tiles import packed_bounds
from ard_kernels.common import extension
from ard_kernels.history_attention import cuda
from ard_kernels.history_attention.tiles import make_tables, schedule
from testing import plain
from testing.devices import on_devices
from testing.drawing import FEW_AND_MANY
from testing.oracle import assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEAD_DIMS = [8, 64, 72, 128, 136, 256]


on_cuda = pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))


draw_tables = given(
    rows=st.integers(1, 40),
    start=st.integers(0, 150),
    cuts=st.tuples(st.integers(0, 150), st.integers(0, 150)),
    blocks=st.tuples(st.sampled_from([1, 4, 16, 64]), st.sampled_from([1, 4, 16, 64])),
    splits=st.integers(1, 9),
)


@FEW_AND_MANY
def test_tables_equal_the_dense_mask(many):
    settings(max_examples=(200, 2000)[many])(draw_tables(check_tables))()


def check_tables(rows, start, cuts, blocks, splits):
    """Every row meets every column it sees once, in one of the splits; no tile is for nothing, full tiles are full."""
    sink_stop, window_start = sorted(min(cut, start) for cut in cuts)
    stop, (block_m, block_n) = start + rows, blocks
    items, masked, bounds, row_segments = make_tables(rows, sink_stop, window_start, stop, *blocks)
    assert items[:, 0].tolist() == list(range(0, rows, block_m))
    assert items[:, 1].tolist() == [min(row + block_m, rows) for row in range(0, rows, block_m)]
    columns = np.arange(stop)
    expected = (columns < sink_stop) | (columns >= window_start)
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
                seen = np.arange(begin, begin + block_n if end is None else min(begin + block_n, end))
                assert seen[-1] < stop
                visible = expected[seen]
                assert visible.all() if end is None else visible.any()
                count[seen] += visible
        assert (count == expected).all()


def test_tables_are_made_once():
    device = torch.device("cpu")
    tables, columns = schedule(256, 0, 0, 768, 64, 64, device)
    assert columns == 12 and len(tables.items) == 4 and not tables.has_masked
    assert schedule(256, 0, 0, 768, 64, 64, device)[0] is tables
    assert schedule(256, 100, 512, 768, 64, 64, device)[1] == 1 + 1 + 4, "the sink's last 36 columns, masked"


def packed(B, H, L, D, dtype, device):
    qkv = (2 * torch.randn(B, L, 3, H, D, device=device) + 0.5).to(dtype)
    return tuple(x.transpose(1, 2) for x in qkv.unbind(2))


def appended(q, k, v, q_norm=None, k_norm=None, start=5):
    """(normalised q, the segment's keys and values of a cache); the rest of the cache stays as it was."""
    B, H, L, D = k.shape
    cache = torch.full((2, B, H, start + L + 3, D), float("nan"), dtype=k.dtype, device=k.device)
    normed_q = cuda.append(q, k, v, *cache, start, q_norm, k_norm)
    assert cache[:, :, :, :start].isnan().all() and cache[:, :, :, start + L :].isnan().all()
    return normed_q, *cache[:, :, :, start : start + L]


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_append_is_exact(backend, device, D, dtype, seed):
    for shape in ((2, 3, 7, D), (1, 2, 300 // (D // 8), D)):  # less and more than one block of 256 units
        q, k, v = packed(*shape, dtype, device)
        same_q, keys, values = appended(q, k, v)
        assert same_q is q and torch.equal(keys, k) and torch.equal(values, v)
    expanded = k[:, :1, :1].expand(2, 3, 5, D)
    assert torch.equal(appended(expanded, expanded, expanded)[1], expanded)


@on_cuda
@pytest.mark.parametrize("kind", ["rms", "layer"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_DIMS)
def test_append_normalises(backend, device, D, dtype, kind, seed):
    q, k, v = packed(*((1, 2, 19, D) if D < 128 else (1, 1, 40, D)), dtype, device)  # 3 to 5 blocks a head from 128 on
    own, wide = (1 + torch.randn(D, device=device)).to(dtype), torch.randn(D, device=device)
    for weight, bias in ((None, None), (own, None), (wide, wide), (wide, own)):
        norm = HeadNorm(kind, weight, bias if kind == "layer" else None, eps=0.5)
        normed_q, keys, values = appended(q, k, v, norm, norm)
        assert torch.equal(values, v)
        exact = HeadNorm(kind, *(None if p is None else p.double() for p in (norm.weight, norm.bias)), eps=0.5)
        for got, x in ((normed_q, q), (keys, k)):
            assert_close(got, plain.head_norm(x, norm), plain.head_norm(x.double(), exact), label=f"{D} {kind}")
        assert torch.equal(appended(q, k, v, None, norm)[1], keys) and torch.equal(appended(q, k, v, norm)[1], k)
        assert torch.equal(appended(q, k, v, norm, norm)[0], normed_q), "bit-equal over runs"


@on_cuda
@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_take_two_passes(backend, device, dtype):
    """A mean of a hundred deviations: E[x^2] - E[x]^2 in fp32 would leave no digits of bfloat16's spread."""
    x = (100 + torch.randn(1, 1, 4, 72, device=device)).to(dtype) * (64 if dtype == torch.bfloat16 else 8)
    norm = HeadNorm("layer")
    keys = appended(x, x, x, None, norm)[1]
    assert_close(keys, plain.head_norm(x, norm), plain.head_norm(x.double(), norm))


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
