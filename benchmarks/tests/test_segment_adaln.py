"""Peers of the adaLN family: packages' norms, on stand-ins with their signatures."""

import sys
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


@pytest.mark.parametrize("op", ["adaln_modulate", "gate_residual_adaln"])
def test_norms_of_packages(op, monkeypatch):
    functional = SimpleNamespace(liger_layer_norm=liger_layer_norm)
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers.functional", functional)
    rows = SimpleNamespace(layernorm_fwd=layernorm_fwd, layernorm_bwd=layernorm_bwd)
    monkeypatch.setitem(sys.modules, "quack.rmsnorm", rows)
    case = Case(op, 2, (6, 6, 6), C=40, dtype=torch.float32)
    inputs = cases.make_inputs(case, CPU)
    for norm in (peers.liger_norm, peers.quack_norm):
        outputs = peers.with_norm(case, norm(case, CPU), backend="eager")(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        grad_outputs = [torch.randn_like(out) for out in outputs]
        assert exact_adaln(case, inputs, None).error([out.detach() for out in outputs]) < 1e-6
        grads = torch.autograd.grad(outputs, inputs, grad_outputs)
        assert exact_adaln(case, inputs, grad_outputs).error(grads) < 1e-6


def test_packages_are_asked_on_a_gpu():
    names = set(peers.adaln_peers(Case("adaln_modulate", 1, (4,)), torch.device("cuda"), True))
    assert names == {"eager", "compile_rows", "compile_repeat", "liger", "quack"}
    assert not names & {"liger", "quack"} & set(peers.adaln_peers(Case("adaln_modulate", 1, (4,)), CPU, True))
