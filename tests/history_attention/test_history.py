"""Cached sampling against the dense reference: values, ragged steps, contract, compile, opcheck, FLOPs."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import ard_kernels
from ard_kernels import (
    HistoryCache,
    HistoryRouting,
    block_causal_attention,
    history_attention,
)
from ard_kernels.block_causal_attention.reference import block_causal_attention as dense_reference
from ard_kernels.block_causal_attention.spec import useful_pairs
from ard_kernels.common import extension
from ard_kernels.history_attention import cuda, splits
from ard_kernels.history_attention.reference import history_attention as reference
from ard_kernels.history_attention.splits import LEAST_TILES, share_tiles, split_count
from testing import plain
from testing.devices import SIMULATED, on_devices, simulated_slow
from testing.drawing import TIERS
from testing.oracle import assert_close

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES, HALVES = (FP32, BF16, FP16), (BF16, FP16)
# The tensor cores of "cuda" would round fp32.
WITH_DTYPE = on_devices(torch=[FP32], cpu=[FP32], triton=[FP32], cuda=[BF16])
MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "window2_sink1": (2, 1)}


def make_segments(B, H, lengths, D, dtype=torch.float32, packed=True, device="cpu"):
    segments = []
    for length in lengths:
        qkv = torch.randn(B, length, 3, H, D, device=device).to(dtype)
        parts = (x.transpose(1, 2) for x in qkv.unbind(2))
        segments.append(tuple(parts if packed else (x.contiguous() for x in parts)))
    return segments


def check(backend, device, lengths, mask, B=1, H=2, D=72, dtype=FP32, packed=True):
    segments = make_segments(B, H, lengths, D, dtype, packed, device)
    cache = HistoryCache(1, B, H, D, sum(lengths), dtype, device)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    how = {"layer": 0, "window": mask[0], "sink": mask[1], "backend": backend}
    out = [history_attention(*segment, cache, **how) for segment in segments]
    expected = [reference(segments[: step + 1], *mask) for step in range(len(segments))]
    assert_close(torch.cat(out, 2), plain.history_attention(segments, *mask), torch.cat(expected, 2))
    assert torch.equal(cache.keys[0], torch.cat([k for _, k, _ in segments], 2))
    assert torch.equal(cache.values[0], torch.cat([v for _, _, v in segments], 2))
    assert cache.segments == [len(lengths)] and cache.length == sum(lengths)


@pytest.mark.parametrize(
    ("backend", "device", "dtype"), on_devices(torch=DTYPES, cpu=DTYPES, triton=DTYPES, cuda=HALVES)
)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_steps_equal_the_dense_reference(backend, device, mask, dtype, poisoned):
    check(backend, device, [16, 16, 16, 16], mask, dtype=dtype)


@pytest.fixture
def split_counts(monkeypatch):
    """What split_count answers, call by call."""
    counts, count = [], splits.split_count
    monkeypatch.setattr(splits, "split_count", lambda *args: counts.append(count(*args)) or counts[-1])
    return counts


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "mask"),
    on_devices(triton=[(BF16, "M1"), (FP32, "M3"), (BF16, "M4")]),
)
def test_split_keys(backend, device, dtype, mask, poisoned, split_counts):
    """Few rows, many keys: several programs share them, but for M1, where a segment sees itself alone."""
    check(backend, device, [200 if SIMULATED else 2000, 33, 32, 30, 7], MASKS[mask], 1, 1, 72, dtype)
    assert (max(split_counts[1:]) > 1) == (mask != "M1")
    assert not SIMULATED or mask != "M4" or split_counts == [1, 2, 4, 4, 4]  # of a GPU with 4 multiprocessors


@pytest.mark.parametrize(("backend", "device", "dtype"), on_devices(cuda=HALVES))
@pytest.mark.parametrize(
    ("mask", "counts"),
    [("M1", [2, 2, 1, 1]), ("M2", [2, 2, 2, 1]), ("M3", [2, 2, 3, 3]), ("M4", [2, 2, 4, 4])],
)
def test_split_keys_of_one_tile(backend, device, mask, counts, dtype, poisoned, split_counts, monkeypatch):
    """Up to one split per key tile, partly filled ones among them; 4 multiprocessors."""
    monkeypatch.setattr(splits, "LEAST_TILES", 1)
    monkeypatch.setattr(cuda, "multiprocessors", lambda device: 4)
    check(backend, device, [100, 70, 30, 7], MASKS[mask], 1, 1, 72, dtype)
    assert split_counts == counts


@given(st.integers(1, 500), st.integers(1, 500), st.integers(1, 160))
def test_splits_fit_the_workspace(row_tiles, column_tiles, multiprocessors):
    splits = split_count(row_tiles, column_tiles, multiprocessors)
    assert splits >= 1
    if splits > 1:
        assert splits * row_tiles <= multiprocessors and column_tiles >= splits * LEAST_TILES
    shares, tiles = share_tiles(row_tiles, column_tiles, multiprocessors)
    assert shares <= splits and (shares - 1) * tiles < column_tiles <= shares * tiles, "no share is empty"


# What a drawn case of each backend may have, and how many are drawn in the fast and the exhaustive tests.
DRAWN = {
    "torch": {"longest": 20, "sizes": 2, "dims": [8, 24, 72], "dtypes": DTYPES, "examples": (20, 100)},
    "cpu": {"longest": 20, "sizes": 2, "dims": [8, 24, 72], "dtypes": DTYPES, "examples": (20, 100)},
    "triton": {"longest": 20, "sizes": 2, "dims": [8, 24, 72], "dtypes": DTYPES, "examples": (10, 25)},
    "cuda": {"longest": 70, "sizes": 1, "dims": [64, 72, 128], "dtypes": HALVES, "examples": (10, 25)},
}


@pytest.mark.parametrize(("backend", "device"), on_devices(*DRAWN))
@TIERS
def test_drawn_cases(backend, device, tier):
    most = DRAWN[backend]

    @settings(max_examples=most["examples"][tier])
    @given(
        lengths=st.lists(st.integers(1, most["longest"]), min_size=1, max_size=5),
        mask=st.tuples(st.one_of(st.none(), st.integers(1, 5)), st.integers(0, 4)),
        shape=st.tuples(st.integers(1, most["sizes"]), st.integers(1, most["sizes"]), st.sampled_from(most["dims"])),
        dtype=st.sampled_from(most["dtypes"]),
        packed=st.booleans(),
        seed=st.integers(0, 2**32),
    )
    def draw(lengths, mask, shape, dtype, packed, seed):
        if backend == "cuda" and SIMULATED:
            extension.emulated.set_seed(seed)
        check(backend, device, lengths, mask, *shape, dtype, packed)

    draw()


@pytest.mark.parametrize(("backend", "device", "dtype"), WITH_DTYPE)
def test_bit_equal_over_threads_and_runs(backend, device, dtype, thread_counts):
    segments = make_segments(2, 2, [32, 32], 72, dtype, device=device)

    def run():
        cache = HistoryCache(1, 2, 2, 72, 64, dtype, device)
        return [history_attention(*s, cache, layer=0, backend=backend) for s in segments] + [cache.keys, cache.values]

    first = run()
    for count in thread_counts():
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


@pytest.mark.parametrize(("backend", "device", "dtype"), on_devices(cpu=[FP32, BF16]))
def test_heads_that_threads_share(backend, device, dtype, poisoned, thread_counts):
    """Few heads of many queries are cut between threads, which all read the keys that were just appended."""
    for _ in thread_counts():
        check(backend, device, [1100, 1030], MASKS["M4"], dtype=dtype, H=1)


@pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton", "cuda"))
def test_offsets_beyond_int32(backend, device):
    """Two samples more than 2**31 elements apart; the memory between them is reserved, never touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((2, 3, 4, 64), (2**31 + 64, 256, 64, 1))
    near = torch.randn(2, 3, 4, 64, device=device).bfloat16()
    far.copy_(near)
    outputs = []
    for x in (far, near):
        cache = HistoryCache(1, 2, 3, 64, 4, torch.bfloat16, device)
        outputs.append((history_attention(x, x, x, cache, layer=0, backend=backend), cache.keys, cache.values))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    assert torch.equal(outputs[0][0], block_causal_attention(far, far, far, segment_length=4, backend=backend))


BAD = {
    "layer": (lambda q: (q, q, q), {"layer": 2}, "layer is 2; expected 0 to 1"),
    "heads": (lambda q: (q[:, :1],) * 3, {}, r"k has \(batch, heads, head_dim\) \(1, 1, 16\); expected the cache's"),
    "dtype": (lambda q: (q.half(),) * 3, {}, "k has dtype torch.float16; expected the cache's torch.float32"),
    "empty": (lambda q: (q[:, :, :0],) * 3, {}, "k has 0 tokens; expected a segment of at least 1"),
    "window": (lambda q: (q, q, q), {"window": 0}, "window is 0"),
    "shape": (lambda q: (q, q[:, :, :4], q), {}, "k has shape"),
    "device": (lambda q: (q.to("meta"),) * 3, {}, "k is on meta; expected the cache's (cpu|cuda)"),
    "backend": (lambda q: (q, q, q), {"backend": "tpu"}, "backend 'tpu' .* unknown backend"),
    "q_sink": (
        lambda q: (q, q, q),
        {"q_sink": torch.ones(1, 2, 16, 8)},
        "q_sink is a float32 tensor .* expected it like q",
    ),
    "no sink": (lambda q: (q, q, q), {"q_sink": torch.ones(1, 2, 16, 16)}, "q_sink is .*expected"),
    "commit": (lambda q: (q, q, q), {"commit": 1}, "commit is 1; expected True or False"),
    "segments": (
        lambda q: (q, q, q),
        {"segment_length": 5},
        "q has 16 tokens; expected a multiple of segment_length=5",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_leaves_the_cache_alone(make, arguments, message, device):
    cache = HistoryCache(2, 1, 2, 16, 64, device=device)
    cache.keys.zero_()
    q = torch.randn(1, 2, 16, 16, device=device)
    with pytest.raises(ValueError, match=f"history_attention: .*{message}"):
        history_attention(*make(q), cache, **{"layer": 0, **arguments})
    assert cache.length == 0 and not cache.keys.any()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_flops_of_all_steps_equal_the_mask(mask, device):
    cache = HistoryCache(1, 2, 3, 24, 64, device=device)
    with FlopCounterMode(display=False) as counter:
        for q, k, v in make_segments(2, 3, [16] * 4, 24, device=device):
            history_attention(q, k, v, cache, layer=0, window=mask[0], sink=mask[1])
    assert counter.get_total_flops() == 4 * 2 * 3 * 24 * useful_pairs([16], 64, *mask)


@pytest.mark.parametrize(("backend", "device", "dtype"), WITH_DTYPE)
def test_compiles_to_one_graph(backend, device, dtype):
    segments = make_segments(1, 2, [16] * 4, 64, dtype, device=device)
    caches = [HistoryCache(1, 1, 2, 64, 64, dtype, device) for _ in range(2)]

    def step(q, k, v, cache):
        return history_attention(q, k, v, cache, layer=0, window=2, backend=backend).sin()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for q, k, v in segments:
            torch.testing.assert_close(compiled(q, k, v, caches[0]), step(q, k, v, caches[1]))
    assert torch.equal(caches[0].keys, caches[1].keys) and caches[0].segments == caches[1].segments


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "sunk"),
    simulated_slow(
        on_devices(
            torch=[(torch.float32, False)],
            cpu=[(torch.bfloat16, True)],
            triton=[(torch.float32, True)],
            cuda=[(torch.bfloat16, False)],
        )
    ),
)
def test_opcheck(backend, device, dtype, sunk):
    q, k, v = make_segments(2, 3, [8], 64, dtype, device=device)[0]
    cache = HistoryCache(1, 2, 3, 64, 32, dtype, device)
    history_attention(q, k, v, cache, layer=0, backend="torch")
    memory = cache.keys, cache.values, cache.workspace, cache.positions
    inputs = (q, k, v, q.clone() if sunk else None, *memory, 0, 2, 1, 0.25, sunk, backend)
    torch.library.opcheck(torch.ops.ard.history_attention, inputs)


@pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton", "cuda"))
def test_autocast(backend, device):
    q, k, v = (torch.randn(1, 2, 16, 64, device=device) for _ in range(3))
    cache = HistoryCache(1, 1, 2, 64, 16, torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        assert history_attention(q, k, v, cache, layer=0, backend=backend).dtype == torch.bfloat16


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
def test_routing_trains_and_samples_alike(mask, layout, device):
    routing = HistoryRouting(3, 2, *mask)
    cache = HistoryCache(2, 2, 3, 24, 48, device=device)
    axis = layout.index("t")
    q, k, v = (torch.randn(2, 3, 48, 24, device=device) for _ in range(3))
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


def test_routing_of_one_projection(device):
    routing, qkv = HistoryRouting(1, 1), torch.randn(2, 32, 3, 3, 24, device=device)
    caches = [HistoryCache(1, 2, 3, 24, 32, device=device) for _ in range(2)]
    for own in qkv.split(16, 1):
        packed = routing.attention_packed(0, own, segment_length=16, cache=caches[0])
        parts = routing.attention(0, *own.unbind(2), segment_length=16, cache=caches[1], layout="bthd")
        assert packed.shape == (2, 16, 3, 24) and torch.equal(packed, parts)
    assert torch.equal(caches[0].keys, caches[1].keys) and torch.equal(caches[0].values, caches[1].values)
    with pytest.raises(ValueError, match=r"qkv has shape \(2, 32, 3, 72\); expected 5 dims"):
        routing.attention_packed(0, qkv.flatten(3), segment_length=16, cache=caches[0])


def test_routing_rejects_bad_layers():
    with pytest.raises(ValueError, match="history_layers is 5; expected 0 to depth=4"):
        HistoryRouting(4, 5)
    with pytest.raises(ValueError, match="layer is 4; expected 0 to 3"):
        q = torch.randn(1, 1, 4, 8)
        HistoryRouting(4, 2).attention(4, q, q, q, segment_length=4)
    assert block_causal_attention is ard_kernels.block_causal_attention
