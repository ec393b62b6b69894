"""Which query segment sees which key segment: `SegmentMask`, and the text that ops take for it. Host integers only.

An op takes a mask as text, which every tracer passes on as a constant: "causal WINDOW SINK" of any number of segments,
or "KEYS|RUNS|RUNS..." with the runs of key segments of each query segment, as in "4|0:1|0:2|0:1,2:4".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch

from ard_kernels.common.arguments import check_int, described, is_int

Run = tuple[int, int]  # [first, stop), of segments or tokens
MOST_DRAWN = 48  # segments of a side up to which `repr` draws the mask


def merged(runs: Sequence[Run]) -> list[Run]:
    """The union of runs, in order; those that touch become one, empty ones vanish."""
    joined: list[Run] = []
    for start, stop in sorted(runs):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(stop, joined[-1][1]))
        elif start < stop:
            joined.append((start, stop))
    return joined


class SegmentMask:
    """Which of S_q query segments sees which of S_k key segments, whole: any table of booleans.

    Frozen, hashable, equal by what it says; a few host integers. Its `repr` draws it: a line per query segment, a
    column per key segment.

    Args:
        rows: (S_q, S_k) booleans or 0 and 1, a nested sequence or a bool tensor; rows[i][j]: query segment i sees key
            segment j. A row may be empty: attention of such queries is 0. So may a column.

    Attributes:
        query_segments, key_segments: S_q, S_k.
        runs: per query segment the [first, stop) runs of key segments that it sees, in order and apart.

    Raises:
        ValueError: no rectangle of booleans, or without rows or columns.
    """

    query_segments: int
    key_segments: int
    runs: tuple[tuple[Run, ...], ...]
    code: str

    def __init__(self, rows: Sequence[Sequence[bool]] | torch.Tensor):
        table = _table(rows)
        self._set([_runs(row) for row in table], len(table[0]))

    def _set(self, runs: Sequence[Sequence[Run]], key_segments: int) -> None:
        frozen = tuple([tuple([(first, stop) for first, stop in own]) for own in runs])
        lines = [",".join([f"{first}:{stop}" for first, stop in own]) for own in frozen]
        fields = (len(frozen), key_segments, frozen, "|".join([str(key_segments), *lines]))
        for name, value in zip(("query_segments", "key_segments", "runs", "code"), fields, strict=True):
            object.__setattr__(self, name, value)

    @classmethod
    def _of_runs(cls, runs: Sequence[Sequence[Run]], key_segments: int) -> SegmentMask:
        mask = cls.__new__(cls)
        mask._set(runs, key_segments)
        return mask

    @classmethod
    def block_causal(cls, segments: int, window: int | None = None, sink: int = 0) -> SegmentMask:
        """Segment i of `segments` sees the segments i - window + 1 .. i, and those of the first `sink` before it.

        Args:
            window: *segments* seen, the own one included and the sink not; None: all earlier ones. Who counts frames,
                as `local_attn_size` of streaming video models does, divides by the frames of a segment.
            sink: first segments that every later one sees.

        Raises:
            ValueError: a window that is not None or 1 .. segments, a sink that is not 0 .. segments.

        Source: ARD, arXiv 2504.11295, Fig. 4.
        """
        segments, window, sink = _check_settings("SegmentMask.block_causal", segments, window, sink)
        return cls._of_runs([causal_runs(i, window, sink) for i in range(segments)], segments)

    @classmethod
    def teacher_forcing(cls, segments: int, window: int | None = None, sink: int = 0) -> SegmentMask:
        """The mask of the sequence [clean C_0 .. C_{S-1} | noisy N_0 .. N_{S-1}], S = `segments`: 2S x 2S.

        C_i sees clean segments as in `block_causal`, and no noisy one. N_i sees what C_i does of the segments before
        it, and itself in the place of C_i. Both halves carry the same positions.

        Args:
            window: *segments* seen, the own one included and the sink not, as in `block_causal`.
            sink: first clean segments that every later one sees.

        Raises:
            ValueError: as `block_causal`.

        Source: teacher forcing of Self-Forcing, arXiv 2506.08009, Fig. 2.
        """
        segments, window, sink = _check_settings("SegmentMask.teacher_forcing", segments, window, sink)
        clean = [causal_runs(i, window, sink) for i in range(segments)]
        past = [[(first, min(stop, i)) for first, stop in runs] for i, runs in enumerate(clean)]
        noisy = [merged([*runs, (segments + i, segments + i + 1)]) for i, runs in enumerate(past)]
        return cls._of_runs([*clean, *noisy], 2 * segments)

    def dense(
        self,
        q_lengths: int | Sequence[int],
        k_lengths: int | Sequence[int] | None = None,
        device: str | torch.device = "cpu",
    ) -> torch.Tensor:
        """(T_q, T_k) bool, True where the query token of a row sees the key token of a column.

        Args:
            q_lengths: tokens per query segment, or the S_q lengths of ragged ones.
            k_lengths: of the key segments; default: q_lengths.
            device: of the result.
        """
        q_offsets, k_offsets = self.offsets(q_lengths, k_lengths)
        seen = torch.zeros(q_offsets[-1], k_offsets[-1], dtype=torch.bool, device=device)
        for (start, stop), runs in zip(pairwise(q_offsets), self.runs, strict=True):
            for first, last in runs:
                seen[start:stop, k_offsets[first] : k_offsets[last]] = True
        return seen

    def density(self, q_lengths: int | Sequence[int], k_lengths: int | Sequence[int] | None = None) -> float:
        """Share of all (query, key) token pairs that the mask keeps: attention's FLOPs over those without a mask."""
        q_offsets, k_offsets = self.offsets(q_lengths, k_lengths)
        return self.pairs(q_offsets, k_offsets) / (q_offsets[-1] * k_offsets[-1])

    def pairs(self, q_offsets: Sequence[int], k_offsets: Sequence[int]) -> int:
        """Number of (query, key) token pairs that the mask keeps."""
        keys = [sum([k_offsets[stop] - k_offsets[first] for first, stop in runs]) for runs in self.runs]
        return sum([(stop - start) * n for (start, stop), n in zip(pairwise(q_offsets), keys, strict=True)])

    def offsets(
        self, q_lengths: int | Sequence[int], k_lengths: int | Sequence[int] | None = None
    ) -> tuple[list[int], list[int]]:
        """(S_q + 1,) and (S_k + 1,): first token of each segment, then the number of tokens."""
        k_lengths = q_lengths if k_lengths is None else k_lengths
        sides = (("q_lengths", q_lengths, self.query_segments), ("k_lengths", k_lengths, self.key_segments))
        q_offsets, k_offsets = (_offsets(*side) for side in sides)
        return q_offsets, k_offsets

    def transposed(self) -> SegmentMask:
        """Who is seen by whom: rows are key segments, runs those of query segments."""
        seen: list[list[Run]] = [[] for _ in range(self.key_segments)]
        since = [-1] * self.key_segments  # the query segment from which on all have seen it; -1: the last did not
        before: set[int] = set()
        for i, runs in enumerate((*self.runs, ())):
            ends = {end for run in runs for end in run}
            changed = sorted(before ^ ends)  # the ends of the runs on which the two rows differ
            before = ends
            for first, stop in zip(changed[::2], changed[1::2], strict=True):
                for j in range(first, stop):
                    if since[j] >= 0:
                        seen[j].append((since[j], i))
                    since[j] = i if since[j] < 0 else -1
        return SegmentMask._of_runs(seen, self.query_segments)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"SegmentMask.{name} is read-only; expected a new SegmentMask")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"SegmentMask.{name} is read-only; expected a new SegmentMask")

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SegmentMask) and self.code == other.code

    def __hash__(self) -> int:
        return hash(self.code)

    def __repr__(self) -> str:
        head = f"SegmentMask {self.query_segments} x {self.key_segments}"
        if max(self.query_segments, self.key_segments) > MOST_DRAWN:
            return f"<{head}, runs {described(self.runs[:8])}>"
        lines = []
        for i, runs in enumerate(self.runs):
            seen = {j for first, stop in runs for j in range(first, stop)}
            lines.append(f"{i:>3} " + "".join("■" if j in seen else "·" for j in range(self.key_segments)))
        return "\n".join([head, *lines])


def first_window_segment(segment: int, window: int | None) -> int:
    """First segment inside the window of a query in `segment`."""
    return 0 if window is None else max(0, segment - window + 1)


def causal_runs(segment: int, window: int | None, sink: int) -> list[Run]:
    """The runs of segments that `segment` sees: one, or sink and window when they do not touch."""
    first = first_window_segment(segment, window)
    if sink >= first:
        return [(0, segment + 1)]
    return [(0, sink), (first, segment + 1)] if sink else [(first, segment + 1)]


@lru_cache(maxsize=1024)
def mask_of(code: str, query_segments: int) -> SegmentMask:
    """The mask that an op got as text, for so many query segments.

    Raises:
        ValueError: no such text.
    """
    try:
        if code.startswith("causal "):
            _, window, sink = code.split(" ")
            settings = None if window == "None" else int(window), int(sink)
            if settings[1] < 0 or (settings[0] is not None and settings[0] < 1):
                raise ValueError
            return SegmentMask._of_runs([causal_runs(i, *settings) for i in range(query_segments)], query_segments)
        keys, *lines = code.split("|")
        runs = [[_run(text) for text in line.split(",") if text] for line in lines]
        mask = SegmentMask._of_runs([merged(own) for own in runs], int(keys))
    except ValueError:
        raise ValueError(f"mask is {described(code)}; expected SegmentMask.code") from None
    if mask.code != code or any(own and (own[0][0] < 0 or own[-1][1] > mask.key_segments) for own in mask.runs):
        raise ValueError(f"mask is {described(code)}; expected SegmentMask.code")
    return mask


def causal_code(window: int | None, sink: int) -> str:
    """The block-causal mask of any number of segments, as ops take it."""
    return f"causal {window} {sink}"


def _offsets(name: str, lengths: Any, segments: int) -> list[int]:
    """First token of each of so many segments, then the number of tokens."""
    lengths = lengths.tolist() if hasattr(lengths, "tolist") else lengths
    if is_int(lengths):
        lengths = [check_int("SegmentMask", name, lengths, 1, "tokens")] * segments
    if not isinstance(lengths, Sequence) or isinstance(lengths, str) or len(lengths) != segments:
        raise ValueError(
            f"SegmentMask: {name} is {described(lengths)}; expected an int, or one for each of {segments} segments"
        )
    offsets = [0]
    for i, length in enumerate(lengths):
        offsets.append(offsets[-1] + check_int("SegmentMask", f"{name}[{i}]", length, 1, "tokens"))
    return offsets


def _run(text: str) -> Run:
    first, stop = text.split(":")
    return int(first), int(stop)


def _table(rows: Any) -> Sequence[Sequence[bool]]:
    """`rows` as rows of booleans, or a ValueError."""
    got = rows
    if hasattr(rows, "tolist"):
        rows = rows.tolist()
    lists = isinstance(rows, Sequence) and not isinstance(rows, str) and all([isinstance(r, Sequence) for r in rows])
    if not lists or not rows or not rows[0]:
        raise ValueError(f"SegmentMask: rows is {described(got)}; expected a table of S_q x S_k booleans, not empty")
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise ValueError(f"SegmentMask: rows[{i}] has {len(row)} entries; expected {len(rows[0])}, as rows[0]")
        # No floats: a mask that is added to scores has 0 for what is seen.
        wrong = [value for value in row if value is not True and value is not False and not _is_bit(value)]
        if wrong:
            raise ValueError(f"SegmentMask: rows holds {described(wrong[0])}; expected booleans, or 0 and 1")
    return rows


def _is_bit(value: object) -> bool:
    return is_int(value) and value in (0, 1)


def _runs(row: Sequence[bool]) -> list[Run]:
    """The runs of what is true."""
    ends = [j for j in range(1, len(row)) if row[j] != row[j - 1]]
    ends = [0] * bool(row[0]) + ends + [len(row)] * bool(row[-1])
    return list(zip(ends[::2], ends[1::2], strict=True))


def _check_settings(op: str, segments: int, window: int | None, sink: int) -> tuple[int, int | None, int]:
    segments = _number(check_int(op, "segments", segments, 1))
    if window is not None:
        window = check_int(op, "window", window, 1, "segments")
        if window > segments:
            raise ValueError(
                f"{op}: window is {window}; expected None or 1 to segments={segments} (a window counts segments, the "
                "own one included; neither tokens nor frames)"
            )
        window = _number(window)
    sink = check_int(op, "sink", sink, 0, "segments")
    if sink > segments:
        raise ValueError(f"{op}: sink is {sink}; expected 0 to segments={segments} (a sink counts segments)")
    return segments, window, _number(sink)


def _number(value: int) -> int:
    """`value`, of a compiler's symbol the number it stands for: a mask is a constant of the graph."""
    return len(range(value))
