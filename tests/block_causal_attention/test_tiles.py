"""The tile schedule of the GPU kernels against the dense mask: every visible pair once, in a good order."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ard_kernels.block_causal_attention.spec import block_causal
from ard_kernels.block_causal_attention.tiles import column_tiles, heads_per_group, make_tables, schedule
from ard_kernels.block_causal_attention.triton_impl import head_of, parts_of
from testing.drawing import TIERS, dense, drawn_segments
from testing.waves import efficiency, makespan

BLOCKS = st.sampled_from([1, 4, 16, 32])


def sees(packed, column):
    """The mask predicate on an entry of `bounds`; column counted from the tile's start."""
    first_stop, start, stop = packed & 1023, packed >> 10 & 1023, packed >> 20
    return column < first_stop or start <= column < stop


def visits(tables, shape, block, sees=sees):
    """How often a row and column meet; asserts that tiles stay inside the columns and nothing is visited in vain."""
    (items, masked, bounds, row_segments), count = tables, np.zeros(shape, int)
    for row, row_stop, *runs, first, last in items.tolist():
        assert 0 <= row < row_stop <= shape[0] and runs[1] + runs[3] + last - first > 0
        for start, tiles in zip(runs[::2], runs[1::2], strict=True):
            assert start + tiles * block <= shape[1]
            count[row:row_stop, start : start + tiles * block] += 1
        for start, stop, at, _ in masked[first:last].tolist():
            assert stop <= shape[1] and stop - start <= block
            seen_by = {}
            for segment in set(row_segments[row:row_stop].tolist()):
                packed = int(bounds[at + segment])
                seen_by[segment] = np.array([sees(packed, c) for c in range(block)])
                assert not seen_by[segment][stop - start :].any(), "columns past the tile's stop"
            if start == stop:
                assert first + 1 == last and not runs[1], (
                    "only a tile that sees nothing has a column tile without columns"
                )
                continue
            assert any(each.any() for each in seen_by.values()), "a tile visited for nothing"
            for r in range(row, row_stop):
                count[r, start:stop] += seen_by[int(row_segments[r])][: stop - start]
    return count


draw_tables = given(case=drawn_segments(), blocks=st.tuples(BLOCKS, BLOCKS), by_key=st.booleans())


@TIERS
def test_every_visible_pair_once(tier):
    settings(max_examples=(300, 3000)[tier])(draw_tables(check_tables))()


def check_tables(case, blocks, by_key):
    expected = dense(case).T if by_key else dense(case)
    tables = make_tables(*case, *blocks, by_key)
    items = tables.items
    assert (items[:, 1] - items[:, 0] <= blocks[0]).all()
    rows = np.sort(items[:, 0])
    assert rows[0] == 0 and (np.sort(items[:, 1])[:-1] == rows[1:]).all() and items[:, 1].max() == len(expected)
    assert (np.diff(column_tiles(items)) <= 0).all(), "longest first"
    assert (visits(tables, expected.shape, blocks[1]) == expected).all()
    # Whatever row of a tile is looked up, also past the last one, the tables have an entry.
    for row, *_, first, last in items.tolist():
        for at in tables.masked[first:last, 2].tolist():
            index = at + tables.row_segments[row : row + blocks[0]]
            assert len(index) == blocks[0] and index.min() >= 0 and index.max() < len(tables.bounds)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))
def test_every_program_has_its_own_tile_and_head(batch_heads, group, tiles):
    group = min(group, batch_heads)
    seen = [head_of.fn(program, batch_heads, group, tiles) for program in range(batch_heads * tiles)]
    assert sorted(seen) == [(tile, head) for tile in range(tiles) for head in range(batch_heads)]
    for first in range(0, batch_heads, group):  # one group after the other, its longest tiles first
        part = seen[first * tiles : (first + group) * tiles]
        assert {head for _, head in part} == set(range(first, min(first + group, batch_heads)))
        assert [tile for tile, _ in part] == sorted(tile for tile, _ in part)


@pytest.mark.simulated
@TIERS
def test_tile_range_h_equals_the_dense_mask_cuda(tier, emulated):
    """csrc/block_causal_attention/tile_range.h, called element by element, on the tables of `make_tables`."""

    @settings(max_examples=(100, 1000)[tier])
    @draw_tables
    def draw(case, blocks, by_key):
        expected = dense(case).T if by_key else dense(case)
        tables = make_tables(*case, *blocks, by_key)
        for item in tables.items.tolist():
            starts = [start + i * blocks[1] for start, n in (item[2:4], item[4:6]) for i in range(n)]
            assert emulated.full_tile_starts(item, blocks[1]) == starts
        assert (visits(tables, expected.shape, blocks[1], emulated.sees) == expected).all()

    draw()


@pytest.mark.simulated
def test_head_tile_equals_the_triton_kernels_cuda(emulated):
    @given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))
    def draw(batch_heads, group, tiles):
        group = min(group, batch_heads)
        for program in range(batch_heads * tiles):
            expected = head_of.fn(program, batch_heads, group, tiles)
            assert emulated.head_tile(program, batch_heads, group, tiles) == expected

    draw()


@pytest.mark.simulated
def test_every_lane_and_register_has_its_own_element_cuda(emulated):
    elements = {emulated.fragment_element(lane, i) for lane in range(32) for i in range(4)}
    assert elements == {(row, column) for row in range(16) for column in range(8)}


@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("mask", [(None, 0), (1, 0), (2, 0), (1, 1)])
def test_the_model_shape_has_no_masked_tiles(mask, by_key):
    for S, L in ((4, 256), (8, 1024), (1, 256)):
        items, masked, *_ = make_tables(block_causal([L], *mask), S * L, S * L, 128, 128, by_key)
        assert not len(masked) and len(items) == S * L // 128
    case = block_causal([256], *mask), 1024, 1024, 128, 64, by_key, torch.device("cpu")
    tables = schedule(*case)
    assert not tables.has_masked and tables.items.dtype == torch.int32
    assert tables is schedule(*case)


def test_short_segments_share_row_tiles():
    items, *_ = make_tables(block_causal([16], None, 0), 64, 64, 64, 64, False)
    assert len(items) == 1
    items, masked, *_ = make_tables(block_causal([256], None, 0), 1024, 1024, 128, 64, False)
    assert len(items) == 8 and not len(masked)


@pytest.mark.parametrize("batch", [1, 4, 32])
@pytest.mark.parametrize("by_key", [False, True])
def test_waves_of_the_model_shape(batch, by_key):
    """132 multiprocessors, DiT-XL/2, S 4, L 256: once the GPU is filled, idle slots cost little."""
    config = {"BLOCK_M": 128, "BLOCK_N": 64}
    group = heads_per_group(16 * batch, 2 * 1024 * 72 * 2)
    share = efficiency([256], 1024, None, 0, config, 16 * batch, group, slots=132 if by_key else 264, by_key=by_key)
    assert share >= {1: 0.25, 4: 0.75, 32: 0.95}[batch], share


def test_longest_first_shortens_the_last_wave():
    costs = np.repeat([8.0, 6.0, 4.0, 2.0], 60)
    assert makespan(costs, 132) < makespan(costs[::-1], 132)
    assert makespan(np.ones(264), 132) == 2 and makespan(np.ones(265), 132) == 3


def test_heads_of_a_group_fit_the_cache():
    assert heads_per_group(512, 2 * 1024 * 72 * 2) == 74, "7 near equal groups of at most 85"
    assert heads_per_group(16, 1 << 10) == 16
    assert heads_per_group(16, 1 << 30) == 1


@given(st.integers(1, 32).map(lambda n: 8 * n))
def test_head_dims_are_padded_little(D):
    parts = parts_of(D)
    assert all(part >= 16 and part & (part - 1) == 0 for part in parts) and len(parts) <= 3
    assert D <= sum(parts) <= max(16, 1.34 * D)
    exact = {72: (64, 16), 80: (64, 16), 96: (64, 32), 112: (64, 32, 16), 160: (128, 32), 128: (128,)}
    assert parts == exact.get(D, parts)
