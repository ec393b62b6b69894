"""Inputs that outsiders tried: refused with the argument, what was expected and what came; or simply right."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from ard_kernels import (
    HistoryCache,
    HistoryRouting,
    adaln_modulate,
    block_causal_attention,
    block_causal_attention_packed,
    gate_residual,
    history_attention,
)

Q = torch.randn(1, 2, 8, 8)
X, ROW = torch.randn(1, 8, 16), torch.randn(1, 2, 16)


def attend(q=Q, k=Q, v=Q, segment_length=4, **arguments):
    return block_causal_attention(q, k, v, segment_length=segment_length, **arguments)


def modulate(x=X, shift=ROW, scale=ROW, segment_length=4, **arguments):
    return adaln_modulate(x, shift, scale, segment_length=segment_length, **arguments)


def sample(q=Q, cache=None, layer=0, **arguments):
    cache = HistoryCache(1, 1, 2, 8, 16) if cache is None else cache
    return history_attention(q, q, q, cache, layer=layer, **arguments)


def under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        return sample()


LEAF = torch.tensor(0.5, requires_grad=True)
REFUSED = {
    "scale that learns": (lambda: attend(scale=LEAF), "scale is a tensor that requires a gradient"),
    "scale in words": (lambda: attend(scale="0.5"), "scale is '0.5'; expected a finite number"),
    "scale nan": (lambda: attend(scale=float("nan")), "scale is nan; expected a finite number"),
    "scale inf, history": (lambda: sample(scale=float("inf")), "scale is inf; expected a finite number"),
    "scale 10**400": (lambda: attend(scale=10**400), "scale is 1000.*; expected a finite number"),
    "scale True": (lambda: attend(scale=True), "scale is True; expected a finite number"),
    "segment_length True": (lambda: attend(segment_length=True), "segment_length is True; expected an int or"),
    "segment_length in words": (lambda: modulate(segment_length="8"), "segment_length is '8'; expected an int or"),
    "a length True": (lambda: attend(segment_length=[7, True]), r"segment_length\[1\] is True; expected an int >= 1"),
    "window True": (lambda: attend(window=True), "window is True; expected None or an int >= 1"),
    "sink a text": (lambda: sample(sink="1"), r"sink is '1'; expected an int >= 0 \(segments\)"),
    "v None": (lambda: attend(v=None), "v is None; expected a tensor"),
    "q a list": (lambda: attend(q=[1.0]), r"q is \[1.0\]; expected a tensor"),
    "qkv an array": (
        lambda: block_causal_attention_packed(np.zeros((1, 8, 3, 2, 8)), segment_length=4),
        r"qkv is array.*\(ndarray\); expected a tensor",
    ),
    "gate in words": (lambda: gate_residual(X, X, "1", segment_length=4), "gate is '1'; expected a tensor"),
    "layout forgotten": (
        lambda: attend(*[torch.randn(1, 64, 4, 16)] * 3, segment_length=16),
        r"segment_length=16 \(tokens are dim 2 of \(1, 64, 4, 16\), layout 'bhtd'\)",
    ),
    "layout forgotten, history": (
        lambda: sample(Q.transpose(1, 2)),
        r"expected the cache's .* \(is the layout right\?\)",
    ),
    "layout None": (lambda: attend(layout=None), "layout is None; expected 'bhtd' or 'bthd'"),
    "float64 rows": (
        lambda: modulate(shift=ROW.double(), scale=ROW.double()),
        "shift has dtype torch.float64; expected",
    ),
    "float64 branch": (
        lambda: gate_residual(X, X.double(), ROW, segment_length=4),
        "branch has dtype torch.float64; expected it with float64 x only",
    ),
    "eps in words": (lambda: modulate(eps="1e-6"), "eps is '1e-6'; expected a positive number"),
    "eps nan": (lambda: modulate(eps=float("nan")), "eps is nan; expected a positive number"),
    "cache None": (
        lambda: history_attention(Q, Q, Q, None, layer=0),
        "cache is None; expected an ard_kernels.HistoryC",
    ),
    "cache a dict": (lambda: history_attention(Q, Q, Q, {}, layer=0), "cache is {}; expected an ard_kernels.HistoryC"),
    "layer None": (lambda: sample(layer=None), "layer is None; expected 0 to 0"),
    "layer True": (lambda: sample(layer=True), "layer is True; expected 0 to 0"),
    "float32 cache, autocast": (
        under_autocast,
        r"expected the cache's torch.float32 \(autocast to torch.bfloat16 is on",
    ),
    "head_dim 20": (lambda: HistoryCache(1, 1, 1, 20, 8), "head dim 20; expected a multiple of 8 from 8 to 256"),
    "layers True": (lambda: HistoryCache(True, 1, 1, 8, 8), "layers is True; expected an int >= 0"),
    "dtype in words": (lambda: HistoryCache(1, 1, 1, 8, 8, "bfloat16"), "dtype is 'bfloat16'; expected a torch.dtype"),
    "depth True": (lambda: HistoryRouting(True, 0), "depth is True; expected an int >= 1"),
    "sparse": (lambda: attend(Q.to_sparse()), "q is a torch.sparse_coo tensor; expected a dense one"),
    "mkldnn": (lambda: modulate(X.to_mkldnn()), "x is a torch._mkldnn tensor; expected a dense one"),
    "nested": (lambda: attend(torch.nested.nested_tensor([Q[0]])), "q is a nested tensor; expected a dense one"),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_windows_and_sinks_beyond_every_segment():
    expected = attend()
    for mask in ({"window": 2**80}, {"sink": 2**80}, {"window": 2**63, "sink": 2**63}):
        assert torch.equal(attend(**mask), expected)
        assert torch.equal(torch.compile(attend, backend="aot_eager")(**mask), expected)


def test_numbers_of_numpy():
    n = np.int64
    expected = attend(scale=0.5, window=1)
    assert torch.equal(attend(segment_length=n(4), window=n(1), sink=n(0), scale=np.float32(0.5)), expected)
    torch.testing.assert_close(attend(scale=torch.tensor(0.5), window=1, segment_length=np.array([4, 4])), expected)
    cache = HistoryCache(*map(n, (1, 1, 2, 8, 16)))
    assert torch.equal(sample(cache=cache, layer=n(0), backend="torch"), attend(segment_length=8, backend="torch"))
    assert HistoryRouting(n(4), n(2)).mask(n(3)) == {"window": 1, "sink": 0}


def raw_attention(q=Q, k=Q, v=None, mask="causal None 0", lengths=(4,), backend="torch"):
    v = k if v is None else v
    return torch.ops.ard.segment_attention(q, k, v, mask, lengths, (4,), 0.3, backend)


def raw_attention_backward(grad=Q, out=Q, lse=None, grad_lse=None):
    lse, settings = torch.zeros(1, 2, 8) if lse is None else lse, ("causal None 0", [4], [4], 0.3, "torch")
    return torch.ops.ard.segment_attention_backward(grad, grad_lse, Q, Q, Q, out, lse, *settings)


def raw_adaln(lengths, row=ROW):
    rows = None, row, row, None, None
    return torch.ops.ard.segment_adaln(X, None, *rows, lengths, "layer", 1e-6, torch.float32, "cpu")


def raw_adaln_backward(mean=None, grad=X):
    statistic = torch.zeros(1, 8)
    tensors = None, grad, X, None, None, ROW, None, None, statistic if mean is None else mean, statistic
    return torch.ops.ard.segment_adaln_backward(*tensors, [4], ROW.dtype, [False, True, True, False, False], "cpu")


def raw_gate(branch=X, gate=ROW):
    rows = gate, None, None, None, None
    return torch.ops.ard.segment_adaln(X, branch, *rows, [4], None, 1e-6, torch.float32, "cpu")


RAW = {
    "attention, k": (lambda: raw_attention(k=Q[..., :4]), "k has shape"),
    "attention, tokens of k": (lambda: raw_attention(k=Q[:, :, :4]), "k has 1 segments; expected q's 2"),
    "attention, v": (lambda: raw_attention(v=Q[:, :, :4]), "v has shape"),
    "attention, keys past the last": (lambda: raw_attention(mask="2|0:1|0:3"), "expected SegmentMask.code"),
    "attention, negative keys": (lambda: raw_attention(mask="2|-1:1|0:2"), "expected SegmentMask.code"),
    "attention, runs that touch": (lambda: raw_attention(mask="2|0:1,1:2|0:2"), "expected SegmentMask.code"),
    "attention, no mask": (lambda: raw_attention(mask="causal"), "mask is 'causal'; expected SegmentMask.code"),
    "attention, window": (lambda: raw_attention(mask="causal 0 0"), "expected SegmentMask.code"),
    "attention, other mask": (lambda: raw_attention(mask="3|0:1|0:2|0:3"), "q has 2 segments; expected the mask's 3"),
    "attention, strides": (lambda: raw_attention(q=Q.transpose(2, 3)), "q has strides"),
    "attention, k on meta": (lambda: raw_attention(k=Q.to("meta")), "k is on meta; expected q's cpu"),
    "attention, lengths": (lambda: raw_attention(lengths=(4, 5)), "segment_length sums to 9; expected the 8 tokens"),
    "attention, backend": (lambda: raw_attention(backend="triton2"), "backend 'triton2' .* unknown backend"),
    "attention backward, lse": (lambda: raw_attention_backward(lse=torch.zeros(1, 2, 4)), "lse is a float32 tensor"),
    "attention backward, grad_lse": (
        lambda: raw_attention_backward(grad_lse=torch.zeros(1, 2, 4)),
        "grad_lse is a float32 tensor",
    ),
    "attention backward, out": (lambda: raw_attention_backward(out=Q[:, :1]), "out has shape"),
    "packed": (
        lambda: torch.ops.ard.segment_attention_packed(torch.randn(1, 8, 2, 2, 8), "causal None 0", [4], 0.3, "torch"),
        "qkv has shape",
    ),
    "adaln, lengths": (lambda: raw_adaln([5]), "the input has 8 tokens; expected a multiple of segment_length=5"),
    "adaln, too few rows": (lambda: raw_adaln([2]), r"shift has shape \(1, 2, 16\); expected \(1, 4, 16\)"),
    "adaln, rows per token": (lambda: raw_adaln([8], X), r"lengths is \[8\]; expected \[1\] for rows per token"),
    "adaln, strides": (lambda: raw_adaln([4], ROW.mT.contiguous().mT), "shift has strides"),
    "adaln backward, mean": (lambda: raw_adaln_backward(mean=torch.zeros(1, 4)), "mean is a float32 tensor"),
    "adaln backward, grad": (lambda: raw_adaln_backward(grad=X[:, :4]), "grad_y has shape"),
    "gate, branch": (lambda: raw_gate(branch=X[:, :4]), "branch has shape"),
    "gate, row": (lambda: raw_gate(gate=ROW[..., :8]), "gate has shape"),
}


@pytest.mark.parametrize(("call", "message"), RAW.values(), ids=RAW)
def test_raw_ops_check_what_they_point_to(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_empty_inputs_may_have_any_strides():
    """A contiguous copy of nothing keeps the strides, so that raw ops must not ask for others."""
    q, x, row = torch.randn(2, 0, 8, 16)[..., ::2], torch.randn(0, 8, 32)[..., ::2], torch.randn(0, 2, 16)
    with FlopCounterMode(display=False):
        assert attend(q, q, q).shape == q.shape
        assert modulate(x, row, row).shape == gate_residual(x, x, row, segment_length=4).shape == x.shape


@pytest.mark.parametrize("strides", [(128, 1, 16, 1), (1, 80, 16, 1)], ids=["heads", "batches"])
def test_heads_that_overlap_by_all_but_one_element(strides, poisoned):
    """PyTorch's CPU kernel, left alone with such a q, does not write all of its output."""
    q = torch.randn(512).as_strided((3, 2, 5, 16), strides)
    packed = torch.stack([q.transpose(1, 2)] * 3, 2)
    for backend in ("cpu", "torch"):
        expected = block_causal_attention_packed(packed, segment_length=5, backend=backend).transpose(1, 2)
        assert torch.equal(block_causal_attention(q, q, q, segment_length=5, backend=backend), expected)
    assert torch.equal(history_attention(q, q, q, HistoryCache(1, 3, 2, 16, 5), layer=0, backend="torch"), expected)
