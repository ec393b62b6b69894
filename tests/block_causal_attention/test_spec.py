"""The index algebra against the dense mask, for thousands of drawn cases."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ard_kernels.block_causal_attention import spec
from ard_kernels.common.segments import segment_offsets
from testing.drawing import TIERS

masks = st.tuples(st.one_of(st.none(), st.integers(1, 6)), st.integers(0, 5))
ragged = st.lists(st.integers(1, 7), min_size=1, max_size=7)


def visible(query_segment, key_segment, window, sink):
    """The sentence of the docstring, token by token."""
    in_past = key_segment <= query_segment
    in_window = window is None or key_segment >= query_segment - window + 1
    return in_past and (in_window or key_segment < sink)


@TIERS
def test_dense_mask_is_the_definition(tier):
    @settings(max_examples=(200, 2000)[tier])
    @given(ragged, masks)
    def draw(lengths, mask):
        segment_of = [segment for segment, length in enumerate(lengths) for _ in range(length)]
        expected = [[visible(q, k, *mask) for k in segment_of] for q in segment_of]
        assert spec.dense_mask(lengths, len(segment_of), *mask).tolist() == expected

    draw()


@TIERS
def test_ranges_equal_the_dense_mask(tier):
    settings(max_examples=(200, 2000)[tier])(given(ragged, masks)(check_ranges))()


def check_ranges(lengths, mask):
    tokens = sum(lengths)
    dense = spec.dense_mask(lengths, tokens, *mask)
    seen = spec.visibility(spec.block_causal(lengths, *mask), tokens, tokens)
    assert seen.q_offsets == seen.k_offsets == segment_offsets(lengths, tokens)
    for segment, start in enumerate(seen.q_offsets[:-1]):
        assert torch.equal(tokens_of(seen.keys[segment], tokens), dense[start])
        assert torch.equal(tokens_of(seen.queries[segment], tokens), dense[:, start])
        assert len(seen.keys[segment]) <= 2 and len(seen.queries[segment]) == 1
    assert seen.pairs == spec.useful_pairs(lengths, tokens, *mask) == int(dense.sum())


def tokens_of(ranges, tokens):
    """(T,) bool: the tokens of ranges that are in order, apart and not empty."""
    chosen, last = torch.zeros(tokens, dtype=torch.bool), -1
    for start, stop in ranges:
        assert last < start < stop, "ranges touch, overlap or are empty"
        chosen[start:stop], last = True, stop
    return chosen


@given(st.integers(1, 8), st.integers(0, 8))
def test_equal_segments_are_a_special_case_of_ragged_ones(length, segments):
    tokens = length * segments
    assert segment_offsets([length], tokens) == [length * i for i in range(segments + 1)]
    if segments:
        assert segment_offsets([length] * segments, tokens) == segment_offsets([length], tokens)


def test_the_masks_of_the_paper():
    one_token_segments = [1, 1, 1, 1]
    masks = {
        "M1": ((1, 0), [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]),
        "M2": ((2, 0), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1]]),
        "M3": ((1, 1), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1]]),
        "M4": ((None, 0), [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]),
    }
    for name, (mask, expected) in masks.items():
        assert spec.dense_mask(one_token_segments, 4, *mask).int().tolist() == expected, name
