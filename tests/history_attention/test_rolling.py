"""Streams: the rolling cache against full recomputation, calls that keep nothing, a query for the sink, prefill."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from ard_kernels import HistoryCache, HistoryRouting, SegmentMask, history_attention, segment_attention
from ard_kernels.history_attention import places
from testing import plain
from testing.devices import GPU_BACKENDS, SIMULATED, on_devices
from testing.oracle import assert_close

FP32, BF16 = torch.float32, torch.bfloat16
EACH = on_devices(torch=[FP32], cpu=[FP32], triton=[FP32], cuda=[BF16])


def draw(shape, dtype, device):
    return torch.randn(shape, device=device).to(dtype)


def recomputed(q, past, window, sink):
    """(plain, fp64) of the last segment, whose (k, v) is past[-1]: attention over all that the mask lets it see."""
    s = len(past) - 1
    seen = [j for j in range(s + 1) if j < sink or j > s - window]
    k, v = (torch.cat([past[j][i] for j in seen], 2) for i in (0, 1))
    sees = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
    return [plain.segment_attention(*(x.to(wide) for x in (q, k, v)), sees)[0] for wide in (q.dtype, torch.float64)]


def stream(backend, device, dtype, *, segments, window, sink, H=2, H_kv=1, D=64, L=8, layers=2, first=None, tries=3):
    """`segments` segments: `tries` calls that keep nothing, one that does; all compared. Returns the cache."""
    roll = {"segment_length": L, "window": window, "sink": sink, "dtype": dtype, "device": device}
    cache = HistoryCache.rolling(layers, 1, H_kv, D, **roll)
    cache.keys.fill_(float("nan"))
    cache.values.fill_(float("nan"))
    memory, past = (cache.nbytes, cache.keys.data_ptr()), [[] for _ in range(layers)]
    for s in range(segments):
        length = first if s == 0 and first else L
        for commit in [False] * tries + [True]:
            for layer in range(layers):
                q = draw((1, H, length, D), dtype, device)
                k, v = draw((2, 1, H_kv, length, D), dtype, device)
                out = history_attention(q, k, v, cache, layer=layer, commit=commit, backend=backend)
                past[layer] = [*past[layer][:s], (k, v)]
                assert_close(out, *recomputed(q, past[layer], window, sink), label=f"segment {s}, commit {commit}")
        assert cache.segments == [s + 1] * layers and (cache.nbytes, cache.keys.data_ptr()) == memory
    return cache


@pytest.mark.parametrize(("backend", "device", "dtype"), EACH)
def test_a_stream(backend, device, dtype, poisoned):
    cache = stream(backend, device, dtype, segments=11, window=4, sink=1, tries=1)
    assert cache.length == cache.capacity == 5 * 8


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device", "dtype"), EACH)
def test_a_long_stream(backend, device, dtype):
    """Many turns of a ring of five slots, in the same memory."""
    simulated = SIMULATED and backend in GPU_BACKENDS
    segments, tries = (40, 1) if simulated else (200, 3)
    stream(backend, device, dtype, segments=segments, window=4, sink=1, layers=1, tries=tries)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("backend", "device", "dtype"), EACH)
def test_two_hundred_segments(backend, device, dtype):
    """The same, simulated kernels too, in tiles of another length."""
    stream(backend, device, dtype, segments=200, window=4, sink=1, layers=1, L=16)


@pytest.mark.parametrize(("backend", "device", "dtype"), EACH)
@pytest.mark.parametrize(("window", "sink", "first"), [(1, 0, None), (3, 0, 5), (2, 2, 3), (1, 3, None)])
def test_other_rings(backend, device, dtype, window, sink, first):
    """Itself alone; a first segment that is shorter, in the sink or not; two and three segments in the sink."""
    more = {"first": first, "H_kv": 2, "layers": 1, "tries": 1}
    stream(backend, device, dtype, segments=window + sink + 3, window=window, sink=sink, **more)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "device", "dtype"), on_devices(triton=[BF16], cuda=[BF16]))
def test_splits_of_a_ring(backend, device, dtype):
    """Keys shared among programs, in a ring that has turned; grouped heads."""
    L = 100 if SIMULATED else 1000
    stream(backend, device, dtype, segments=6, window=3, sink=1, L=L, layers=1, tries=0, H=2, H_kv=1, D=72)


def rotated(x, position, base=100.0):
    """Rotary embedding of (..., L, D): token t of a segment at `position` + t / L, pairs (i, i + D / 2)."""
    L, half = x.shape[-2], x.shape[-1] // 2
    at = position + torch.arange(L, device=x.device, dtype=torch.float64) / L
    angle = at[:, None] * base ** -(torch.arange(half, device=x.device, dtype=torch.float64) / half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


@pytest.mark.parametrize("rolls", [True, False])
@pytest.mark.parametrize(
    ("backend", "device", "dtype", "tolerance"),
    on_devices(torch=[(FP32, 1e-5)], cpu=[(FP32, 1e-5)], triton=[(FP32, 1e-5)], cuda=[(BF16, 2e-2)]),
)
def test_a_sink_query_is_the_rotation_of_every_key_anew(backend, device, dtype, tolerance, rolls):
    """The sink stays `window` segments before the own one. Afresh: all keys turned to where they stand by then."""
    window, sink, L, D, wide = 3, 1, 8, 64, torch.float64
    roll = {"segment_length": L, "window": window, "sink": sink, "dtype": dtype, "device": device}
    grows = HistoryCache(1, 1, 1, D, 9 * L, dtype, device)
    cache, mask = (HistoryCache.rolling(1, 1, 1, D, **roll), {}) if rolls else (grows, {"window": window, "sink": sink})
    keys, values = [], []
    for s in range(9):
        q = draw((1, 2, L, D), FP32, device).double()
        k, v = draw((2, 1, 1, L, D), FP32, device).double()
        keys.append(k)
        values.append(v)
        seen = [j for j in range(s + 1) if j < sink or j > s - window]
        stands = {j: place for place, j in enumerate(seen)}  # positions 0 .. of what is left
        fresh = torch.cat([rotated(keys[j], stands[j]) for j in seen], 2)
        sees = torch.ones(L, fresh.shape[2], dtype=torch.bool, device=device)
        held = torch.cat([values[j] for j in seen], 2)
        expected, _ = plain.segment_attention(rotated(q, stands[s]), fresh, held, sees)
        inputs = rotated(q, s).to(dtype), rotated(k, s).to(dtype), v.to(dtype)
        q_sink = rotated(q, stands[s]).to(dtype)  # the sink's key, at its absolute position 0, is as far as it stands
        out = history_attention(*inputs, cache, layer=0, q_sink=q_sink, backend=backend, **mask)
        assert (out.to(wide) - expected).norm() <= tolerance * expected.norm()
        if s > window:
            shown = {"commit": False, "backend": backend, **mask}
            cache.rewind()
            without = history_attention(*inputs, cache, layer=0, **shown)
            cache_moved = (without.to(wide) - expected).norm() > 3 * tolerance * expected.norm()
            assert cache_moved, "without it the sink is further away"
            history_attention(*inputs, cache, layer=0, q_sink=q_sink, backend=backend, **mask)


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "rolls", "sunk"),
    on_devices(
        torch=[(FP32, rolls, sunk) for rolls in (True, False) for sunk in (True, False)],
        cpu=[(FP32, rolls, sunk) for rolls in (True, False) for sunk in (True, False)],
        triton=[(FP32, True, True), (FP32, False, False)],
        cuda=[(BF16, True, False), (BF16, False, True)],
    ),
)
def test_prefill_is_its_segments_one_by_one(backend, device, dtype, rolls, sunk):
    """At the start and amid a stream, more segments than a ring has slots, kept and not kept."""
    window, sink, L, D, lengths = 2, 1, 8, 64, [2, 5, 1, 3]
    caches = []
    for _ in range(2):
        roll = {"segment_length": L, "window": window, "sink": sink, "dtype": dtype, "device": device}
        grows = HistoryCache(1, 1, 2, D, 12 * L, dtype, device)
        caches.append(HistoryCache.rolling(1, 1, 2, D, **roll) if rolls else grows)
    how = {"layer": 0, "backend": backend, "window": window, "sink": sink, "layout": "bthd"}
    for n in lengths:
        q, k, v, other = draw((4, 1, n * L, 2, D), dtype, device)
        more = {"q_sink": other} if sunk else {}
        tried = history_attention(q, k, v, caches[0], segment_length=L, commit=False, **how, **more)
        got = history_attention(q, k, v, caches[0], segment_length=[L] * n, **how, **more)
        assert torch.equal(tried, got)
        parts = []
        for i in range(n):
            more = {"q_sink": other[:, i * L :][:, :L]} if sunk else {}
            parts.append(history_attention(*(x[:, i * L :][:, :L] for x in (q, k, v)), caches[1], **how, **more))
        expected = torch.cat(parts, 1)
        assert (got - expected).norm() <= 8 * torch.finfo(dtype).eps * expected.norm()
        assert caches[0].segments == caches[1].segments and caches[0].length == caches[1].length
        held = caches[0].length
        assert torch.equal(caches[0].keys[:, :, :, :held], caches[1].keys[:, :, :, :held])
        assert torch.equal(caches[0].values[:, :, :, :held], caches[1].values[:, :, :, :held])


@pytest.mark.parametrize(("backend", "device", "dtype"), on_devices(torch=[torch.float64], cuda=[BF16]))
def test_gradients_of_a_stream(backend, device, dtype):
    """Of the own segment, kept or not, with a query for the sink; the past is a constant."""
    L, D = 8, 64
    cache = HistoryCache.rolling(1, 1, 1, D, segment_length=L, window=2, sink=1, dtype=dtype, device=device)
    past, tolerance = [], 1e-12 if dtype == torch.float64 else 2e-2
    for s in range(5):
        q, q_sink = (draw((1, 2, L, D), dtype, device).requires_grad_() for _ in range(2))
        k, v = (draw((1, 1, L, D), dtype, device).requires_grad_() for _ in range(2))
        past.append((k.detach(), v.detach()))
        for commit in (False, True):
            out = history_attention(q, k, v, cache, layer=0, commit=commit, q_sink=q_sink, backend=backend)
            got = torch.autograd.grad(out.double().square().sum(), (q, q_sink, k, v), allow_unused=s == 0)
        inputs = [x.detach().double().requires_grad_() for x in (q, q_sink, k, v)]
        rest = [j for j in range(s) if j == s - 1 and j > 0]
        keys = [past[j][0].double() for j in rest], [past[j][1].double() for j in rest]
        scores = [inputs[0] @ torch.cat([*keys[0], inputs[2]], 2).mT]
        values = [torch.cat([*keys[1], inputs[3]], 2)]
        if s:
            scores.insert(0, inputs[1] @ past[0][0].double().mT)
            values.insert(0, past[0][1].double())
        exact = (torch.cat(scores, -1) * D**-0.5).softmax(-1) @ torch.cat(values, 2)
        expected = torch.autograd.grad(exact.square().sum(), inputs, allow_unused=s == 0)
        for a, b in zip(got, expected, strict=True):
            assert (a is None and b is None) or (a.double() - b).norm() <= tolerance * b.norm()
    assert cache.segments == [5] and not cache.keys.requires_grad


def test_one_graph_for_64_segments(device):
    """Three calls that keep nothing, one that keeps: two graphs, whatever slot they meet. The last is a shorter one."""
    roll = {"segment_length": 4, "window": 4, "sink": 1, "device": device}
    caches, counter = [HistoryCache.rolling(2, 1, 2, 16, **roll) for _ in range(2)], CompileCounter()

    def step(q, k, v, cache, commit):
        return sum(history_attention(q, k, v, cache, layer=i, commit=commit) for i in range(2))

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    with torch.no_grad():
        for _ in range(64):
            for commit in (False, False, False, True):
                q, k, v = torch.randn(3, 1, 2, 4, 16, device=device)
                assert torch.equal(compiled(q, k, v, caches[0], commit), step(q, k, v, caches[1], commit))
    assert counter.frame_count == 2 and caches[0].segments == [64, 64]


def two_steps(device, **more):
    cache = HistoryCache.rolling(2, 3, 2, 16, segment_length=4, window=2, sink=1, device=device, **more)
    for _ in range(5):
        for layer in range(2):
            history_attention(*torch.randn(3, 3, 2, 4, 16, device=device), cache, layer=layer)
    return cache


def test_select(device):
    cache = two_steps(device)
    keys, values = cache.keys.clone(), cache.values.clone()
    cache.select([2, 2, 0])
    assert torch.equal(cache.keys, keys[:, [2, 2, 0]]) and torch.equal(cache.values, values[:, [2, 2, 0]])
    cache.select(torch.tensor([2, 1, 0], device=device))
    assert torch.equal(cache.keys, keys[:, [0, 2, 2]])
    for index, message in (([0, 1], "3 integers"), ([0, 1, 3], "from 0 to 2"), ([0.0] * 3, "expected a tensor")):
        with pytest.raises(ValueError, match=rf"HistoryCache\.select: index_B .*{message}"):
            cache.select(index)
    assert torch.equal(cache.keys, keys[:, [0, 2, 2]])


def test_state_goes_on_elsewhere(device):
    """A saved cache goes on as the one it was saved from; so does one moved to another dtype."""
    cache, q = two_steps(device), torch.randn(3, 2, 4, 16, device=device)
    state = cache.state_dict()
    others = [two_steps(device), cache.to(dtype=torch.float64)]
    others[0].load_state_dict(state)
    assert cache.to(device, torch.float32) is cache and others[1].window == 2 and others[1].dtype == torch.float64
    assert cache.to("meta").segments == [5, 5]
    for other in others:
        got = history_attention(*[q.to(other.dtype)] * 3, other, layer=0)
        torch.testing.assert_close(got.float(), history_attention(q, q, q, cache, layer=0, commit=False))
    grows = HistoryCache(1, 3, 2, 16, 16, device=device)
    history_attention(q, q, q, grows, layer=0)
    assert grows.state_dict()["keys"].shape == (1, 3, 2, 4, 16), "what is held and no more"
    before = others[0].state_dict()
    damaged = state["positions"].clone()
    damaged[4] = -1
    spoilt = {
        "positions are of another cache": grows.state_dict(),
        r"keys has shape \(2, 3, 2, 8, 16\); expected \(2, 3, 2, 12, 16\)": {
            **state,
            "keys": state["keys"][:, :, :, :8],
        },
        "positions is damaged": {**state, "positions": damaged},
        "expected what state_dict": {"keys": state["keys"]},
    }
    for message, bad in spoilt.items():
        with pytest.raises(ValueError, match=rf"load_state_dict: .*{message}"):
            others[0].load_state_dict(bad)
    assert all(torch.equal(x, before[name]) for name, x in others[0].state_dict().items())


def test_an_unfinished_step_is_rewound(device):
    """A step that broke off is found by the next one; rewind() forgets it, in every layer."""
    cache, q = two_steps(device), torch.randn(3, 2, 4, 16, device=device)
    whole = two_steps(device)
    whole.load_state_dict(cache.state_dict())
    history_attention(q, q, q, cache, layer=0)
    for commit in (False, True):
        with pytest.raises(
            ValueError, match=r"layer 0 of the cache holds 6 segments, but layer 1 holds 5.*rewind\(1\)"
        ):
            history_attention(q, q, q, cache, layer=0, commit=commit)
    cache.rewind()
    assert cache.segments == [5, 5]
    for layer in range(2):
        a, b = (history_attention(q, q, q, each, layer=layer) for each in (cache, whole))
        assert torch.equal(a, b)
    history_attention(q, q, q, cache, layer=0, commit=False)  # takes the slot of what a rewind would show again
    with pytest.raises(ValueError, match="has overwritten; expected a rewind of one segment"):
        cache.rewind()
    with pytest.raises(ValueError, match="segments is 7; expected at most the 6 taken"):
        cache.rewind(7)
    assert cache.segments == [6, 6]


@pytest.mark.parametrize("how", [{}, {"segment_length": 4}, {"q_sink": True}])
def test_a_call_that_fails_half_way_may_have_overwritten(monkeypatch, device, how):
    """It has taken nothing, but the slot that it began to write is lost: no rewind shows it again."""
    cache, q = two_steps(device), torch.randn(3, 2, 8 if "segment_length" in how else 4, 16, device=device)
    how = {name: q if name == "q_sink" else value for name, value in how.items()}

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(places, "advance", fail)  # the last thing that a call does
        history_attention(q, q, q, cache, layer=0, **how)
    assert cache.segments == [5, 5]
    with pytest.raises(ValueError, match="has overwritten"):
        cache.rewind()
    for layer in range(2):
        history_attention(q, q, q, cache, layer=layer, **how)
    assert cache.segments == [5 + q.shape[2] // 4] * 2


def test_what_was_written_before_a_rewind_does_not_count(device):
    """All forgotten, the ring is filled anew: what it holds may be rewound."""
    cache, q = two_steps(device), torch.randn(3, 2, 4, 16, device=device)
    cache.rewind(5)
    for _ in range(3):
        for layer in range(2):
            history_attention(q, q, q, cache, layer=layer)
    cache.rewind()
    assert cache.segments == [2, 2]


def test_what_a_rolling_cache_refuses(device):
    cache, q = two_steps(device), torch.randn(3, 2, 4, 16, device=device)
    keys = cache.keys.clone()
    for arguments, message in (
        ({"window": 3}, "window is 3 and sink 1; expected the rolling cache's, 2 and 1"),
        ({"sink": 0}, "window is 2 and sink 0; expected"),
        ({"segment_length": 2}, "segment 5 has 2 tokens; expected the cache's 4"),
    ):
        with pytest.raises(ValueError, match=message):
            history_attention(q, q, q, cache, layer=0, **arguments)
    with pytest.raises(ValueError, match="segment 5 has 3 tokens; expected the cache's 4"):
        history_attention(*[q[:, :, :3]] * 3, cache, layer=0)
    assert torch.equal(cache.keys, keys) and cache.segments == [5, 5]
    for arguments, message in (({"window": None}, "window is None"), ({"segment_length": 0}, "segment_length is 0")):
        with pytest.raises(ValueError, match=rf"HistoryCache\.rolling: {message}; expected an int >= 1"):
            HistoryCache.rolling(1, 1, 1, 8, **{"segment_length": 4, "window": 2, **arguments})


def test_what_is_seen_is_the_mask(device):
    """A prefill of all segments is `segment_attention` under the block-causal mask."""
    q, k, v = torch.randn(3, 1, 2, 6 * 4, 16, device=device)
    cache = HistoryCache.rolling(1, 1, 2, 16, segment_length=4, window=2, sink=1, device=device)
    got = history_attention(q, k, v, cache, layer=0, segment_length=4)
    torch.testing.assert_close(got, segment_attention(q, k, v, SegmentMask.block_causal(6, 2, 1), segment_length=4))


def test_routing_takes_the_cache_as_it_is(device):
    """Several segments in one call are several, and a rolling cache of another mask is refused."""
    q, k, v = torch.randn(3, 1, 2, 16, 16, device=device)
    routing = HistoryRouting(2, 1, window=2)
    roll = {"segment_length": 4, "device": device}
    for packed in (False, True):
        cache = HistoryCache.rolling(1, 1, 2, 16, window=2, **roll)
        for layer in range(2):
            if packed:
                qkv = torch.stack([q, k, v], 1).permute(0, 3, 1, 2, 4)
                got, expected = (
                    routing.attention_packed(layer, qkv, segment_length=4, cache=each) for each in (cache, None)
                )
            else:
                got, expected = (
                    routing.attention(layer, q, k, v, segment_length=4, cache=each) for each in (cache, None)
                )
            torch.testing.assert_close(got, expected)
        assert cache.segments == [4]
    with pytest.raises(ValueError, match=r"window and sink are \(2, 0\); expected the rolling cache's \(3, 0\)"):
        other = HistoryCache.rolling(1, 1, 2, 16, window=3, **roll)
        routing.attention(0, q[:, :, :4], k[:, :, :4], v[:, :, :4], segment_length=4, cache=other)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("place", range(4))
def test_inputs_in_the_memory_of_the_cache_are_refused(place, gradient, device):
    """It is written before all of it is read."""
    cache = two_steps(device)
    keys = cache.keys.clone()
    inputs = list(torch.randn(4, 3, 2, 4, 16, device=device))
    inputs[place] = cache.keys[1, :, :, 4:8]
    if gradient:
        inputs[place - 1].requires_grad_()
    q, k, v, q_sink = inputs
    with pytest.raises(ValueError, match="an input is memory of the cache"):
        history_attention(q, k, v, cache, layer=0, q_sink=q_sink)
    assert torch.equal(cache.keys, keys)


def test_transforms_and_tangents_are_refused(device):
    cache, q = two_steps(device), torch.randn(3, 2, 8, 16, device=device)
    prefill = {"layer": 0, "segment_length": 4}
    with pytest.raises(NotImplementedError, match=r"does not run under torch\.func"):
        torch.func.grad(lambda q: history_attention(q, q, q, cache, **prefill).sum())(q)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        with pytest.raises(NotImplementedError, match="has no forward-mode derivative"):
            history_attention(q, q, dual, cache, **prefill)
    assert cache.segments == [5, 5]
