"""What hypothesis draws in several files, and in how many tiers."""

import numpy as np
import pytest
from hypothesis import strategies as st

from ard_kernels.block_causal_attention.mask import SegmentMask, mask_of
from ard_kernels.block_causal_attention.spec import Segments, block_causal, visibility

# Index of the number of cases in (few, most): in fast and in exhaustive tests. The few are the first of the most.
TIERS = pytest.mark.parametrize(
    "tier", [pytest.param(0, id="few"), pytest.param(1, id="most", marks=pytest.mark.exhaustive)]
)


def any_mask(draw, q_segments: int, k_segments: int) -> SegmentMask:
    row = st.lists(st.booleans(), min_size=k_segments, max_size=k_segments)
    return SegmentMask(draw(st.lists(row, min_size=q_segments, max_size=q_segments)))


@st.composite
def drawn_segments(draw, longest: int = 40, most: int = 7) -> tuple[Segments, int, int]:
    """(Segments, T_q, T_k): block-causal ones, or any mask over lengths of both sides."""
    if draw(st.booleans()):
        lengths = draw(
            st.one_of(
                st.lists(st.integers(1, longest), min_size=1, max_size=most),
                st.tuples(st.integers(1, longest), st.integers(1, most)).map(lambda p: [p[0]] * p[1]),
            )
        )
        window, sink = draw(st.one_of(st.none(), st.integers(1, 6))), draw(st.integers(0, 5))
        return block_causal(lengths, window, sink), sum(lengths), sum(lengths)
    q_lengths, k_lengths = (draw(st.lists(st.integers(1, longest), min_size=1, max_size=most)) for _ in range(2))
    mask = any_mask(draw, len(q_lengths), len(k_lengths)).code
    return Segments(mask, tuple(q_lengths), tuple(k_lengths)), sum(q_lengths), sum(k_lengths)


def dense(case: tuple[Segments, int, int]) -> np.ndarray:
    """(T_q, T_k) bool, of what `drawn_segments` draws."""
    seen = visibility(*case)
    mask = mask_of(case[0].mask, len(seen.q_offsets) - 1)
    return mask.dense(np.diff(seen.q_offsets), np.diff(seen.k_offsets)).numpy()
