"""Cached sampling against the dense reference: values, ragged steps, contract, compile, opcheck, FLOPs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import ard_kernels
from ard_kernels import (
    HeadNorm,
    HistoryCache,
    HistoryRouting,
    block_causal_attention,
    history_attention,
)
from ard_kernels.block_causal_attention.reference import block_causal_attention as dense_reference
from ard_kernels.block_causal_attention.spec import dense_mask, useful_pairs
from ard_kernels.common import extension
from ard_kernels.common.segments import segment_offsets
from ard_kernels.history_attention import splits
from ard_kernels.history_attention.reference import history_attention as reference
from ard_kernels.history_attention.spec import visible_tokens
from ard_kernels.history_attention.splits import LEAST_TILES, share_tiles, split_count
from testing.oracle import assert_close

BACKENDS = ["torch", "cpu", "triton", "cuda"]  # triton: in its interpreter, cuda: in the emulator; so smaller cases
HALVES = [torch.bfloat16, torch.float16]
# The tensor cores of "cuda" would round fp32.
BACKENDS_AND_DTYPES = [(b, d) for b in BACKENDS for d in [torch.float32, *HALVES] if b != "cuda" or d in HALVES]
MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "window2_sink1": (2, 1)}


def make_segments(B, H, lengths, D, dtype=torch.float32, packed=True):
    segments = []
    for length in lengths:
        qkv = torch.randn(B, length, 3, H, D).to(dtype)
        parts = (x.transpose(1, 2) for x in qkv.unbind(2))
        segments.append(tuple(parts if packed else (x.contiguous() for x in parts)))
    return segments


def check(backend, lengths, mask, B=2, H=3, D=72, dtype=torch.float32, packed=True):
    segments = make_segments(B, H, lengths, D, dtype, packed)
    cache = HistoryCache(1, B, H, D, sum(lengths), dtype)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    steps = []
    for step, (q, k, v) in enumerate(segments):
        out = history_attention(q, k, v, cache, layer=0, window=mask[0], sink=mask[1], backend=backend)
        so_far = segments[: step + 1]
        expected = reference(so_far, *mask)
        plain_in = [torch.cat(parts, 2) for parts in zip(*so_far, strict=True)]
        plain = dense_plain(*plain_in, lengths[: step + 1], *mask)[:, :, -lengths[step] :]
        steps.append((out, plain, expected))
    assert_close(*(torch.cat(parts, 2) for parts in zip(*steps, strict=True)))
    assert torch.equal(cache.keys[0], torch.cat([k for _, k, _ in segments], 2))
    assert torch.equal(cache.values[0], torch.cat([v for _, _, v in segments], 2))
    assert cache.offsets == [segment_offsets(lengths, sum(lengths)) if len(lengths) > 1 else [0, lengths[0]]]


def dense_plain(q, k, v, lengths, window, sink):
    mask = dense_mask(lengths, q.shape[2], window, sink)
    return ((q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))).softmax(-1) @ v


@pytest.mark.parametrize(("backend", "dtype"), BACKENDS_AND_DTYPES)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_steps_equal_the_dense_reference(backend, mask, dtype, poisoned):
    B, H = (1, 2) if backend in ("triton", "cuda") else (2, 3)
    check(backend, [16, 16, 16, 16], mask, B, H, dtype=dtype)


@pytest.fixture
def split_counts(monkeypatch):
    """What split_count answers, call by call."""
    counts, count = [], splits.split_count
    monkeypatch.setattr(splits, "split_count", lambda *args: counts.append(count(*args)) or counts[-1])
    return counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_split_keys(mask, dtype, poisoned, split_counts):
    """Few rows, many keys: several programs share them, but for M1, where a segment sees itself alone."""
    check("triton", [200, 33, 32, 30, 7], mask, 1, 1, 72, dtype)
    assert (max(split_counts) > 1) == (mask != MASKS["M1"])
    assert mask != MASKS["M4"] or split_counts == [1, 2, 4, 4, 4]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("mask", "counts"),
    [("M1", [2, 2, 1, 1]), ("M2", [2, 2, 2, 1]), ("M3", [2, 2, 3, 3]), ("M4", [2, 2, 4, 4])],
)
def test_split_keys_cuda(mask, counts, dtype, poisoned, split_counts, monkeypatch):
    """Up to one split per key tile, partly filled ones among them; 4 multiprocessors."""
    monkeypatch.setattr(splits, "LEAST_TILES", 1)
    check("cuda", [100, 70, 30, 7], MASKS[mask], 1, 1, 72, dtype)
    assert split_counts == counts


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 160))
def test_splits_fit_the_workspace(row_tiles, column_tiles, multiprocessors):
    splits = split_count(row_tiles, column_tiles, multiprocessors)
    assert splits >= 1
    if splits > 1:
        assert splits * row_tiles <= multiprocessors and column_tiles >= splits * LEAST_TILES
    shares, tiles = share_tiles(row_tiles, column_tiles, multiprocessors)
    assert shares <= splits and (shares - 1) * tiles < column_tiles <= shares * tiles, "no share is empty"


@pytest.mark.parametrize("backend", ["torch", "cpu", "triton"])
@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    mask=st.tuples(st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 4)),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([8, 24, 72])),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    packed=st.booleans(),
)
def test_drawn_cases(backend, lengths, mask, shape, dtype, packed):
    check(backend, lengths, mask, *shape, dtype, packed)


@settings(max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    mask=st.tuples(st.one_of(st.none(), st.integers(1, 4)), st.integers(0, 3)),
    D=st.sampled_from([64, 72, 128]),
    dtype=st.sampled_from(HALVES),
    packed=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_drawn_cases_cuda(lengths, mask, D, dtype, packed, seed):
    extension.emulated.set_seed(seed)
    check("cuda", lengths, mask, 1, 1, D, dtype, packed)
    extension.emulated.set_seed(0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.one_of(st.none(), st.integers(1, 6)), st.integers(0, 5))
def test_visible_tokens_count_the_pairs_of_the_mask(lengths, window, sink):
    total = 0
    for step in range(1, len(lengths) + 1):
        offsets = [sum(lengths[:i]) for i in range(step + 1)]
        sink_stop, window_start = visible_tokens(offsets, window, sink)
        assert 0 <= sink_stop <= window_start < offsets[-1] or (sink_stop == 0 and window_start == 0)
        total += lengths[step - 1] * (sink_stop + offsets[-1] - window_start)
    assert total == useful_pairs(lengths, sum(lengths), window, sink)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bit_equal_over_threads_and_runs(backend, thread_counts):
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    segments = make_segments(2, 2, [32, 32], 72, dtype)

    def run():
        cache = HistoryCache(1, 2, 2, 72, 64, dtype)
        return [history_attention(*s, cache, layer=0, backend=backend) for s in segments] + [cache.keys, cache.values]

    first = run()
    for count in thread_counts():
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_beyond_int32(backend):
    """Two samples more than 2**31 elements apart; the memory between them is reserved, never touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16)
    far = storage.as_strided((2, 3, 4, 64), (2**31 + 64, 256, 64, 1))
    near = torch.randn(2, 3, 4, 64).bfloat16()
    far.copy_(near)
    outputs = []
    for x in (far, near):
        cache = HistoryCache(1, 2, 3, 64, 4, torch.bfloat16)
        outputs.append((history_attention(x, x, x, cache, layer=0, backend=backend), cache.keys, cache.values))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    attention = {"cpu": "torch"}.get(backend, backend)
    assert torch.equal(outputs[0][0], block_causal_attention(far, far, far, segment_length=4, backend=attention))


BAD = {
    "layer": (lambda q: (q, q, q), {"layer": 2}, "layer is 2; expected 0 to 1"),
    "heads": (lambda q: (q[:, :1],) * 3, {}, r"k has \(batch, heads, head_dim\) \(1, 1, 16\); expected the cache's"),
    "dtype": (lambda q: (q.half(),) * 3, {}, "k has dtype torch.float16; expected the cache's torch.float32"),
    "empty": (lambda q: (q[:, :, :0],) * 3, {}, "k has 0 tokens; expected a segment of at least 1"),
    "window": (lambda q: (q, q, q), {"window": 0}, "window is 0"),
    "shape": (lambda q: (q, q[:, :, :4], q), {}, "k has shape"),
    "device": (lambda q: (q.to("meta"),) * 3, {}, "k is on meta; expected the cache's cpu"),
    "backend": (lambda q: (q, q, q), {"backend": "tpu"}, "backend 'tpu' .* unknown backend"),
    "q_norm": (lambda q: (q, q, q), {"q_norm": "rms"}, "q_norm is 'rms'; expected None or an ard_kernels.HeadNorm"),
    "norm's shape": (
        lambda q: (q, q, q),
        {"k_norm": HeadNorm(weight=torch.ones(8))},
        r"k_norm.weight has shape \(8,\); expected \(head_dim,\) = \(16,\)",
    ),
    "norm's dtype": (
        lambda q: (q, q, q),
        {"q_norm": HeadNorm("layer", bias=torch.ones(16).half())},
        r"q_norm.bias has dtype torch.float16; expected q's torch.float32 or torch.float32",
    ),
    "norm's device": (
        lambda q: (q, q, q),
        {"q_norm": HeadNorm(weight=torch.ones(16, device="meta"))},
        "q_norm.weight is on meta; expected q's cpu",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_cache_alone(make, arguments, message):
    cache = HistoryCache(2, 1, 2, 16, 64)
    cache.keys.zero_()
    q = torch.randn(1, 2, 16, 16)
    with pytest.raises(ValueError, match=f"history_attention: .*{message}"):
        history_attention(*make(q), cache, **{"layer": 0, **arguments})
    assert cache.length == 0 and not cache.keys.any()


def test_gradients_are_refused():
    q = torch.randn(1, 2, 16, 16, requires_grad=True)
    with pytest.raises(RuntimeError, match="requires a gradient; expected sampling under"):
        history_attention(q, q, q, HistoryCache(1, 1, 2, 16, 16), layer=0)
    norm = HeadNorm(weight=torch.ones(16, requires_grad=True))
    with pytest.raises(RuntimeError, match="or a norm requires a gradient; expected sampling under"):
        history_attention(*[q.detach()] * 3, HistoryCache(1, 1, 2, 16, 16), layer=0, k_norm=norm)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_flops_of_all_steps_equal_the_mask(mask):
    cache = HistoryCache(1, 2, 3, 24, 64)
    with FlopCounterMode(display=False) as counter:
        for q, k, v in make_segments(2, 3, [16] * 4, 24):
            history_attention(q, k, v, cache, layer=0, window=mask[0], sink=mask[1], q_norm=HeadNorm())
    assert counter.get_total_flops() == 4 * 2 * 3 * 24 * useful_pairs([16], 64, *mask)


def test_compiles_to_one_graph():
    segments = make_segments(1, 2, [16] * 4, 16)
    caches = HistoryCache(1, 1, 2, 16, 64), HistoryCache(1, 1, 2, 16, 64)

    norm = HeadNorm("layer", torch.randn(16), torch.randn(16))

    def step(q, k, v, cache):
        norms = {"q_norm": HeadNorm(eps=1e-3), "k_norm": norm}
        return history_attention(q, k, v, cache, layer=0, window=2, **norms).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for q, k, v in segments:
            torch.testing.assert_close(compiled(q, k, v, caches[0]), step(q, k, v, caches[1]))
    assert torch.equal(caches[0].keys, caches[1].keys) and caches[0].offsets == caches[1].offsets


@pytest.mark.parametrize("norm", ["rms", "layer", None])
@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend, norm):
    dtype = torch.bfloat16 if backend == "cuda" else torch.float32
    q, k, v = make_segments(2, 3, [8], 64, dtype)[0]
    cache = HistoryCache(1, 2, 3, 64, 32, dtype)
    history_attention(q, k, v, cache, layer=0, backend="torch")
    memory = cache.keys, cache.values, cache.workspace, cache.positions
    weight, bias = torch.randn(64).to(dtype) if norm else None, torch.randn(64) if norm == "layer" else None
    norms = (norm, weight, None, 1e-6, norm, None, bias, 1e-6)
    inputs = (q, k, v, *memory, 0, 2, 1, 0.25, *norms, backend)
    torch.library.opcheck(torch.ops.ard.history_attention, inputs)


def test_autocast():
    q, k, v = (torch.randn(1, 2, 16, 16) for _ in range(3))
    cache = HistoryCache(1, 1, 2, 16, 16, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert history_attention(q, k, v, cache, layer=0).dtype == torch.bfloat16


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_routing_trains_and_samples_alike(mask, layout):
    routing = HistoryRouting(3, 2, *mask)
    cache = HistoryCache(2, 2, 3, 24, 48)
    axis = layout.index("t")
    q, k, v = (torch.randn(2, 3, 48, 24) for _ in range(3))
    if layout == "bthd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    segments = [[x.narrow(axis, t, 16) for x in (q, k, v)] for t in (0, 16, 32)]
    steps = [
        [routing.attention(layer, *own, segment_length=16, cache=cache, layout=layout) for layer in range(3)]
        for own in segments
    ]
    for layer, sampled in enumerate(zip(*steps, strict=True)):
        window, sink = mask if layer < 2 else (1, 0)
        trained = routing.attention(layer, q, k, v, segment_length=16, layout=layout)
        heads_first = [x.transpose(1, 2) if layout == "bthd" else x for x in (q, k, v)]
        expected = dense_reference(*heads_first, [16], window, sink)[0]
        expected = expected.transpose(1, 2) if layout == "bthd" else expected
        torch.testing.assert_close(trained, expected.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.cat(sampled, axis), trained, rtol=1e-5, atol=1e-6)
    assert cache.length == 48


def test_routing_rejects_bad_layers():
    with pytest.raises(ValueError, match="history_layers is 5; expected 0 to depth=4"):
        HistoryRouting(4, 5)
    with pytest.raises(ValueError, match="layer is 4; expected 0 to 3"):
        q = torch.randn(1, 1, 4, 8)
        HistoryRouting(4, 2).attention(4, q, q, q, segment_length=4)
    assert block_causal_attention is ard_kernels.block_causal_attention
