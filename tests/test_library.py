"""Ops are called without the dispatcher in plain eager code only: whatever watches, counts or traces sees the op."""

import subprocess
import sys
import threading
import traceback

import pytest
import torch
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import ard_kernels
from ard_kernels.block_causal_attention import op
from ard_kernels.common import library
from ard_kernels.common.backends import resolve

L = 4


def inputs(device="cpu", requires_grad=False):
    return [torch.randn(1, 2, 2 * L, 8, device=device, requires_grad=requires_grad) for _ in range(3)]


def attention(q, k, v):
    return ard_kernels.block_causal_attention(q, k, v, segment_length=L)


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_profilers_and_counters_see_the_op(device):
    with Seen() as seen:
        attention(*inputs(device))
    assert "ard.segment_attention.default" in seen.names
    with profile() as profiler:
        attention(*inputs(device))
    assert "ard::segment_attention" in {event.key for event in profiler.key_averages()}
    with FlopCounterMode(display=False) as counter:
        attention(*inputs(device))
    assert counter.get_total_flops() == 4 * 2 * 8 * 3 * L * L


def test_the_backward_is_seen_too(device):
    q, k, v = inputs(device, requires_grad=True)
    out = attention(q, k, v)  # called directly
    with Seen() as seen:
        out.sum().backward()
    assert "ard.segment_attention_backward.default" in seen.names


@pytest.mark.parametrize("requires_grad", [False, True])
def test_direct_and_dispatched_are_bit_equal(requires_grad, device):
    tensors = inputs(device, requires_grad)
    direct = attention(*tensors)
    with Seen():
        dispatched = attention(*tensors)
    assert torch.equal(direct, dispatched)
    if requires_grad:
        grads = torch.autograd.grad(direct.sum(), tensors)
        with Seen() as seen:
            expected = torch.autograd.grad(dispatched.sum(), tensors)
        assert "ard.segment_attention_backward.default" in seen.names
        for got, other in zip(grads, expected, strict=True):
            assert torch.equal(got, other)


def test_public_ops_are_called_directly(monkeypatch):
    """The kernel's caller is `call` of library.py, and no op of the dispatcher."""
    frames = []
    forward = op.cpu.forward

    def noting(*args):
        frames.extend(frame.name for frame in traceback.extract_stack())
        return forward(*args)

    monkeypatch.setattr(op.cpu, "forward", noting)
    with torch.no_grad():
        attention(*inputs())
    directly = frames[frames.index("attention") :]
    assert directly == ["attention", "block_causal_attention", "_attend", "call", "forward", "noting"]
    frames.clear()
    with Seen(), torch.no_grad():
        attention(*inputs())
    assert "__torch_dispatch__" in frames


def test_a_jit_trace_records_the_op(device):
    with torch.no_grad():
        traced = torch.jit.trace(lambda q, k, v: attention(q, k, v), inputs(device), check_trace=False)
    assert "ard::segment_attention" in str(traced.graph)


def test_a_negated_view_is_resolved(device):
    q, k, v = inputs(device)
    assert torch.equal(attention(torch._neg_view(q), k, v), attention(-q, k, v))


def test_plain_calls_do_not_reach_the_dispatcher():
    called = []
    defined = library.define_op("test_direct(Tensor x) -> Tensor", lambda x: x + 1, lambda x: torch.empty_like(x))
    recorded = library._directly(
        lambda *args: called.append("op") or defined(*args), lambda x: x + 1, lambda x: x + 1, [0]
    )
    assert torch.equal(recorded(torch.zeros(3)), torch.ones(3)) and not called
    assert recorded(torch.zeros(0)).shape == (0,) and not called  # as the workspace of a cache on the CPU
    assert recorded(torch.zeros(3, device="meta")).is_meta and called == ["op"]

    class Wrapped(torch.Tensor):
        pass

    recorded(torch.zeros(3).as_subclass(Wrapped))
    assert called == ["op", "op"]


def test_needs_a_gradient_only_where_one_is_recorded(device):
    q, k, v = inputs(device, requires_grad=True)
    assert attention(q, k, v).requires_grad
    with torch.no_grad():
        assert not attention(q, k, v).requires_grad


PRIVATE = [
    "_C._get_tracing_state",
    "_C._len_torch_dispatch_stack",
    "_C._len_torch_function_stack",
    "_C._functorch.peek_interpreter_stack",
    "autograd._profiler_enabled",
    "autograd.forward_ad._current_level",
    "ops.aten._scaled_dot_product_flash_attention_for_cpu",
    "_C._autograd._top_saved_tensors_default_hooks",
]
STILL_DIRECT = PRIVATE[-2:]
TORCH_NEEDS = ["_C._AutoDispatchBelowAutograd", "_is_zerotensor", "_foreach_lerp_"]  # to differentiate and to optimise
# For each name a process, in which torch loses it before ard_kernels is imported; then it trains and samples a step.
WITHOUT = """
import functools, os, sys, torch

def lose(holder, name):
    if holder != "ops.aten":
        return delattr(functools.reduce(getattr, holder.split("."), torch), name)
    real = type(torch.ops.aten).__getattr__
    def missing(self, asked):
        if asked.startswith(name):
            raise AttributeError(asked)
        return real(self, asked)
    type(torch.ops.aten).__getattr__ = missing

def step():
    from ard_kernels import HistoryCache, adaln_modulate, block_causal_attention, history_attention
    from ard_kernels.common import library
    q = torch.randn(1, 2, 8, 8, requires_grad=True)
    x, row = torch.randn(1, 8, 16, requires_grad=True), torch.randn(1, 2, 16)
    block_causal_attention(q, q, q, segment_length=4).sum().backward()
    adaln_modulate(x, row, row, segment_length=4).sum().backward()
    with torch.no_grad():
        own = q[:, :, :4]
        history_attention(own, own, own, HistoryCache(1, 1, 2, 8, 8), layer=0)
    return library.DIRECT, bool(q.grad.isfinite().all()), tuple(x.grad.shape)

for path in sys.argv[1:]:
    child = os.fork()
    if not child:
        lose(*path.rsplit(".", 1))
        print(path, *step(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


def test_a_private_name_that_torch_drops_breaks_nothing():
    done = subprocess.run([sys.executable, "-c", WITHOUT, *PRIVATE], capture_output=True, text=True, check=False)
    expected = [f"{name} {name in STILL_DIRECT} True (1, 8, 16)" for name in PRIVATE]
    assert done.stdout.splitlines() == expected, done.stderr[-2000:]


# Hides every private name while ard_kernels is imported: PyTorch itself needs them to differentiate and to compile.
WITHOUT_ALL = """
import functools, sys, torch, torch._functorch.autograd_function
hidden = []
for path in sys.argv[1:]:
    *holders, name = path.split(".")
    place = functools.reduce(getattr, holders, torch)
    hidden.append((place, name, getattr(place, name)))
    delattr(place, name)
import ard_kernels
from ard.training.ema import _lerp_all
from ard_kernels.common import library
for place, name, value in hidden:
    setattr(place, name, value)
assert not library.DIRECT and library._below_autograd is None and library._is_zero is None and _lerp_all is None

torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 8, 8)
x, branch = torch.randn(2, 1, 8, 16)
shift, scale, gate = torch.randn(3, 1, 2, 16)
L = {"segment_length": 4}
ops = {
    ard_kernels.block_causal_attention: (q, k, v),
    ard_kernels.block_causal_attention_packed: (torch.randn(1, 8, 3, 2, 8),),
    ard_kernels.adaln_modulate: (x, shift, scale),
    ard_kernels.qk_norm_rope: (q, k),
    ard_kernels.gate_residual: (x, branch, gate),
    ard_kernels.gate_residual_adaln: (x, branch, gate, shift, scale),
}
def results(op, inputs, **arguments):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    out = op(*leaves, **L, **arguments)
    out = out if isinstance(out, tuple) else (out,)
    return *out, *torch.autograd.grad(sum(part.square().sum() for part in out), leaves)
for op, inputs in ops.items():
    plain = results(op, inputs, backend="torch")
    for run in (op, torch.compile(op, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(results(run, inputs), plain)
def sampled(backend):
    cache = ard_kernels.HistoryCache(1, 1, 2, 8, 8)
    return ard_kernels.history_attention(q[:, :, :4], k[:, :, :4], v[:, :, :4], cache, layer=0, backend=backend)
with torch.no_grad():
    torch.testing.assert_close(sampled("cpu"), sampled("torch"))
    torch.testing.assert_close(torch.compile(sampled, backend="aot_eager")("cpu"), sampled("torch"))
print("done", len(hidden))
"""


def test_all_private_names_may_be_gone_at_once():
    """Forward, backward and compile of each op are then those of the public API."""
    names = [name for name in PRIVATE if not name.startswith("ops.")] + TORCH_NEEDS
    done = subprocess.run([sys.executable, "-c", WITHOUT_ALL, *names], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"done {len(names)}", done.stderr[-3000:]


def test_a_users_kernel_is_seen_with_ARD_DISPATCH():
    program = """
import os, torch
for value in ("0", "1"):
    child = os.fork()  # ard_kernels reads it at its import
    if not child:
        os.environ["ARD_DISPATCH"] = value
        import ard_kernels
        library = torch.library.Library("ard", "IMPL")
        library.impl("segment_adaln", lambda x, *rest: (torch.full_like(x, 7.0), None, None, None), "CPU")
        x, gate = torch.zeros(1, 4, 8), torch.zeros(1, 1, 8)
        print(value, ard_kernels.gate_residual(x, x, gate, segment_length=4).unique().tolist(), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["0 [0.0]", "1 [7.0]"], done.stderr[-2000:]


@pytest.mark.parametrize("direct", [True, False])
def test_zero_tensors_of_autograd(direct):
    x, row = torch._efficientzerotensor(1, 8, 16), torch.randn(1, 2, 16)
    modulate = ard_kernels.adaln_modulate
    if direct:
        got = modulate(x, row, row, segment_length=L)
    else:
        inputs = x, None, None, row, row, None, None
        got = torch.ops.ard.segment_adaln(*inputs, [L], "layer", 1e-6, torch.float32, "cpu")[1]
    assert torch.equal(got, modulate(torch.zeros(1, 8, 16), row, row, segment_length=L))


def test_a_backward_after_its_transform_has_ended(device):
    """torch.func.vjp hands out a function that is called when nothing of the transform is left."""
    q, k, v = inputs(device)
    out, pull = torch.func.vjp(lambda q: attention(q, k, v), q)
    leaf = q.clone().requires_grad_()
    expected = torch.autograd.grad(attention(leaf, k, v), leaf, torch.ones_like(out))[0]
    assert torch.equal(pull(torch.ones_like(out))[0], expected)


def chosen():
    return resolve("adaln_modulate", None, torch.device("cpu"), torch.float32, 16)


@pytest.mark.simulated
def test_use_backend_of_two_threads_that_overlap():
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def first():
        with ard_kernels.use_backend("triton"):
            first_in.set()
            second_in.wait(10)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(10)
    with ard_kernels.use_backend("torch"):
        second_in.set()
        first_out.wait(10)
        assert chosen() == "torch"
    thread.join()
    assert chosen() == "cpu", "the automatic choice again"
    with ard_kernels.use_backend("cpu"), ard_kernels.use_backend("torch"):
        assert chosen() == "torch"
