"""The tiles of attention on the CPU against the dense mask: every visible pair once, nothing else."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ard_kernels.block_causal_attention.cpu_tiles import LANE_STEP, TILE_ROWS, make_tiles
from ard_kernels.block_causal_attention.spec import block_causal
from ard_kernels.block_causal_attention.tiles import seen_pieces
from testing.drawing import TIERS, dense, drawn_segments

# Ragged ones beside a tile's rows, and many that share a tile.
CASES = st.one_of(drawn_segments(longest=90), drawn_segments(longest=5, most=30), drawn_segments())


@TIERS
def test_every_visible_pair_once(tier):
    settings(max_examples=(300, 30_000)[tier])(given(case=CASES)(check_tiles))()


def check_tiles(case):
    aligned, best = (make_tiles(*case, whole) for whole in (True, False))
    assert not aligned.unseen and best.cost <= aligned.cost
    for tiles in (aligned, best):
        check_rows_and_pieces(tiles, dense(case))


def check_rows_and_pieces(made, expected):
    (tiles, pieces, unseen), count = made, np.zeros(expected.shape, int)
    assert [start for start, *_ in tiles] == [0] + [stop for _, stop, *_ in tiles[:-1]] and tiles[-1][1] == len(count)
    shared = list(dict.fromkeys((first, last) for *_, first, last in tiles))  # by tiles of one segment
    assert [first for first, _ in shared] == [0] + [last for _, last in shared[:-1]] and shared[-1][1] == len(pieces)
    for start, stop, first, last in tiles:
        rows, own = stop - start, pieces[first:last]
        assert 0 < rows <= TILE_ROWS
        assert all(a < b for a, b, _ in own) and all(this[1] <= then[0] for this, then in pairwise(own))
        for a, b, at in own:
            hidden = np.zeros(TILE_ROWS, int) if at < 0 else np.array(unseen[at : at + TILE_ROWS])
            assert at == -1 or at % TILE_ROWS == 0
            assert len(hidden) == TILE_ROWS and set(hidden) <= {0, -1}, "a lane's mask is all bits or none"
            assert not hidden[rows:].any(), "lanes without a row see everything"
            assert at < 0 or 0 < -hidden.sum() < rows, "a mask hides some rows and not all"
            count[start:stop, a:b] += 1 + hidden[:rows, None]
    assert (count == expected).all()


@given(case=CASES)
def test_masks_are_written_once(case):
    _, pieces, unseen = make_tiles(*case, False)
    masks = [tuple(unseen[at : at + TILE_ROWS]) for at in range(0, len(unseen), TILE_ROWS)]
    assert len(set(masks)) == len(masks) and len(masks) * TILE_ROWS == len(unseen)
    assert {at for *_, at in pieces} - {-1} == set(range(0, len(unseen), TILE_ROWS))


@pytest.mark.parametrize(
    ("lengths", "window", "tiles", "masks"),
    [
        ([256] * 4, None, 16, 0),
        ([16] * 4, None, 4, 0),  # whole registers each: shared, a tile would compute what nobody sees
        ([8] * 8, None, 1, 7),
        ([1] * 64, None, 1, 63),
        ([40] * 3, 1, 3, 0),
        ([65], None, 2, 0),
    ],
    ids=str,
)
def test_what_is_cheaper_is_chosen(lengths, window, tiles, masks):
    made = make_tiles(block_causal(lengths, window, 0), sum(lengths), sum(lengths), False)
    assert (len(made.tiles), len(made.unseen)) == (tiles, masks * TILE_ROWS)


def test_the_cost_is_that_of_the_definition():
    made = make_tiles(block_causal([65], None, 0), 65, 65, True)
    assert made.cost == (TILE_ROWS + LANE_STEP) * 65


@given(st.lists(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 5)), max_size=4), min_size=1, max_size=4))
def test_pieces_of_ranges(drawn):
    """Runs of each row, in order and apart, cut where who holds them changes."""
    ranges = []
    for row in drawn:
        runs, at = [], 0
        for gap, length in row:
            at += gap + 1
            runs.append((at, at + length))
            at += length
        ranges.append(runs)
    held = {}
    for start, stop, holders in seen_pieces(ranges):
        assert start < stop and holders
        for column in range(start, stop):
            assert column not in held, "a column twice"
            held[column] = set(holders)
    for column in range(120):
        who = {i for i, runs in enumerate(ranges) if any(a <= column < b for a, b in runs)}
        assert held.get(column, set()) == who
