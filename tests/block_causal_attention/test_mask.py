"""`SegmentMask`: what each constructor says, against sentences written out; errors; the text that ops take."""

import copy
import pickle

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ard_kernels import SegmentMask, block_causal_attention
from ard_kernels.block_causal_attention.mask import causal_code, mask_of
from ard_kernels.block_causal_attention.spec import dense_mask

tables = st.integers(1, 7).flatmap(
    lambda n: st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=1, max_size=7)
)


def teacher_forced(query, key, S, window, sink):
    """[clean C_0 .. C_{S-1} | noisy N_0 .. N_{S-1}]: C_i sees C_0 .. C_i; N_i sees C_0 .. C_{i-1} and itself."""
    i, j = query % S, key % S
    if key >= S:
        return query == key
    in_window = window is None or j > i - window
    past = j <= i if query < S else j < i
    return past and (in_window or j < sink)


@pytest.mark.parametrize("S", range(1, 10))
def test_teacher_forcing_is_the_sentence(S):
    for window in (None, *range(1, S + 1)):
        for sink in range(S + 1):
            expected = [[teacher_forced(q, k, S, window, sink) for k in range(2 * S)] for q in range(2 * S)]
            mask = SegmentMask.teacher_forcing(S, window, sink)
            assert mask.dense(1).tolist() == expected and mask == SegmentMask(expected)
            expected = torch.tensor(expected).repeat_interleave(3, 0).repeat_interleave(3, 1)
            assert torch.equal(mask.dense(3), expected)
    assert SegmentMask.teacher_forcing(S).density(5) == (S + 1) / (4 * S)


@pytest.mark.parametrize("S", range(1, 7))
def test_block_causal_is_the_mask_of_block_causal_attention(S):
    lengths = [2 * i + 1 for i in range(S)]
    for window in (None, *range(1, S + 1)):
        for sink in range(S + 1):
            mask = SegmentMask.block_causal(S, window, sink)
            assert torch.equal(mask.dense(lengths), dense_mask(lengths, sum(lengths), window, sink))
            assert mask == mask_of(causal_code(window, sink), S)


@given(tables, st.data())
def test_any_table(table, data):
    mask = SegmentMask(table)
    for other in (torch.tensor(table), numpy.array(table), [[int(x) for x in row] for row in table]):
        assert SegmentMask(other) == mask and hash(SegmentMask(other)) == hash(mask)
    assert mask.dense(1).tolist() == table and mask.transposed().dense(1).tolist() == torch.tensor(table).T.tolist()
    assert mask_of(mask.code, len(table)) == mask and mask.transposed().transposed() == mask
    q_lengths, k_lengths = (
        data.draw(st.lists(st.integers(1, 5), min_size=n, max_size=n)) for n in (len(table), len(table[0]))
    )
    expected = torch.tensor(table).repeat_interleave(torch.tensor(q_lengths), 0)
    expected = expected.repeat_interleave(torch.tensor(k_lengths), 1)
    dense = mask.dense(q_lengths, k_lengths)
    assert torch.equal(dense, expected) and torch.equal(
        mask.dense(numpy.array(q_lengths), torch.tensor(k_lengths)), dense
    )
    assert mask.density(q_lengths, k_lengths) == pytest.approx(dense.double().mean().item())
    drawing = repr(mask).splitlines()[1:]
    assert [[c == "■" for c in line.split(" ")[-1]] for line in drawing] == table


def test_a_mask_is_a_value():
    mask = SegmentMask.teacher_forcing(3)
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask and hash(twin) == hash(mask) and twin.runs == mask.runs
    assert mask != SegmentMask.teacher_forcing(3, window=2) and mask != mask.code
    with pytest.raises(AttributeError, match=r"SegmentMask\.runs is read-only"):
        mask.runs = ()
    assert len({mask, SegmentMask.teacher_forcing(3, window=3)}) == 1, "a window of all segments is none"
    assert repr(SegmentMask.block_causal(100)).startswith("<SegmentMask 100 x 100, runs ")


def test_many_segments():
    assert SegmentMask(torch.ones(1500, 1500).tril().bool()) == SegmentMask.block_causal(1500)
    mask = SegmentMask.block_causal(20_000, window=7, sink=2)
    assert len(mask.transposed().runs[0]) == 1 and mask.pairs(range(20_001), range(20_001)) < 10 * 20_000


BAD = {
    "text": (lambda: SegmentMask("101"), "rows is '101'; expected a table of S_q x S_k booleans"),
    "flat": (lambda: SegmentMask([1, 0]), r"rows is \[1, 0\]; expected a table"),
    "empty": (lambda: SegmentMask([]), r"rows is \[\]; expected a table"),
    "no_columns": (lambda: SegmentMask([[], []]), r"rows is \[\[\], \[\]\]; expected a table"),
    "ragged": (lambda: SegmentMask([[1, 0], [1]]), r"rows\[1\] has 1 entries; expected 2, as rows\[0\]"),
    "numbers": (lambda: SegmentMask([[1, 2]]), "rows holds 2; expected booleans, or 0 and 1"),
    "scores": (lambda: SegmentMask(torch.zeros(2, 2)), "rows holds 0.0; expected booleans, or 0 and 1"),
    "cube": (lambda: SegmentMask(torch.ones(2, 2, 2).bool()), "expected booleans"),
    "none": (lambda: SegmentMask(None), "rows is None; expected a table"),
    "segments": (lambda: SegmentMask.block_causal(0), "segments is 0; expected an int >= 1"),
    "window": (lambda: SegmentMask.block_causal(3, window=0), "window is 0; expected an int >= 1"),
    "true": (lambda: SegmentMask.teacher_forcing(3, window=True), "window is True; expected an int >= 1"),
    "tokens": (lambda: SegmentMask.teacher_forcing(7, window=4680), "window is 4680; expected None or 1 to segments=7"),
    "sink": (lambda: SegmentMask.teacher_forcing(7, sink=8), "sink is 8; expected 0 to segments=7"),
    "sink_true": (lambda: SegmentMask.block_causal(7, sink=True), "sink is True; expected an int >= 0"),
    "lengths": (lambda: SegmentMask.block_causal(3).dense([1, 2]), r"q_lengths is \[1, 2\]; expected an int, or one"),
    "key_lengths": (lambda: SegmentMask.block_causal(3).density(4, 0), "k_lengths is 0; expected an int >= 1"),
    "no_length": (lambda: SegmentMask.block_causal(2).dense([1, 0]), r"q_lengths\[1\] is 0; expected an int >= 1"),
}


@pytest.mark.parametrize(("make", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_window_in_tokens_is_told():
    q = torch.randn(1, 1, 64, 8)
    with pytest.warns(UserWarning, match="window=32 of 4 segments sees all of them.*32 tokens are window=2"):
        block_causal_attention(q, q, q, segment_length=16, window=32)
