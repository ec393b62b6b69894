"""Ops are called without the dispatcher in plain eager code only: whatever watches, counts or traces sees the op."""

import traceback

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ard_kernels
from ard_kernels import library
from ard_kernels.block_causal_attention import op

L = 4


def inputs(requires_grad=False):
    return [torch.randn(1, 2, 2 * L, 8, requires_grad=requires_grad) for _ in range(3)]


def attention(q, k, v):
    return ard_kernels.block_causal_attention(q, k, v, segment_length=L)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_profilers_and_counters_see_the_op():
    with Seen() as seen:
        attention(*inputs())
    assert "ard.block_causal_attention.default" in seen.names
    with profile() as profiler:
        attention(*inputs())
    assert "ard::block_causal_attention" in {event.key for event in profiler.key_averages()}
    with FlopCounterMode(display=False) as counter:
        attention(*inputs())
    assert counter.get_total_flops() == 4 * 2 * 8 * 3 * L * L


def test_the_backward_is_seen_too():
    q, k, v = inputs(requires_grad=True)
    out = attention(q, k, v)  # called directly
    with Seen() as seen:
        out.sum().backward()
    assert "ard.block_causal_attention_backward.default" in seen.names


@pytest.mark.parametrize("requires_grad", [False, True])
def test_direct_and_dispatched_are_bit_equal(requires_grad):
    tensors = inputs(requires_grad)
    direct = attention(*tensors)
    with Seen():
        dispatched = attention(*tensors)
    assert torch.equal(direct, dispatched)
    if requires_grad:
        grads = torch.autograd.grad(direct.sum(), tensors)
        with Seen() as seen:
            expected = torch.autograd.grad(dispatched.sum(), tensors)
        assert "ard.block_causal_attention_backward.default" in seen.names
        for got, other in zip(grads, expected, strict=True):
            assert torch.equal(got, other)


def test_public_ops_are_called_directly(monkeypatch):
    """The kernel's caller is `call` of library.py, and no op of the dispatcher."""
    frames = []
    forward = op.IMPLEMENTATIONS["torch"].forward

    def noting(*args):
        frames.extend(frame.name for frame in traceback.extract_stack())
        return forward(*args)

    monkeypatch.setattr(op.IMPLEMENTATIONS["torch"], "forward", noting)
    with torch.no_grad():
        attention(*inputs())
    directly = frames[frames.index("attention") :]
    assert directly == ["attention", "block_causal_attention", "call", "_forward", "noting"]
    frames.clear()
    with Seen(), torch.no_grad():
        attention(*inputs())
    assert "__torch_dispatch__" in frames


def test_a_jit_trace_records_the_op():
    with torch.no_grad():
        traced = torch.jit.trace(lambda q, k, v: attention(q, k, v), inputs(), check_trace=False)
    assert "ard::block_causal_attention" in str(traced.graph)


def test_a_negated_view_is_resolved():
    q, k, v = inputs()
    assert torch.equal(attention(torch._neg_view(q), k, v), attention(-q, k, v))


def test_plain_calls_do_not_reach_the_dispatcher():
    called = []
    defined = library.define_op("test_direct(Tensor x) -> Tensor", lambda x: x + 1, lambda x: torch.empty_like(x))
    recorded = library._directly(lambda *args: called.append("op") or defined(*args), lambda x: x + 1, lambda x: x + 1)
    assert torch.equal(recorded(torch.zeros(3)), torch.ones(3)) and not called
    assert recorded(torch.zeros(3, device="meta")).is_meta and called == ["op"]

    class Wrapped(torch.Tensor):
        pass

    recorded(torch.zeros(3).as_subclass(Wrapped))
    assert called == ["op", "op"]


def test_needs_a_gradient_only_where_one_is_recorded():
    q, k, v = inputs(requires_grad=True)
    assert attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad
