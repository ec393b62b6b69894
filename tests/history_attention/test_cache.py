"""The cache itself: sizes, room, steps that break off, memory that somebody changed; compile, export, meta, fake."""

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ard_kernels import HistoryCache, history_attention
from ard_kernels.block_causal_attention.spec import useful_pairs
from testing.devices import on_devices


@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    on_devices(torch=[torch.float32], cpu=[torch.float32], triton=[torch.float32], cuda=[torch.float16]),
)
def test_a_full_cache_raises_and_keeps_its_contents(backend, device, dtype):
    cache = HistoryCache(1, 1, 2, 64, 40, dtype, device)
    q, k, v = (torch.randn(1, 2, 16, 64, device=device).to(dtype) for _ in range(3))
    for _ in range(2):
        history_attention(q, k, v, cache, layer=0, backend=backend)
    before = cache.keys.clone(), cache.values.clone(), cache.segments
    with pytest.raises(ValueError, match=r"layer 0 of the cache holds 32 of 40 tokens; expected room for 16 more"):
        history_attention(q, k, v, cache, layer=0, backend=backend)
    assert torch.equal(cache.keys[:, :, :, :32], before[0][:, :, :, :32]) and cache.segments == before[2]
    assert cache.length == 32
    history_attention(q[:, :, :8], k[:, :, :8], v[:, :, :8], cache, layer=0, backend=backend)
    assert cache.length == 40
    cache.reset()
    assert cache.length == 0
    assert cache.nbytes == 2 * 2 * 40 * 64 * dtype.itemsize


def test_bad_cache_sizes():
    with pytest.raises(ValueError, match=r"HistoryCache: heads is -1; expected an int >= 0"):
        HistoryCache(1, 1, -1, 16, 16)
    with pytest.raises(ValueError, match=r"HistoryCache: the cache has dtype torch.int32"):
        HistoryCache(1, 1, 1, 16, 16, torch.int32)


@pytest.mark.parametrize("mask", [(None, 0), (2, 1)])
def test_one_graph_for_64_steps(mask, device):
    """Where the cache stands is no constant of a graph."""
    caches, counter = [HistoryCache(2, 1, 2, 16, 256, device=device) for _ in range(2)], CompileCounter()

    def step(q, k, v, cache):
        return sum(history_attention(q, k, v, cache, layer=i, window=mask[0], sink=mask[1]) for i in range(2))

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    with torch.no_grad():
        for q, k, v in torch.randn(64, 3, 1, 2, 4, 16, device=device):
            assert torch.equal(compiled(q, k, v, caches[0]), step(q, k, v, caches[1]))
    assert counter.frame_count == 1 and caches[0].segments == caches[1].segments and caches[0].length == 256
    with pytest.raises(ValueError, match="holds 256 of 256 tokens"):
        compiled(q, k, v, caches[0])


@pytest.mark.parametrize("strict", [False, True])
def test_export_is_refused_and_leaves_the_cache_alone(strict):
    class Sampler(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = HistoryCache(1, 1, 2, 16, 64)

        def forward(self, q):
            return history_attention(q, q, q, self.cache, layer=0)

    sampler = Sampler()
    with pytest.raises(Exception, match=r"torch\.export would freeze the cache"):
        torch.export.export(sampler, (torch.randn(1, 2, 4, 16),), strict=strict)
    assert sampler.cache.length == 0


def test_the_workspace_is_float32_whatever_the_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert HistoryCache(1, 1, 2, 16, 64, torch.bfloat16).workspace.dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_step_that_missed_a_layer_is_noticed(device):
    cache = HistoryCache(3, 1, 2, 16, 64, device=device)
    q = torch.randn(1, 2, 16, 16, device=device)
    for layer in (2, 0, 1, 0, 1):  # the second step breaks off before layer 2
        history_attention(q, q, q, cache, layer=layer)
    before = cache.segments
    with pytest.raises(
        ValueError, match=r"layer 0 of the cache holds 2 segments, but layer 2 holds 1: an earlier step"
    ):
        history_attention(q, q, q, cache, layer=0)
    with pytest.raises(ValueError, match=r"k has 8 tokens in layer 2; expected 16, as in the layers that have taken"):
        history_attention(*[q[:, :, :8]] * 3, cache, layer=2)
    assert cache.segments == before
    for layer in (2, 0, 1, 2):  # it may still be finished
        history_attention(q, q, q, cache, layer=layer)
    assert cache.segments == [3] * 3 and cache.length == 48


@pytest.mark.parametrize("name", ["keys", "values", "workspace", "positions", "batch", "dtype", "capacity"])
def test_attributes_are_read_only(name):
    cache = HistoryCache(1, 1, 2, 16, 64)
    with pytest.raises(AttributeError, match=f"HistoryCache.{name} is read-only"):
        setattr(cache, name, getattr(cache, name))


SPOILED = {
    "dtype": lambda keys: keys.bfloat16(),
    "fewer heads": lambda keys: keys[:, :, :1].clone(),
    "last dim not contiguous": lambda keys: keys.mT.contiguous().mT,
    "fewer tokens": lambda keys: keys[:, :, :, :8].clone(),
}


@pytest.mark.parametrize("spoil", SPOILED.values(), ids=SPOILED)
def test_memory_spoiled_behind_the_cache_is_refused(spoil, device):
    q = torch.randn(1, 2, 16, 16, device=device)
    cache = HistoryCache(1, 1, 2, 16, 64, device=device)
    cache.__dict__["keys"] = spoil(cache.keys)
    with pytest.raises(ValueError, match=r"cache\.(keys|values|positions) "):
        history_attention(q, q, q, cache, layer=0)
    cache = HistoryCache(1, 1, 2, 16, 64, device=device)
    cache.values.resize_(1, 1, 2, 32, 16)
    with pytest.raises(ValueError, match=r"cache\.values a float32 tensor of shape \(1, 1, 2, 32, 16\)"):
        history_attention(q, q, q, cache, layer=0)


@pytest.mark.parametrize(
    "damage",
    [
        *([0, 0, 0, 0, 1, 1, 9, -2], [0, 0, 0, 0, 1, 1, 0, -3], [-7] * 8, [0, 0, 0, 0, 2, 2, 0, 9, 5]),
        *([0, 0, 0, 0, 17, 17], [0, 0, 0, 0, 16, 16], [0, 0, 0, 0, 1, 1, 0, 99], [0, 0, 0, 0, -1, 0]),
        *([0, 0, 0, 1, 1, 1, 0, 4], [4, 2, 1]),
    ],
)
@pytest.mark.parametrize(("backend", "device"), on_devices("cpu", "torch"))
def test_damaged_positions_are_refused(damage, backend, device):
    q, cache = torch.randn(1, 2, 4, 8, device=device), HistoryCache(2, 1, 2, 8, 16, device=device)
    cache.positions[: len(damage)] = torch.tensor(damage)
    with pytest.raises(ValueError, match=r"cache\.positions is damaged"):
        history_attention(q, q, q, cache, layer=0, backend=backend)


def test_the_raw_op_checks_its_layer_and_memory():
    q, cache = torch.randn(1, 2, 16, 16), HistoryCache(1, 1, 2, 16, 64)
    memory = [cache.keys, cache.values, cache.workspace, cache.positions]
    with pytest.raises(ValueError, match="layer is 7; expected 0 to 0"):
        torch.ops.ard.history_attention(q, q, q, None, *memory, 7, None, 0, 0.3, True, "cpu")
    for i, name in enumerate(["keys", "values", "workspace", "positions"]):
        wrong = [*memory[:i], memory[i].to(torch.float16), *memory[i + 1 :]]
        with pytest.raises(ValueError, match=rf"cache\.{name} (is )?a float16 tensor"):
            torch.ops.ard.history_attention(q, q, q, None, *wrong, 0, None, 0, 0.3, True, "cpu")
    assert cache.length == 0


@pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton", "cuda"))
def test_a_saved_view_of_the_cache_notices_the_append(backend, device):
    cache = HistoryCache(1, 1, 2, 64, 64, torch.bfloat16, device)
    q = torch.randn(1, 2, 16, 64, device=device).bfloat16()
    history_attention(q, q, q, cache, layer=0, backend=backend)
    weight = torch.randn(64, dtype=torch.bfloat16, device=device, requires_grad=True)
    loss = (cache.keys[0, :, :, :16] * weight).sum()
    history_attention(q, q, q, cache, layer=0, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_inference_mode():
    q = torch.randn(1, 2, 16, 16)
    with torch.inference_mode():
        cache = HistoryCache(1, 1, 2, 16, 64)
        history_attention(q, q, q, cache, layer=0)
    assert cache.length == 16
    history_attention(q, q, q, cache, layer=0, backend="cpu")
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
        history_attention(q, q, q, cache, layer=0, backend="torch")
    assert cache.length == 32
    cache.reset()
    assert cache.length == 0


def test_meta_and_fake_caches():
    with FakeTensorMode():
        cache, q = HistoryCache(1, 1, 2, 16, 64), torch.empty(1, 2, 16, 16)
        assert history_attention(q, q, q, cache, layer=0).shape == q.shape
        with FlopCounterMode(display=False), pytest.raises(NotImplementedError, match="expected no fake tensors"):
            history_attention(q, q, q, cache, layer=0)
    cache, q = HistoryCache(1, 1, 2, 16, 32, device="meta"), torch.empty(1, 2, 16, 16, device="meta")
    with FlopCounterMode(display=False) as counter:
        for _ in range(2):
            history_attention(q, q, q, cache, layer=0)
    assert counter.get_total_flops() == 4 * 2 * 16 * useful_pairs([16], 32, None, 0)
    with pytest.raises(ValueError, match="holds 32 of 32 tokens"):
        history_attention(q, q, q, cache, layer=0)
