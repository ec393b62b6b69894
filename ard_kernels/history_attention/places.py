"""Where segments lie in a cache, and which of its tokens a new one sees. Index algebra only.

A cache *grows*, segment behind segment until it is full; or it *rolls*, for ever, over `sink + window` slots:

    slot      0 .. sink - 1     sink .. sink + window - 1
    segment   0 .. sink - 1     i in slot sink + (i - sink) % window

The new segment s is written to its own slot before it is attended to, whether it is kept or not: that slot's last
segment, s - window, has just left the window. So all that a rolling cache holds is visible, one run of tokens, and a
step that is not kept leaves nothing that a later one could see. Segment 0 may be shorter than a slot (the image of
image-to-video); it lies at its slot's end, and the run starts there.

`positions` is int64 on the host. A tensor, so that a compiled step finds its place when it runs:

    [0] segment_length, [1] window, [2] sink    of a rolling cache; 0 in one that grows
    [3] written             segments that a layer of it has begun to write, the last of them perhaps not kept
    [4 : 4 + layers]        segments that each layer has taken
    [4 + layers :]          grows: the token at which segment i starts, i = 0 .. capacity; rolls: that of segment 0

All layers take the same steps, so they share what follows; within a step some have taken one segment more than others.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch

from ard_kernels.block_causal_attention.mask import Run, first_window_segment, merged

HEADER = 4
SEGMENT_LENGTH, WINDOW, SINK, WRITTEN = range(HEADER)


def new_positions(layers: int, capacity: int, roll: tuple[int, int, int] | None) -> torch.Tensor:
    """Of an empty cache. roll: (segment_length, window, sink)."""
    with torch.inference_mode(False):  # steps outside of inference mode may move them on, too
        positions = torch.zeros(HEADER + layers + 1 + (0 if roll else capacity), dtype=torch.int64, device="cpu")
    if roll:
        positions[:WRITTEN] = torch.tensor(roll, device="cpu")
    return positions


class Place(NamedTuple):
    """Of one new segment of a layer, in tokens of its cache."""

    start: int  # where it is written
    sink: Run  # earlier segments of the sink
    rest: Run  # what else it sees, itself included

    @property
    def runs(self) -> list[Run]:
        """All that it sees: one run, or two apart."""
        return merged([self.sink, self.rest])

    def past(self, length: int) -> list[Run]:
        """`runs` without the segment itself, of `length` tokens: two, empty ones among them."""
        runs, stop = self.runs, self.start + length
        cut = [part for a, b in runs for part in ((a, min(b, self.start)), (max(a, stop), b)) if part[0] < part[1]]
        return [*cut, (0, 0), (0, 0)][:2]


def read(positions: np.ndarray, layers: int) -> list[int]:
    """What of `positions` says something: up to the start that follows the last segment taken."""
    first = HEADER + layers
    head = positions[: first + 1].tolist()
    taken = 0 if head[SEGMENT_LENGTH] > 0 else max([0, *head[HEADER:first]])
    return head + positions[first + 1 : first + 1 + taken].tolist() if taken > 0 else head


class Stand:
    """A layer of a cache before a call. `positions`: as `read` gives them.

    Attributes:
        taken: segments that the layer has taken, the index of the next.
    """

    def __init__(self, positions: Sequence[int], layers: int, taken: int):
        self.segment_length, self.window, self.sink = positions[:WRITTEN]
        self.rolls, self.taken = self.segment_length > 0, taken
        first = HEADER + layers
        self.starts = tuple(positions[first : first + 1 + (0 if self.rolls else taken)])

    def add(self, lengths: Sequence[int]) -> None:
        """The tokens of segments taken, taken + 1, ..."""
        if not self.rolls:
            self.starts += tuple(accumulate(lengths, initial=self.starts[-1]))[1:]
        elif self.taken == 0:
            self.starts = (self.segment_length - lengths[0],)

    def slot(self, segment: int) -> int:
        """Of a rolling cache."""
        return segment if segment < self.sink else self.sink + (segment - self.sink) % self.window

    def tokens(self, segment: int) -> Run:
        """Those of the cache that hold `segment`, or will."""
        if not self.rolls:
            return self.starts[segment], self.starts[segment + 1]
        start = self.slot(segment) * self.segment_length
        return start + (self.starts[0] if segment == 0 else 0), start + self.segment_length

    def place(self, segment: int, window: int | None, sink: int) -> Place:
        """Of `segment`, when all earlier ones have been taken."""
        start, stop = self.tokens(segment)
        if not self.rolls:
            sink_stop = self.starts[min(sink, segment)]
            first = self.starts[first_window_segment(segment, window)]
            return Place(start, (0, sink_stop), (max(sink_stop, first), stop))
        slots = self.sink + self.window
        kept = segment < slots or self.sink > 0  # segment 0 is still there
        first = self.starts[0] if kept else 0
        sink_stop = max(first, min(self.sink, segment) * self.segment_length)
        return Place(start, (first, sink_stop), (sink_stop, min(segment + 1, slots) * self.segment_length))


def stand(
    op: str, positions: np.ndarray, layers: int, capacity: int, layer: int, lengths: Sequence[int],
    window: int | None, sink: int,
) -> Stand:  # fmt: skip
    """Where `layer` stands before it takes new segments of `lengths` tokens.

    positions: as an array over the tensor's memory, which is read three times faster.

    Raises:
        ValueError: no room; an earlier step that left layers behind; another length than the step has in other layers,
            or than the cache's; another window and sink than the cache's; positions that this file has not written.
    """
    held = tuple(read(positions, layers))
    find = _stand if held[SEGMENT_LENGTH] > 0 else _stand_again  # a cache that rolls never stands there again
    return find(op, held, positions.size, layers, capacity, layer, tuple(lengths), window, sink)


def _stand(
    op: str, held: tuple[int, ...], size: int, layers: int, capacity: int, layer: int, lengths: tuple[int, ...],
    window: int | None, sink: int,
) -> Stand:  # fmt: skip
    check_undamaged(op, held, size, layers, capacity)
    counts = held[HEADER : HEADER + layers]
    taken, most = counts[layer], max(counts)
    if min(counts) < taken:
        behind = [i for i, count in enumerate(counts) if count < taken]
        raise ValueError(
            f"{op}: layer {layer} of the cache holds {taken} segments, but layer {behind[0]} holds "
            f"{counts[behind[0]]}: an earlier step did not reach it; expected every step to append to every layer "
            f"(rewind({most - min(counts)}) forgets the unfinished step, reset() empties the cache)"
        )
    found = Stand(held, layers, taken)
    if found.rolls:
        _check_rolling(op, found, window, sink, lengths)
    for segment, length in zip(range(taken, most), lengths, strict=False):
        first, stop = Stand(held, layers, most).tokens(segment)
        if length != stop - first:
            raise ValueError(
                f"{op}: k has {length} tokens in layer {layer}; expected {stop - first}, as in the layers that have "
                "taken this step"
            )
    start = found.starts[-1]
    if not found.rolls and start + sum(lengths) > capacity:
        raise ValueError(
            f"{op}: layer {layer} of the cache holds {start} of {capacity} tokens; expected room for {sum(lengths)} "
            "more (reset() empties it; HistoryCache.rolling has no end)"
        )
    found.add(lengths)
    return found


# Of a cache that is reset the same is asked again and again, and it took as long as a small kernel.
_stand_again = lru_cache(maxsize=256)(_stand)


def check_undamaged(op: str, held: Sequence[int], size: int, layers: int, capacity: int) -> None:
    """ValueError unless this file may have written `size` positions, of which `read` gives these."""
    segment_length, window, sink, written = held[:HEADER]
    counts, starts = [0, *held[HEADER : HEADER + layers]], held[HEADER + layers :]
    most = max(counts)
    if segment_length == 0:
        good = window == sink == written == 0 and most <= capacity and size == HEADER + layers + capacity + 1
        good = good and starts[0] == 0 and starts[-1] <= capacity and all([a < b for a, b in pairwise(starts)])
    else:
        good = segment_length > 0 and window > 0 and sink >= 0 and (sink + window) * segment_length == capacity
        good = good and size == HEADER + layers + 1 and 0 <= starts[0] < segment_length and written >= most
    if not good or min(counts) < 0:
        raise ValueError(
            f"{op}: cache.positions is damaged; expected what the op has written (reset() empties the cache)"
        )


def _check_rolling(op: str, at: Stand, window: int | None, sink: int, lengths: Sequence[int]) -> None:
    if (window, sink) != (at.window, at.sink):
        raise ValueError(
            f"{op}: window is {window} and sink {sink}; expected the rolling cache's, {at.window} and {at.sink}"
        )
    for i, length in enumerate(lengths):
        shorter = length < at.segment_length and i + at.taken == 0
        if length != at.segment_length and not shorter:
            which = "(the first segment of all may be shorter)"
            raise ValueError(
                f"{op}: segment {i + at.taken} has {length} tokens; expected the cache's {at.segment_length} {which}"
            )


def overwrite(positions: np.ndarray, at: Stand, segments: int) -> None:
    """Note that the next `segments` of `at` are about to be written: what was there is lost, even if the call fails."""
    if at.rolls:
        positions[WRITTEN] = max(int(positions[WRITTEN]), at.taken + segments)


def advance(positions: np.ndarray, layers: int, layer: int, at: Stand, segments: int) -> None:
    """Note that `layer` has taken the next `segments` of `at`."""
    positions[HEADER + layer] = at.taken + segments
    first = HEADER + layers
    if at.rolls:
        positions[first] = at.starts[0]
    for segment in range(at.taken + 1, len(at.starts)):
        positions[first + segment] = at.starts[segment]


def of_one_layer(op: str, positions: torch.Tensor, layers: int, capacity: int, layer: int) -> torch.Tensor:
    """Of a cache that stands as `layer` of this one; of a rolling one, where it stands so for the first time.

    Raises:
        ValueError: positions that this file has not written.
    """
    held = read(positions.numpy(), layers)
    check_undamaged(op, held, len(positions), layers, capacity)
    at = Stand(held, layers, held[HEADER + layer])
    taken, slots = at.taken, at.sink + at.window
    if at.rolls and taken > slots:
        taken = slots + (taken - slots) % at.window
    own = torch.zeros(len(positions) - layers + 1, dtype=torch.int64, device="cpu")
    own[:WRITTEN], own[WRITTEN], own[HEADER] = positions[:WRITTEN], taken if at.rolls else 0, taken
    own[HEADER + 1 : HEADER + 1 + len(at.starts)] = torch.tensor(at.starts, device="cpu")
    return own


def rewind(positions: np.ndarray, layers: int, segments: int) -> None:
    """Forget the last segments, those that not all layers have taken among them.

    Raises:
        ValueError: fewer are held; what the next segment would see again has been overwritten.
    """
    counts = positions[HEADER : HEADER + layers].tolist()
    taken, written = max([0, *counts]), int(positions[WRITTEN])
    if segments > taken:
        raise ValueError(f"HistoryCache.rewind: segments is {segments}; expected at most the {taken} taken")
    new = taken - segments
    at = Stand(read(positions, layers), layers, new)
    first = max(at.sink, new - at.window + 1)
    if at.rolls and first < new and first + at.window < written:
        raise ValueError(
            f"HistoryCache.rewind: segment {new} would see segment {first}, which segment {first + at.window} has "
            "overwritten; expected a rewind of one segment right after the call that kept it, or a wider window"
        )
    positions[HEADER : HEADER + layers] = [min(count, new) for count in counts]
    # Of what the next segment sees nothing has been overwritten; what earlier ones saw besides is gone for good.
    positions[WRITTEN] = min(written, new + 1)


def held(positions: np.ndarray, layers: int) -> Run:
    """The tokens of the memory that hold what the layer furthest along has taken."""
    known = read(positions, layers)
    taken = max([0, *known[HEADER : HEADER + layers]])
    at = Stand(known, layers, taken)
    if taken == 0 or not at.rolls:
        return 0, at.starts[-1] if not at.rolls else 0
    return at.place(taken - 1, at.window, at.sink).runs[0]
