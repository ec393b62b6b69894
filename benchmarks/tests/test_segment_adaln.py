"""Peers of the adaLN family: packages' norms, on stand-ins with their signatures."""

import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.exact import exact_adaln
from benchmarks.segment_adaln import peers
from testing import cases
from testing.cases import Case

CPU = torch.device("cpu")


def liger_layer_norm(X, W, B, eps):
    assert X.dtype == W.dtype == B.dtype
    return F.layer_norm(X, W.shape, W, B, eps)


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    """quack's: rows, a weight in fp32, no autograd."""
    assert x.dim() == 2 and weight.dtype == torch.float32 and return_rstd and return_mean
    mean, rstd = x.mean(-1), (x.var(-1, correction=0) + eps).rsqrt()
    return (x - mean[:, None]) * rstd[:, None] * weight, rstd, mean


def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    """(dx, dw, db)"""
    assert dout.is_contiguous() and not has_bias
    normed, grad = (x - mean[:, None]) * rstd[:, None], dout * weight
    share = grad.mean(-1, keepdim=True) + normed * (grad * normed).mean(-1, keepdim=True)
    return rstd[:, None] * (grad - share), (dout * normed).sum(0), None


def rmsnorm(x, weight=None, bias=None, residual=None, out_dtype=None, residual_dtype=None, eps=1e-6, prenorm=False):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def liger_modulated_rms_norm(X, W, scale, shift=None, eps=1e-6, offset=0.0, casting_mode="llama", in_place=True):
    """Rows (B, S, C) are each of T / S tokens."""
    assert W is None and not in_place
    y = F.rms_norm(X, X.shape[-1:], eps=eps).view(*scale.shape[:2], -1, X.shape[-1])
    return (y * (1 + scale[:, :, None]) + shift[:, :, None]).view_as(X)


@pytest.fixture
def packages(monkeypatch):
    functional = SimpleNamespace(liger_layer_norm=liger_layer_norm, liger_modulated_rms_norm=liger_modulated_rms_norm)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    rows = SimpleNamespace(layernorm_fwd=layernorm_fwd, layernorm_bwd=layernorm_bwd, rmsnorm=rmsnorm)
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", rows)


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual_adaln"])
def test_norms_of_packages(op, norm, packages):
    case = Case(op, 2, (6, 6, 6), C=40, dtype=torch.float32, norm=norm)
    inputs, how = cases.make_inputs(case, CPU), {"backend": "eager"}
    liger = peers.gated(case, peers.liger_modulated(case, CPU), **how)
    if norm == "layer":
        liger = peers.with_norm(case, peers.liger_norm(case, CPU), **how)
    ours = partial(cases.run_ours, case, backend=None)
    for run in (liger, peers.with_norm(case, peers.quack_norm(case, CPU), **how), lambda *inputs: ours(inputs)):
        outputs = run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grad_outputs = [torch.randn_like(out) for out in outputs]
        assert exact_adaln(case, inputs, None).error([out.detach() for out in outputs]) < 1e-6
        grads = torch.autograd.grad(outputs, inputs, grad_outputs)
        assert exact_adaln(case, inputs, grad_outputs).error(grads) < 1e-6


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_packages_are_asked_on_a_gpu(norm):
    case = Case("adaln_modulate", 1, (4,), norm=norm)
    on_gpu, on_cpu = (set(peers.adaln_peers(case, torch.device(kind), True)) for kind in ("cuda", "cpu"))
    assert on_cpu == {"eager", "compile_rows", "compile_repeat"} and on_gpu == on_cpu | {"liger", "quack"}
