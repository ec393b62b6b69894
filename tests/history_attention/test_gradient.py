"""Self-rollout training: the own segment's q, k, v have gradients, the past in the cache is a constant."""

import pytest
import torch
import torch.utils.checkpoint

from ard_kernels import HistoryCache, history_attention
from ard_kernels.history_attention.reference import history_attention as reference
from testing.devices import on_devices

FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16
MASKS = {"M1": (1, 0), "M2": (2, 0), "M3": (1, 1), "M4": (None, 0), "window2_sink1": (2, 1)}
SERVED = on_devices(torch=[FP32], cpu=[FP32], triton=[FP32], cuda=[BF16])


def assert_near(got, expected, tolerance):
    assert (got.double() - expected.double()).norm() <= tolerance * expected.double().norm()


class Model(torch.nn.Module):
    """Two layers of nothing but attention; in a rollout each segment starts from the output of the one before."""

    def __init__(self, heads, head_dim, dtype, device):
        super().__init__()
        self.heads, width = heads, heads * head_dim
        weights = torch.randn(2, width, 3 * width, dtype=FP64, device=device) * width**-0.5
        self.weights = torch.nn.Parameter(weights.to(dtype))

    def rollout(self, x, lengths, attend):
        """Output of each segment; attend(layer, q, k, v), layout "bhtd"."""
        outputs = []
        for length in lengths:
            h = x[:, :length]
            for layer in range(2):
                q, k, v = (h @ self.weights[layer]).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
                h = h + attend(layer, q, k, v).transpose(1, 2).flatten(2)
            outputs.append(h)
            x = x + h.detach().mean()
        return outputs


@pytest.mark.parametrize(
    ("backend", "device", "dtype", "tolerance", "mask"),
    on_devices(
        torch=[(dtype, tolerance, mask) for dtype, tolerance in ((FP32, 1e-6), (FP64, 1e-12)) for mask in MASKS],
        cpu=[(FP32, 1e-6, mask) for mask in MASKS],
        triton=[(FP32, 1e-6, "window2_sink1")],
        cuda=[(BF16, 2e-2, "window2_sink1"), (BF16, 2e-2, "M4")],
    ),
)
def test_a_rollout_has_the_gradients_of_the_uncached_computation(backend, device, dtype, tolerance, mask):
    lengths, D = [6, 6, 3, 6, 6], 64 if backend == "cuda" else 16
    window, sink = MASKS[mask]
    model = Model(2, D, dtype, device)
    exact = Model(2, D, FP64, device)
    exact.weights.data.copy_(model.weights.data)
    x = torch.randn(2, max(lengths), 2 * D, dtype=dtype, device=device)
    cache, past = HistoryCache(2, 2, 2, D, sum(lengths), dtype, device), ([], [])

    def cached(layer, q, k, v):
        return history_attention(q, k, v, cache, layer=layer, window=window, sink=sink, backend=backend)

    def uncached(layer, q, k, v):
        segments = [*past[layer], (q, k, v)]
        past[layer].append((q.detach(), k.detach(), v.detach()))
        return reference(segments, window, sink)

    results = model.rollout(x, lengths, cached), exact.rollout(x.double(), lengths, uncached)
    for got, expected in zip(*results, strict=True):
        assert_near(got, expected, tolerance)
    grads = [
        torch.autograd.grad(sum(out.double().square().mean() for out in outs), each.weights)[0].double()
        for outs, each in zip(results, (model, exact), strict=True)
    ]
    assert_near(*grads, tolerance)
    assert cache.length == sum(lengths)
    for layer in range(2):
        assert_near(cache.keys[layer], torch.cat([k for _, k, _ in past[layer]], 2), tolerance)


@pytest.mark.parametrize("layout", ["bhtd", "bthd"])
@pytest.mark.parametrize(("backend", "device", "dtype"), SERVED)
def test_a_call_with_a_gradient_is_the_call_without(backend, device, dtype, layout):
    """Outputs, what the cache holds, and where it stands."""
    how = {"layer": 0, "window": 2, "sink": 1, "backend": backend, "layout": layout}
    caches = [HistoryCache(1, 1, 2, 64, 40, dtype, device) for _ in range(2)]
    for length in (8, 12, 8, 12):
        shape = (1, 2, length, 64) if layout == "bhtd" else (1, length, 2, 64)
        q, k, v = (torch.randn(shape, device=device).to(dtype) for _ in range(3))
        with torch.no_grad():
            expected = history_attention(q, k, v, caches[0], **how)
        got = history_attention(q.requires_grad_(), k, v, caches[1], **how)
        assert_near(got, expected, 4 * torch.finfo(dtype).eps)
        assert got.requires_grad and got.shape == expected.shape
    assert_near(caches[1].keys, caches[0].keys, 4 * torch.finfo(dtype).eps)
    assert torch.equal(caches[1].values, caches[0].values) and caches[1].segments == caches[0].segments


@pytest.mark.parametrize(("backend", "device", "dtype"), SERVED)
def test_the_cache_may_change_before_the_gradient_is_asked_for(backend, device, dtype):
    cache = HistoryCache(1, 1, 1, 64, 24, dtype, device)
    inputs = [torch.randn(1, 1, 8, 64, device=device).to(dtype) for _ in range(6)]

    def step(q, k, v):
        return history_attention(q, k, v, cache, layer=0, backend=backend)

    with torch.no_grad():
        step(*inputs[:3])
    leaves = [x.requires_grad_() for x in inputs[3:]]
    out = step(*leaves)
    expected = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
    cache.reset()
    with torch.no_grad():
        for _ in range(3):
            step(*(torch.randn_like(x) for x in leaves))
    assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(out.sum(), leaves), expected, strict=True))


def test_a_full_cache_and_a_layer_left_behind_keep_what_they_have(device):
    cache = HistoryCache(2, 1, 1, 8, 8, device=device)
    q = torch.randn(1, 1, 8, 8, device=device, requires_grad=True)
    history_attention(q, q, q, cache, layer=0)
    keys = cache.keys.clone()
    with pytest.raises(ValueError, match="layer 0 of the cache holds 1 segments, but layer 1 holds 0"):
        history_attention(q, q, q, cache, layer=0)
    history_attention(q, q, q, cache, layer=1)
    with pytest.raises(ValueError, match="expected room for 8 more"):
        history_attention(q, q, q, cache, layer=0)
    assert torch.equal(cache.keys[0], keys[0]) and cache.length == 8


def test_inside_a_compiled_function(device):
    """Not captured: the graph breaks around it, and fullgraph=True says so."""
    caches = [HistoryCache(1, 1, 2, 16, 24, device=device) for _ in range(2)]

    def step(x, cache):
        return history_attention(x * 2, x, x, cache, layer=0).sin()

    compiled = torch.compile(step, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(1, 2, 8, 16, device=device, requires_grad=True)
        pair = compiled(x, caches[0]), step(x, caches[1])
        torch.testing.assert_close(*pair)
        torch.testing.assert_close(*(torch.autograd.grad(out.sum(), x)[0] for out in pair))
    assert caches[0].length == caches[1].length == 24
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(lambda x: step(x, caches[0]), backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("learns", ["attention", "what_follows"])
def test_checkpointing_is_refused(device, reentrant, learns):
    """It calls a function again in the backward pass, where the cache holds the segment already."""
    cache, D = HistoryCache(1, 1, 2, 16, 64, device=device), 16
    for _ in range(2):
        with torch.no_grad():
            history_attention(*torch.randn(3, 1, 2, 8, D, device=device), cache, layer=0, window=2)
    weight = torch.randn(D, device=device, requires_grad=True)

    def block(x, other):
        q = x * weight if learns == "attention" else x.detach()
        return (history_attention(q, q, x.detach(), cache, layer=0, window=2) * other).sin()

    x, other = (torch.randn(1, 2, 8, D, device=device, requires_grad=True) for _ in range(2))
    out = torch.utils.checkpoint.checkpoint(block, x, other, use_reentrant=reentrant)
    keys = cache.keys.clone()
    with pytest.raises(RuntimeError, match="history_attention: called in a backward pass"):
        out.sum().backward()
    assert cache.length == 24 and torch.equal(cache.keys[..., :24, :], keys[..., :24, :])


@pytest.mark.parametrize(("backend", "device", "dtype"), SERVED)
def test_a_loaded_state_is_a_constant_and_memory_with_a_gradient_is_refused(backend, device, dtype):
    D = 64
    q = torch.randn(1, 1, 4, D, dtype=dtype, device=device, requires_grad=True)
    cache, again = (HistoryCache(1, 1, 1, D, 16, dtype, device) for _ in range(2))
    with torch.no_grad():
        history_attention(q, q, q, cache, layer=0, backend=backend)
    state = cache.state_dict()
    again.load_state_dict(state | {"keys": state["keys"].requires_grad_()})
    for _ in range(2):
        history_attention(q, q, q, again, layer=0, commit=False, backend=backend).sum().backward()
    assert state["keys"].grad is None and not again.keys.requires_grad
    again.values[0, :, :, :4] = q
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients), pytest.raises(ValueError, match=r"cache\.values requires a gradient"):
            history_attention(q, q, q, again, layer=0, backend=backend)
    assert again.segments == [1]
