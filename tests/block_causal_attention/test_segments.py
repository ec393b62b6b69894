"""`segment_attention`: any mask, other lengths of keys, grouped heads, rows that see nothing, gradients of lse."""

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from ard_kernels import (
    SegmentMask,
    block_causal_attention,
    merge_attention,
    segment_attention,
    segment_attention_packed,
)
from ard_kernels.block_causal_attention import cuda, dense
from ard_kernels.block_causal_attention.reference import segment_attention as reference
from ard_kernels.common import extension
from testing.attention_checks import check, leaves
from testing.devices import SIMULATED, on_devices, simulated_exhaustive, simulated_slow
from testing.drawing import TIERS

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SERVED = on_devices(torch=[(16, FP32)], cpu=[(16, FP32)], triton=[(16, FP32)], cuda=[(64, BF16)])
HOLES = SegmentMask([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1], [0, 1, 0, 0, 0]])  # row 1 and column 3: empty


# What a drawn case of each backend may have, and how many are drawn in the fast and the exhaustive tests.
DRAWN = {
    "torch": {"longest": 40, "segments": 8, "dims": [8, 16, 72], "dtypes": (FP32, BF16, FP16)},
    "cpu": {"longest": 90, "segments": 9, "dims": range(8, 257, 8), "dtypes": (FP32, BF16, FP16)},
    "triton": {"longest": 24, "segments": 3, "dims": [8, 16, 72], "dtypes": (FP32, BF16)},
    "cuda": {"longest": 80, "segments": 5, "dims": cuda.HEAD_DIMS, "dtypes": (BF16, FP16)},
}
EXAMPLES = {"torch": (100, 2000), "cpu": (100, 2000), "triton": (5, 500), "cuda": (10, 500)}


@pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton", "cuda"))
@TIERS
def test_drawn_masks(backend, device, tier):
    most = DRAWN[backend]

    @st.composite
    def cases(draw):
        lengths = st.lists(st.integers(1, most["longest"]), min_size=1, max_size=most["segments"])
        q_lengths, k_lengths = draw(lengths), draw(lengths)
        row = st.lists(st.booleans(), min_size=len(k_lengths), max_size=len(k_lengths))
        mask = SegmentMask(draw(st.lists(row, min_size=len(q_lengths), max_size=len(q_lengths))))
        # Heads of keys, and of queries for each.
        heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 6)] + [(2, 2), (2, 3)] * (backend != "triton")))
        shape = draw(st.integers(1, 2)), *heads, draw(st.sampled_from(most["dims"]))
        return mask, q_lengths, k_lengths, *shape, draw(st.sampled_from(most["dtypes"]))

    @settings(max_examples=EXAMPLES[backend][tier])
    @given(case=cases(), other=st.booleans(), seed=st.integers(0, 5))
    def draw(case, other, seed):
        torch.manual_seed(seed)
        with pytest.MonkeyPatch.context() as patch:
            if backend == "torch" and other:
                patch.setattr(dense, "_fused", lambda device: False)
            if backend == "cuda" and SIMULATED:
                extension.emulated.set_seed(seed)
                patch.setattr(cuda, "architecture", lambda device: 80 if other else 90)
            check(backend, device, *case, drawn=True)

    draw()


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), SERVED)
@pytest.mark.parametrize(
    ("mask", "lengths"),
    [
        (SegmentMask.teacher_forcing(3), [20] * 6),
        (SegmentMask.teacher_forcing(4, window=2, sink=1), [9, 30, 12, 12] * 2),
        (SegmentMask.block_causal(3), [30, 1, 40]),
    ],
    ids=["teacher_forcing", "window_and_sink", "block_causal"],
)
def test_masks_of_video_models(backend, device, D, dtype, mask, lengths, poisoned):
    check(backend, device, mask, lengths, lengths, share=2, D=D, dtype=dtype)


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), SERVED)
def test_rows_and_columns_without_anything(backend, device, D, dtype, poisoned):
    check(backend, device, HOLES, [30, 4, 21, 33], [16, 16, 40, 5, 30], kv_heads=2, share=2, D=D, dtype=dtype)
    check(backend, device, SegmentMask([[0, 0]]), [40], [16, 8], D=D, dtype=dtype)


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), SERVED)
def test_a_block_causal_mask_is_block_causal_attention(backend, device, D, dtype):
    q, k, v = leaves(device, dtype, 1, 1, 1, 60, 60, D)
    for window, sink in ((None, 0), (2, 1)):
        mask = SegmentMask.block_causal(3, window, sink)
        pair = (
            segment_attention(q, k, v, mask, segment_length=20, backend=backend),
            block_causal_attention(q, k, v, segment_length=20, window=window, sink=sink, backend=backend),
        )
        assert torch.equal(*pair)
        grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out in pair]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), SERVED)
def test_packed_equals_three_tensors(backend, device, D, dtype):
    mask = SegmentMask.teacher_forcing(2)
    qkv = torch.randn(2, 60, 3, 2, D, device=device).to(dtype).requires_grad_()
    how = {"segment_length": [10, 20, 10, 20], "return_lse": True, "backend": backend}
    ours = segment_attention_packed(qkv, mask, **how)
    expected = segment_attention(*qkv.unbind(2), mask, layout="bthd", **how)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    grads = [torch.autograd.grad(out.sum() + lse.cos().sum(), qkv)[0] for out, lse in (ours, expected)]
    assert torch.equal(*grads)


@pytest.mark.parametrize("share", [1, 3])
@pytest.mark.parametrize("fused", [True, False])
def test_gradcheck(share, fused, device, monkeypatch):
    """fp64, of out and lse, over every kind of row."""
    if not fused:
        monkeypatch.setattr(dense, "_fused", lambda device: False)
    q, k, v = leaves(device, torch.float64, 1, share, 1, 9, 12, 8)
    seeing = ~torch.tensor([s in (1,) for s, n in enumerate((2, 3, 1, 3)) for _ in range(n)], device=device)

    def run(q, k, v):
        lengths = {"segment_length": [2, 3, 1, 3], "key_segment_length": [1, 3, 2, 2, 4]}
        out, lse = segment_attention(q, k, v, HOLES, return_lse=True, **lengths)
        return out, lse[..., seeing]

    assert torch.autograd.gradcheck(run, (q, k, v))


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), SERVED)
def test_a_gradient_of_lse_alone(backend, device, D, dtype):
    q, k, v = leaves(device, dtype, 1, 2, 1, 40, 40, D)
    mask = SegmentMask.block_causal(2)
    lse = segment_attention(q, k, v, mask, segment_length=20, return_lse=True, backend=backend)[1]
    got = torch.autograd.grad(lse.sum(), (q, k, v))
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(reference(*wide, mask.dense(20, device=device))[1].sum(), wide[:2])
    for ours, exact in zip(got, expected, strict=False):
        torch.testing.assert_close(ours.double(), exact, rtol=2e-2, atol=1e-5 if dtype == FP32 else 2e-2)
    assert not got[2].any()

    def total(q):
        out = segment_attention(q, k.detach(), v.detach(), mask, segment_length=20, return_lse=True, backend=backend)
        return out[1].sum()

    assert torch.equal(torch.func.grad(total)(q.detach()), got[0])  # sum's gradient is an expanded number


@pytest.mark.parametrize(
    ("backend", "device", "D", "dtype"),
    on_devices(torch=[(16, FP16)], cpu=[(16, FP16)], triton=[(16, FP16)], cuda=[(64, FP16)]),
)
def test_a_gradient_of_lse_beyond_fp16(backend, device, D, dtype):
    """As a GradScaler makes it, whose first factor is 65536."""
    q, k, v = leaves(device, dtype, 1, 2, 1, 60, 60, D)
    mask = SegmentMask.block_causal(3)
    lse = segment_attention(q, k * 1e-2, v, mask, segment_length=20, return_lse=True, backend=backend)[1]
    (got,) = torch.autograd.grad(lse, q, torch.full_like(lse, 1e5))
    wide, keys = q.detach().double().requires_grad_(), (k * 1e-2).detach()
    expected_lse = reference(wide, keys, v, mask.dense(20, device=device))[1]
    (expected,) = torch.autograd.grad(expected_lse, wide, torch.full_like(expected_lse, 1e5))
    assert (got - expected).norm() <= 2e-3 * expected.norm()


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize(
    ("backend", "device", "D", "dtype", "tolerance"),
    on_devices(
        torch=[(16, FP32, 1e-5), (16, torch.float64, 1e-12)],
        cpu=[(16, FP32, 1e-5)],
        triton=[(16, FP32, 1e-5)],
        cuda=[(64, BF16, 3e-2)],
    ),
)
def test_merged_parts_equal_the_whole(backend, device, D, dtype, tolerance, layout):
    """Attention over the clean past and over oneself, merged: values and gradients of the one call."""
    S, L = 3, 8
    q, k, v = leaves(device, dtype, 2, 2, 1, 2 * S * L, 2 * S * L, D)
    whole = SegmentMask.teacher_forcing(S)
    table = torch.tensor([[j < S for j in range(2 * S)] for _ in range(2 * S)])
    seen = torch.tensor(whole.dense(1).tolist())
    parts = [SegmentMask(seen & table), SegmentMask(seen & ~table)]
    inputs = [x.transpose(1, 2) for x in (q, k, v)] if layout == "bthd" else [q, k, v]
    how = {"segment_length": L, "layout": layout, "return_lse": True, "backend": backend}
    expected = segment_attention(*inputs, whole, **how)
    outs, lses = zip(*(segment_attention(*inputs, part, **how) for part in parts), strict=True)
    got = merge_attention(outs, lses, layout=layout)
    weights = torch.randn_like(expected[0]), torch.randn_like(expected[1])
    grads = [torch.autograd.grad(pair, (q, k, v), weights) for pair in (got, expected)]
    for ours, exact in zip((*got, *grads[0]), (*expected, *grads[1]), strict=True):
        torch.testing.assert_close(ours, exact, rtol=tolerance, atol=tolerance)


def test_merging_parts_that_see_nothing(device):
    outs = [torch.randn(1, 1, 3, 8, device=device) for _ in range(2)]
    outs[0][0, 0, 1] = float("nan")  # of a query that saw nothing there, by somebody else's attention
    outs, ninf = [out.requires_grad_() for out in outs], float("-inf")
    lses = [torch.tensor([[row]], device=device).requires_grad_() for row in ([0.5, ninf, ninf], [0.1, 2.0, ninf])]
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out[0, 0, 1], outs[1][0, 0, 1]) and lse[0, 0, 1] == 2
    assert not out[0, 0, 2].any() and lse[0, 0, 2] == ninf
    grads = torch.autograd.grad(out.sum() + lse[..., :2].sum(), (*outs, *lses))
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda o, s: ([], []), r"outs is \[\]; expected a list of tensors"),
        (lambda o, s: ([o, o], [s]), "lses has 1 tensors; expected one for each of 2 outs"),
        (lambda o, s: ([o, o[:, :, :2]], [s, s]), r"outs\[1\] is .*; expected it like outs\[0\]"),
        (lambda o, s: ([o, o], [s, s[..., :2]]), r"lses\[1\] is .*; expected floats of shape \(1, 2, 3\)"),
        (lambda o, s: ([o[0]], [s]), r"outs\[0\] has shape .*; expected 4 dims \(B, H, T, D\)"),
        (lambda o, s: ([o], [3]), r"lses\[0\] is 3; expected a tensor"),
    ],
)
def test_bad_parts(spoil, message):
    with pytest.raises(ValueError, match=f"merge_attention: {message}"):
        merge_attention(*spoil(torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3)))


@pytest.mark.parametrize("name", ["runs", "code", "other"])
def test_a_mask_is_frozen(name):
    """Copies and pickles are equal."""
    mask = SegmentMask.teacher_forcing(2)
    with pytest.raises(AttributeError, match=f"SegmentMask.{name} is read-only"):
        setattr(mask, name, ())
    with pytest.raises(AttributeError, match=f"SegmentMask.{name} is read-only"):
        delattr(mask, name)
    for other in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert other == mask and hash(other) == hash(mask) and other.runs == mask.runs


MASK = SegmentMask.block_causal(4)
BAD = {
    "mask": ((1, 2, 32, 8), (1, 2, 32, 8), [[1]], {}, r"mask is \[\[1\]\]; expected an ard_kernels.SegmentMask"),
    "queries": (
        (1, 2, 40, 8),
        (1, 2, 32, 8),
        MASK,
        {"key_segment_length": 8},
        "q has 5 segments; expected the mask's 4",
    ),
    "keys": ((1, 2, 32, 8), (1, 2, 40, 8), MASK, {}, "k has 5 segments; expected the mask's 4"),
    "key_tokens": ((1, 2, 32, 8), (1, 2, 30, 8), MASK, {}, "k has 30 tokens; expected a multiple of segment_length=8"),
    "key_length": (
        (1, 2, 32, 8),
        (1, 2, 30, 8),
        MASK,
        {"key_segment_length": [8, 8]},
        "key_segment_length sums to 16; expected the 30 tokens of k",
    ),
    "heads": ((1, 4, 32, 8), (1, 3, 32, 8), MASK, {}, r"k has shape .*; expected q's .* \(heads may be fewer"),
    "batch": ((2, 4, 32, 8), (1, 4, 32, 8), MASK, {}, "k has shape .*; expected q's"),
    "head_dim": ((1, 4, 32, 8), (1, 4, 32, 16), MASK, {}, "k has shape .*; expected q's"),
    "scale": ((1, 1, 32, 8), (1, 1, 32, 8), MASK, {"scale": True}, "scale is True; expected a finite number"),
    "scale_gradient": (
        (1, 1, 32, 8),
        (1, 1, 32, 8),
        MASK,
        {"scale": torch.tensor(0.1, requires_grad=True)},
        "scale is a tensor that requires a gradient, and none flows to it",
    ),
}


@pytest.mark.parametrize(("q_shape", "k_shape", "mask", "how", "message"), BAD.values(), ids=BAD)
def test_bad_input(q_shape, k_shape, mask, how, message, device):
    q, k = torch.randn(q_shape, device=device), torch.randn(k_shape, device=device)
    with pytest.raises(ValueError, match=f"segment_attention: {message}"):
        segment_attention(q, k, k, mask, segment_length=8, **how)


def test_values_are_like_keys(device):
    q = torch.randn(1, 2, 32, 8, device=device)
    with pytest.raises(ValueError, match=r"v has shape .*; expected k's \(1, 1, 32, 8\)"):
        segment_attention(q, q[:, :1], q, MASK, segment_length=8)


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), simulated_slow(SERVED))
def test_opcheck(backend, device, D, dtype):
    lengths = [3, 5, 2, 6], [4, 2, 3, 1, 6]
    q, k, v = leaves(device, dtype, 1, 2, 1, 16, 16, D)
    settings = (HOLES.code, *lengths, 0.25, backend)
    torch.library.opcheck(torch.ops.ard.segment_attention, (q, k, v, *settings))
    out, lse = (x.detach() for x in torch.ops.ard.segment_attention(q, k, v, *settings))
    detached = [x.detach() for x in (q, k, v)]
    for grad_lse in (None, torch.randn_like(lse)):
        inputs = (torch.randn_like(out), grad_lse, *detached, out, lse, *settings)
        torch.library.opcheck(torch.ops.ard.segment_attention_backward, inputs)


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), simulated_exhaustive(SERVED))
def test_compiles_to_one_graph(backend, device, D, dtype):
    """With a mask from outside, and with one that is made inside."""
    outside = SegmentMask.teacher_forcing(2)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q, k, v, made_inside):
        mask = SegmentMask.teacher_forcing(2) if made_inside else outside
        out, lse = segment_attention(q * 2, k, v, mask, segment_length=8, return_lse=True, backend=backend)
        return out.sin(), lse

    q, k, v = leaves(device, dtype, 1, 2, 1, 32, 32, D)
    for made_inside in (False, True):
        pair = [f(q, k, v, made_inside) for f in (layer, layer._torchdynamo_orig_callable)]
        grads = [torch.autograd.grad(out.sum() + lse.sum(), (q, k, v)) for out, lse in pair]
        for a, b in zip((*pair[0], *grads[0]), (*pair[1], *grads[1]), strict=True):
            torch.testing.assert_close(a, b)


def test_compiles_where_the_number_of_segments_changes(device):
    """The mask is made inside, of a size that the compiler holds for a symbol."""

    def layer(x):
        segments = x.shape[2] // 8
        masks = SegmentMask.teacher_forcing(segments), SegmentMask.block_causal(2 * segments, window=segments, sink=1)
        return sum(segment_attention(x, x, x, mask, segment_length=4) for mask in masks)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for tokens in (16, 24, 32, 16):
        x = torch.randn(1, 1, tokens, 8, device=device)
        torch.testing.assert_close(compiled(x), layer(x))


def test_flop_counter_counts_the_pairs_of_the_mask(device):
    q, k, v = leaves(device, FP32, 2, 4, 2, 26, 29, 16)
    lengths = {"segment_length": [3, 5, 12, 6], "key_segment_length": [4, 12, 6, 1, 6]}
    pairs = int(HOLES.dense(*lengths.values()).sum())
    with FlopCounterMode(display=False) as counter:
        out = segment_attention(q, k, v, HOLES, **lengths)
    assert counter.get_total_flops() == 4 * 2 * 4 * 16 * pairs
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 2 * 4 * 16 * pairs


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), SERVED)
def test_bit_equal_over_runs_and_threads(backend, device, D, dtype, thread_counts):
    L = 8 if backend == "triton" else 20
    heads = (4, 2) if backend in ("torch", "cpu") else (2, 1)  # with fewer, PyTorch's matmuls take the threads
    q, k, v = leaves(device, dtype, 2 if backend == "torch" else 1, *heads, 6 * L, 6 * L, D)
    mask, how = SegmentMask.teacher_forcing(3), {"segment_length": L, "return_lse": True, "backend": backend}

    def run():
        out, lse = segment_attention(q, k, v, mask, **how)
        return out, lse, *torch.autograd.grad(out.sum() + lse.cos().sum(), (q, k, v))

    first = run()
    for _ in thread_counts():
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


def test_forward_mode(device):
    """Tangents of out and lse, through backend torch."""
    q, k, v = (x.detach().double() for x in leaves(device, FP32, 1, 2, 1, 8, 8, 8))
    mask, tangent = SegmentMask.block_causal(2), torch.randn_like(q)

    def run(q):
        return segment_attention(q, k, v, mask, segment_length=4, return_lse=True)

    values, tangents = torch.func.jvp(run, (q,), (tangent,))
    step = 1e-6
    for value, ahead, got in zip(values, run(q + step * tangent), tangents, strict=True):
        torch.testing.assert_close((ahead - value) / step, got, rtol=1e-4, atol=1e-4)
