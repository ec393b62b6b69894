"""Index algebra of the cache alone: a model of its memory says which segment every token holds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ard_kernels.block_causal_attention.mask import merged
from ard_kernels.block_causal_attention.spec import useful_pairs
from ard_kernels.history_attention import places
from testing.drawing import TIERS

OP = "history_attention"


def visible(segment, window, sink):
    """The mask's sentence."""
    return {j for j in range(segment + 1) if j < sink or window is None or j > segment - window}


def covered(runs):
    return [token for start, stop in runs for token in range(start, stop)]


class Memory:
    """What each token of one layer's memory holds: (segment, token of it, call that wrote it)."""

    def __init__(self, capacity, roll):
        self.positions = places.new_positions(1, capacity, roll).numpy()
        self.capacity, self.holds = capacity, [None] * capacity
        self.lengths, self.calls = [], 0

    def call(self, length, window, sink, commit):
        at = places.stand(OP, self.positions, 1, self.capacity, 0, [length], window, sink)
        segment, place = at.taken, at.place(at.taken, window, sink)
        assert segment == len(self.lengths)
        self.calls += 1
        places.overwrite(self.positions, at, 1)
        for token in range(length):
            self.holds[place.start + token] = (segment, token, self.calls if not commit else 0)
        seen, lengths = covered(place.runs), [*self.lengths, length]
        expected = {(j, t) for j in visible(segment, window, sink) for t in range(lengths[j])}
        got = [self.holds[token] for token in seen]
        assert None not in got and len(got) == len(expected) and {entry[:2] for entry in got} == expected
        assert all(entry[2] in (0, self.calls) for entry in got), "nothing that was not kept is seen"
        of_sink = {self.holds[token][0] for token in covered([place.sink])}
        assert of_sink == set(range(min(sink, segment))), "sink: earlier segments alone"
        assert sorted(covered([place.sink]) + covered([place.rest])) == seen
        past = place.past(length)
        assert len(past) == 2
        assert sorted(covered(past)) == [t for t in seen if not place.start <= t < place.start + length]
        assert len(merged(place.runs)) == len(place.runs) <= 2
        if commit:
            places.advance(self.positions, 1, 0, at, 1)
            self.lengths.append(length)
        return seen


STEPS = st.lists(st.tuples(st.integers(1, 5), st.integers(0, 2)), min_size=1, max_size=14)


@TIERS
def test_what_is_seen_is_what_the_mask_says(tier):
    @settings(max_examples=(150, 2000)[tier])
    @given(
        steps=STEPS, window=st.one_of(st.none(), st.integers(1, 5)), sink=st.integers(0, 3), rolls=st.booleans(),
        first=st.integers(1, 4), rewinds=st.lists(st.integers(0, 12), max_size=3),
    )  # fmt: skip
    def draw(steps, window, sink, rolls, first, rewinds):
        if rolls:
            window = window or 3
        memory = Memory((sink + window) * 4 if rolls else 1000, (4, window, sink) if rolls else None)
        for step, (length, attempts) in enumerate(steps):
            if rolls:
                length = first if not memory.lengths else 4
            for commit in [False] * attempts + [True]:
                memory.call(length, window, sink, commit)
            if step in rewinds:
                check_rewind(memory, rolls, window, sink)
        if not rolls and not any(r < len(steps) for r in rewinds):
            seen = sum(
                n * sum(memory.lengths[j] for j in visible(i, window, sink)) for i, n in enumerate(memory.lengths)
            )
            assert seen == useful_pairs(memory.lengths, sum(memory.lengths), window, sink)

    draw()


def check_rewind(memory, rolls, window, sink):
    """One back always works right after a call that kept; two only when nothing that is seen again has gone."""
    places.rewind(memory.positions, 1, 1)
    memory.lengths.pop()
    new = len(memory.lengths) - 1
    if new < 0:
        return
    needed = visible(new, window, sink) - {new}
    held = {entry[0] for entry in memory.holds if entry and entry[2] == 0}
    before = memory.positions.copy()
    if needed <= held:
        places.rewind(memory.positions, 1, 1)
        memory.lengths.pop()
    else:
        assert rolls
        with pytest.raises(ValueError, match="has overwritten; expected a rewind of one segment"):
            places.rewind(memory.positions, 1, 1)
        assert (memory.positions == before).all()


def test_a_full_ring_repeats():
    """From the first overwritten slot on, places repeat every `window` segments: one CUDA graph of a turn."""
    memory = Memory(5 * 3, (3, 4, 1))
    starts = []
    for _ in range(17):
        at = places.stand(OP, memory.positions, 1, 15, 0, [3], 4, 1)
        starts.append(at.place(at.taken, 4, 1))
        memory.call(3, 4, 1, True)
    assert starts[5:9] == starts[9:13] == starts[13:17]
    assert {place.rest for place in starts[5:]} == {(3, 15)}


def test_a_rewind_beyond_what_is_held():
    positions = np.array([0, 0, 0, 0, 2, 1, 0, 4, 8, 0], np.int64)
    with pytest.raises(ValueError, match="segments is 3; expected at most the 2 taken"):
        places.rewind(positions, 2, 3)
    places.rewind(positions, 2, 1)  # the unfinished step
    assert positions[4:6].tolist() == [1, 1]
