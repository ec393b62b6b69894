"""qk-norm of history attention, on every backend: values, what the cache holds, the dataclass's own checks."""

import pytest
import torch

from ard_kernels import HeadNorm, HistoryCache, history_attention
from ard_kernels.block_causal_attention.reference import block_causal_attention as dense_reference
from ard_kernels.history_attention.norm import normalise
from testing import plain
from testing.devices import on_devices
from testing.oracle import assert_close

D = 72
HALVES = [torch.bfloat16, torch.float16]
DTYPES = [torch.float32, *HALVES]
NORMS = {  # (q, k): kind, weight, bias; w: of the segment's dtype, f: fp32
    "rms": (("rms", "", ""), ("rms", "", "")),
    "rms weight": (("rms", "w", ""), ("rms", "f", "")),
    "layer": (("layer", "", ""), ("layer", "", "")),
    "layer weight bias": (("layer", "w", "w"), ("layer", "f", "f")),
    "rms and layer": (("rms", "f", ""), ("layer", "w", "")),
    "q only": (("layer", "", "f"), None),
    "k only": (None, ("rms", "w", "")),
}


def make_norm(spec, dtype, device):
    if spec is None:
        return None

    def parameter(kind):
        return 1 + torch.randn(D, device=device).to(dtype if kind == "w" else torch.float32) if kind else None

    kind, weight, bias = spec
    return HeadNorm(kind, parameter(weight), parameter(bias), eps=1e-3)


def exact(x, norm):
    """The formula, in fp64."""
    if norm is None:
        return x.double()
    x = x.double()
    x = x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x
    y = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    y = y if norm.weight is None else y * norm.weight.double()
    return y if norm.bias is None else y + norm.bias.double()


@pytest.mark.parametrize("norms", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    on_devices(
        torch=[torch.float32, *HALVES], cpu=[torch.float32, *HALVES], triton=[torch.float32, *HALVES], cuda=HALVES
    ),
)
def test_two_steps(backend, device, dtype, norms, poisoned):
    q_norm, k_norm = (make_norm(spec, dtype, device) for spec in norms)
    qkv = (2 * torch.randn(1, 24, 3, 2, D, device=device) + 0.5).to(dtype)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    cache = HistoryCache(1, 1, 2, D, 24, dtype, device)
    steps = [slice(0, 16), slice(16, 24)]
    out = [
        history_attention(
            *(x[:, :, step] for x in (q, k, v)), cache, layer=0, q_norm=q_norm, k_norm=k_norm, backend=backend
        )
        for step in steps
    ]
    assert torch.equal(cache.values[0], v)
    if k_norm is None:
        assert torch.equal(cache.keys[0], k)
    else:
        assert_close(cache.keys[0], plain.head_norm(k, k_norm), exact(k, k_norm), label="keys")
    segments = [tuple(x[:, :, step] for x in (q, k, v)) for step in steps]
    expected = dense_reference(exact(q, q_norm), exact(k, k_norm), v.double(), [16, 8])[0]
    assert_close(torch.cat(out, 2), plain.history_attention(segments, q_norm=q_norm, k_norm=k_norm), expected)


def test_normalise_is_the_formula_in_fp64(device):
    x = torch.randn(3, 5, D, dtype=torch.float64, device=device)
    for kind in ("rms", "layer"):
        bias = torch.randn(D, device=device) if kind == "layer" else None
        norm = HeadNorm(kind, torch.randn(D, device=device), bias, 1e-2)
        torch.testing.assert_close(normalise(x, norm), exact(x, norm))


def test_autocast_keeps_fp32_weights(device):
    q, k, v = (torch.randn(1, 2, 16, D, device=device) for _ in range(3))
    norm = HeadNorm(weight=torch.randn(D, device=device))
    cache = HistoryCache(1, 1, 2, D, 16, torch.bfloat16, device)
    with torch.autocast(device.type, torch.bfloat16):
        out = history_attention(q, k, v, cache, layer=0, q_norm=norm, k_norm=norm)
    assert out.dtype == torch.bfloat16
    if device.type == "cpu":
        assert torch.equal(cache.keys[0], normalise(k.bfloat16(), norm))
    assert_close(cache.keys[0], plain.head_norm(k.bfloat16(), norm), exact(k.bfloat16(), norm))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("group",), "HeadNorm: kind is 'group'; expected 'rms' or 'layer'"),
        (("rms", None, torch.ones(8)), "HeadNorm: bias is given with kind 'rms'; expected None"),
        (("rms", None, None, -1e-6), "HeadNorm: eps is -1e-06; expected a number >= 0"),
        (("rms", None, None, None), "HeadNorm: eps is None; expected a number >= 0"),
    ],
)
def test_bad_norms(arguments, message):
    with pytest.raises(ValueError, match=message):
        HeadNorm(*arguments)


@pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))
def test_misaligned_input(backend, device):
    """Rows that do not start on 16 bytes, a weight that does not, a strided one: copied first, as the docs say."""
    storage = torch.randn(1 + 2 * 8 * 3 * D, device=device).bfloat16()
    q, k, v = (x.transpose(1, 2) for x in storage[1:].view(1, 8, 3, 2, D).unbind(2))
    bias = torch.randn(D, 2, device=device)[:, 1]
    norm = HeadNorm("layer", torch.randn(D + 1, device=device).bfloat16()[1:], bias)
    assert q.data_ptr() % 16 and norm.weight.data_ptr() % 16
    outputs = []
    for own, parts in ((norm, (q, k, v)), (HeadNorm("layer", norm.weight.clone(), norm.bias.clone()), (q, k, v))):
        cache = HistoryCache(1, 1, 2, D, 8, torch.bfloat16, device)
        parts = parts if own is norm else tuple(x.clone() for x in parts)
        outputs.append((history_attention(*parts, cache, layer=0, q_norm=own, k_norm=own, backend=backend), cache.keys))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
