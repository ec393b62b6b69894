"""Attention on the CPU where numbers are not finite, large, tiny or 0; and drawn calls of every kind."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ard_kernels import SegmentMask, segment_attention
from ard_kernels.block_causal_attention.reference import segment_attention as reference
from ard_kernels.common import extension
from testing import plain
from testing.attention_checks import MEMORY, check, check_norms, leaves, rounding_of_gradients
from testing.devices import DEVICES
from testing.drawing import TIERS, any_mask
from testing.oracle import BACKWARD_FACTOR, FORWARD_FACTOR, assert_close

pytestmark = pytest.mark.skipif("cpu" not in DEVICES, reason="these kernels run on the CPU")
FP32, BF16, FP16 = DTYPES = torch.float32, torch.bfloat16, torch.float16
NAN, INF = float("nan"), float("inf")
# Lengths of queries and keys, and a mask: tiles across segments, a tile each, and more keys than a block holds.
PLACES = {
    "shared tiles": ([3, 1, 4, 2, 5, 1], [2, 6, 1, 3, 3, 2], SegmentMask.block_causal(6, window=3, sink=1)),
    "holes": ([5, 3, 9, 2], [4, 7, 1, 2, 6], SegmentMask([[1, 0, 1, 0, 1], [0] * 5, [1, 1, 0, 0, 1], [0, 1, 0, 0, 0]])),
    "a tile each": ([33, 16, 70], [40, 100, 16], SegmentMask.block_causal(3)),
}
NAMES = ("out", "lse", "dq", "dk", "dv")


def run(q, k, v, grad_out, grad_lse, mask, lengths, k_lengths, backend="cpu", scale=None):
    """Values and gradients, by name."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    how = {"segment_length": lengths, "key_segment_length": k_lengths, "return_lse": True, "scale": scale}
    outputs = segment_attention(*inputs, mask, **how, backend=backend)
    grads = torch.autograd.grad(outputs, inputs, (grad_out, grad_lse))
    return dict(zip(NAMES, (*outputs, *grads), strict=True))


def reached(which, token, sees):
    """What a token of q, k, v, grad_out or grad_lse reaches: masks over the tokens of each result."""
    rows = torch.zeros(len(sees), dtype=torch.bool)
    rows[token if which in ("q", "grad_out", "grad_lse") else sees[:, token]] = True
    if which in ("grad_out", "grad_lse"):
        rows &= sees.any(-1)  # a query that sees nothing has no gradient
    forward = rows & sees.any(-1) if which in ("q", "k", "v") else torch.zeros_like(rows)
    keys = sees[rows].any(0)
    of_values = keys if which in ("q", "k", "grad_out") else torch.zeros_like(keys)
    of_lse = forward if which != "v" else torch.zeros_like(forward)
    return {"out": forward, "lse": of_lse, "dq": rows & sees.any(-1), "dk": keys, "dv": of_values}


@pytest.mark.parametrize("value", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("which", ["q", "k", "v", "grad_out", "grad_lse"])
@pytest.mark.parametrize(("lengths", "k_lengths", "mask"), PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_what_is_not_finite_reaches_exactly_who_sees_it(lengths, k_lengths, mask, which, value, dtype):
    """Whatever rows share its tile. A NaN is lost nowhere, and everybody else's numbers keep to the rule."""
    sees, D = mask.dense(lengths, k_lengths), 16
    q, k, v = (x.detach() for x in leaves("cpu", dtype, 1, 2, 1, sum(lengths), sum(k_lengths), D))
    clean = {"q": q, "k": k, "v": v, "grad_out": torch.randn_like(q), "grad_lse": torch.randn(q.shape[:3])}
    wide = {name: x.double() for name, x in clean.items()}
    exact = by_autograd(reference, wide, sees)
    plains = by_autograd(plain.segment_attention, clean, sees)
    roundings = rounding_of_gradients(
        *(wide[x] for x in "qkv"), exact["out"], exact["lse"], sees, wide["grad_out"], D**-0.5
    )
    floors = dict(zip(NAMES, (0, 0, *roundings), strict=True))  # some rows see one key only
    for token in torch.randperm(clean[which].shape[2])[:4].tolist():
        spoiled = clean | {which: clean[which].clone()}
        spoiled[which][:, :, token] = value
        got = run(*spoiled.values(), mask, lengths, k_lengths)
        for name, touched in reached(which, token, sees).items():
            other = ~touched
            if name == "lse":
                other = other & sees.any(-1)
            tensors = [x[name][:, :, other] for x in (got, plains, exact)]
            factor = FORWARD_FACTOR if name in ("out", "lse") else BACKWARD_FACTOR
            check_norms(*tensors, factor, floors[name], f"{name} beside token {token} of {which}")
            if value != value:
                assert got[name][:, :, touched].isnan().all(), f"a NaN in token {token} of {which} is lost in {name}"


def by_autograd(function, tensors, sees, scale=None):
    """`function`'s values and gradients in the dtypes of `tensors`, by name; plain lse comes from fp32 inputs."""
    inputs = [tensors[name].detach().requires_grad_() for name in ("q", "k", "v")]
    out, lse = function(*inputs, sees, scale)
    if lse.dtype in (BF16, FP16):
        lse = function(*(x.float() for x in inputs), sees, scale)[1]
    seeing = sees.any(-1)
    outputs, cotangents = (out, lse[..., seeing]), (tensors["grad_out"], tensors["grad_lse"][..., seeing])
    grads = torch.autograd.grad(outputs, inputs, [g.to(y.dtype) for g, y in zip(cotangents, outputs, strict=True)])
    return dict(zip(NAMES, (out.detach(), lse.detach(), *grads), strict=True))


def test_a_key_that_nobody_can_weigh():
    """Scores of -inf: weight 0 beside others, alone NaN, as a softmax makes it; a query that sees nothing stays 0."""
    q, k = torch.ones(1, 1, 3, 8), torch.ones(1, 1, 4, 8)
    k[:, :, :2] = -INF
    v = torch.randn(1, 1, 4, 8)
    mask = SegmentMask([[1, 0, 0], [1, 1, 0], [0, 0, 0]])
    lengths = {"segment_length": 1, "key_segment_length": [2, 1, 1]}
    out, lse = segment_attention(q, k, v, mask, **lengths, return_lse=True, backend="cpu")
    assert out[0, 0, 0].isnan().all() and not lse[0, 0, 0].isfinite()
    torch.testing.assert_close(out[0, 0, 1], v[0, 0, 2])
    assert not out[0, 0, 2].any() and lse[0, 0, 2] == -INF


@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("amplitude", [30, 300, 3000])
def test_large_scores(amplitude, dtype):
    """As exact as PyTorch's kernel, which has them in natural units too; in units of log 2 dv erred 4 times as much."""
    lengths, mask = [40, 7, 90], SegmentMask.block_causal(3)
    q, k, v = (x.detach() for x in leaves("cpu", dtype, 2, 2, 2, 137, 137, 64))
    tensors = {"q": q * amplitude, "k": k, "v": v, "grad_out": torch.randn_like(q), "grad_lse": torch.zeros(2, 2, 137)}
    exact = by_autograd(reference, {name: x.double() for name, x in tensors.items()}, mask.dense(lengths))
    got, kernel = (run(*tensors.values(), mask, lengths, None, backend) for backend in ("cpu", "torch"))
    for name in NAMES:
        factor = FORWARD_FACTOR if name in ("out", "lse") else BACKWARD_FACTOR
        assert_close(got[name], kernel[name], exact[name], factor=factor, label=name)


@pytest.mark.parametrize("amplitude", [1e-30, 1e-38, 1e-44])
def test_tiny_numbers(amplitude, thread_counts):
    """Down to subnormal ones, of values and of gradients: finite, of the right size, the same for all threads."""
    lengths, mask = [40, 7, 90], SegmentMask.block_causal(3)
    q, k, v = (x.detach() for x in leaves("cpu", FP32, 4, 2, 2, 137, 137, 64))
    grad_out, grad_lse = torch.randn_like(q) * amplitude, torch.zeros(4, 2, 137)
    first = run(q, k, v * amplitude, grad_out, grad_lse, mask, lengths, None)
    assert all(x.isfinite().all() for x in first.values())
    assert first["out"].abs().max() <= 6 * amplitude and first["dv"].abs().max() <= 137 * 6 * amplitude
    for _ in thread_counts():
        again = run(q, k, v * amplitude, grad_out, grad_lse, mask, lengths, None)
        assert all(torch.equal(first[name], again[name]) for name in NAMES)


def test_subnormal_numbers_are_zero_inside_and_as_they_are_outside(thread_counts):
    """With them each multiply-add takes a hundred cycles; what other code does with them is not the kernel's."""
    q, k, v = torch.randn(3, 4, 3, 64, 32)
    for _ in thread_counts():
        ours = segment_attention(q, k, v * 1e-40, SegmentMask.block_causal(4), segment_length=16, backend="cpu")
        assert not ours.any()
        assert (torch.full((1 << 20,), 1e-40) * 0.5).all(), "a thread still takes them for 0"


# Largest drawn lengths, by how many segments there are.
LONGEST = {1: 400, 2: 200, 4: 90, 9: 40, 40: 4}


@st.composite
def calls(draw):
    """Arguments of `check`, an instruction set, a number of threads."""
    most = draw(st.sampled_from(sorted(LONGEST)))
    lengths = st.lists(st.integers(1, LONGEST[most]), min_size=1, max_size=most)
    q_lengths, k_lengths = draw(lengths), draw(lengths)
    kind = draw(st.sampled_from(["any", "causal", "teacher forcing"]))
    if kind == "any":
        mask = any_mask(draw, len(q_lengths), len(k_lengths))
    else:
        q_lengths = q_lengths + q_lengths if kind == "teacher forcing" else q_lengths
        make = SegmentMask.block_causal if kind == "causal" else SegmentMask.teacher_forcing
        k_lengths, segments = q_lengths, len(q_lengths) // (2 if kind == "teacher forcing" else 1)
        window, sink = draw(st.one_of(st.none(), st.integers(1, segments))), draw(st.integers(0, min(2, segments)))
        mask = make(segments, window=window, sink=sink)
    heads = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (1, 6), (2, 2), (2, 3), (5, 1)]))
    D, dtype = 8 * draw(st.integers(1, 32)), draw(st.sampled_from(DTYPES))
    memory = [draw(st.sampled_from(MEMORY)) for _ in range(3)]
    scale = draw(st.sampled_from([None, None, 0.3, 0.0, -0.5, -1.0]))
    arguments = (mask, q_lengths, k_lengths, draw(st.integers(1, 3)), *heads, D, dtype, True, memory)
    how = draw(st.sampled_from(extension.module.cpu_isas())), draw(st.sampled_from([1, 1, 2, 3]))
    return (*arguments, scale and scale * D**-0.5), *how


@TIERS
def test_drawn_calls(tier, poisoned):
    """Any mask, lengths, heads, memory, scale, dtype, instruction set and number of threads."""
    best = extension.module.cpu_isa()

    @settings(max_examples=(40, 2000)[tier])
    @given(call=calls(), seed=st.integers(0, 1000))
    def draw(call, seed):
        arguments, isa, threads = call
        extension.module.use_cpu_isa(isa)
        torch.set_num_threads(threads)
        torch.manual_seed(seed)
        check("cpu", "cpu", *arguments)

    try:
        draw()
    finally:
        extension.module.use_cpu_isa(best)
        torch.set_num_threads(1)
