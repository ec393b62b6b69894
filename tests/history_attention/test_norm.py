"""qk-norm of history attention, on every backend: values, what the cache holds, the dataclass's own checks."""

import pytest
import torch

from ard_kernels import HeadNorm, HistoryCache, history_attention
from ard_kernels.block_causal_attention.reference import block_causal_attention as dense_reference
from ard_kernels.common import extension
from ard_kernels.history_attention.norm import normalise
from testing.oracle import assert_close

D = 72
HALVES = [torch.bfloat16, torch.float16]
NORMS = {  # (q, k): kind, weight, bias; w: of the segment's dtype, f: fp32
    "rms": (("rms", "", ""), ("rms", "", "")),
    "rms weight": (("rms", "w", ""), ("rms", "f", "")),
    "layer": (("layer", "", ""), ("layer", "", "")),
    "layer weight bias": (("layer", "w", "w"), ("layer", "f", "f")),
    "rms and layer": (("rms", "f", ""), ("layer", "w", "")),
    "q only": (("layer", "", "f"), None),
    "k only": (None, ("rms", "w", "")),
}


def make_norm(spec, dtype):
    if spec is None:
        return None
    kind, weight, bias = spec
    make = {"": lambda: None, "w": lambda: (1 + torch.randn(D)).to(dtype), "f": lambda: 1 + torch.randn(D)}
    return HeadNorm(kind, make[weight](), make[bias](), eps=1e-3)


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
    ("backend", "dtype"),
    [(b, d) for b in ("torch", "cpu", "triton") for d in (torch.float32, *HALVES)] + [("cuda", d) for d in HALVES],
)
def test_two_steps(backend, dtype, norms, poisoned):
    q_norm, k_norm = (make_norm(spec, dtype) for spec in norms)
    qkv = (2 * torch.randn(1, 24, 3, 2, D) + 0.5).to(dtype)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    cache = HistoryCache(1, 1, 2, D, 24, dtype)
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
        assert_close(cache.keys[0], normalise(k, k_norm), exact(k, k_norm), label="keys")
    plain_cache = HistoryCache(1, 1, 2, D, 24, dtype)
    plain_q, plain_k = normalise(q, q_norm), normalise(k, k_norm)
    plain = [
        history_attention(*(x[:, :, step] for x in (plain_q, plain_k, v)), plain_cache, layer=0, backend="torch")
        for step in steps
    ]
    expected = dense_reference(exact(q, q_norm), exact(k, k_norm), v.double(), [16, 8])[0]
    assert_close(torch.cat(out, 2), torch.cat(plain, 2), expected)


def test_normalise_is_the_formula_in_fp64():
    x = torch.randn(3, 5, D, dtype=torch.float64)
    for kind in ("rms", "layer"):
        bias = torch.randn(D) if kind == "layer" else None
        norm = HeadNorm(kind, torch.randn(D), bias, 1e-2)
        torch.testing.assert_close(normalise(x, norm), exact(x, norm))


def test_autocast_keeps_fp32_weights():
    q, k, v = (torch.randn(1, 2, 16, D) for _ in range(3))
    norm = HeadNorm(weight=torch.randn(D))
    cache = HistoryCache(1, 1, 2, D, 16, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = history_attention(q, k, v, cache, layer=0, q_norm=norm, k_norm=norm)
    assert out.dtype == torch.bfloat16
    assert torch.equal(cache.keys[0], normalise(k.bfloat16(), norm))


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


def test_cuda_takes_misaligned_input():
    """Rows that do not start on 16 bytes, a weight that does not, a strided one: copied first, as the docs say."""
    storage = torch.randn(1 + 2 * 8 * 3 * D).bfloat16()
    q, k, v = (x.transpose(1, 2) for x in storage[1:].view(1, 8, 3, 2, D).unbind(2))
    norm = HeadNorm("layer", torch.randn(D + 1).bfloat16()[1:], torch.randn(D, 2)[:, 1])
    assert extension.emulated is not None and q.data_ptr() % 16 and norm.weight.data_ptr() % 16
    outputs = []
    for own, parts in ((norm, (q, k, v)), (HeadNorm("layer", norm.weight.clone(), norm.bias.clone()), (q, k, v))):
        cache = HistoryCache(1, 1, 2, D, 8, torch.bfloat16)
        parts = parts if own is norm else tuple(x.clone() for x in parts)
        outputs.append((history_attention(*parts, cache, layer=0, q_norm=own, k_norm=own, backend="cuda"), cache.keys))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
