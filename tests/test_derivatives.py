"""Derivatives other than plain .backward(): forward mode, torch.func, second order. Right, or refused by name."""

import pytest
import torch
from torch.autograd import forward_ad

from ard_kernels import (
    HistoryCache,
    adaln_modulate,
    block_causal_attention,
    block_causal_attention_packed,
    gate_residual,
    gate_residual_adaln,
    history_attention,
)
from ard_kernels.block_causal_attention.reference import block_causal_attention as attention_reference
from ard_kernels.segment_adaln import reference
from testing.devices import on_devices

L, WINDOW, SINK = 4, 2, 1


def packed_reference(qkv):
    return attention_reference(*(x.transpose(1, 2) for x in qkv.unbind(2)), [L], WINDOW, SINK)[0].transpose(1, 2)


# name: (ours, fp64 reference, shapes of the inputs)
MASK = {"segment_length": L, "window": WINDOW, "sink": SINK}
TOKENS, ROWS = (2, 3 * L, 24), (2, 3, 24)
OPS = {
    "block_causal_attention": (
        lambda q, k, v, **a: block_causal_attention(q, k, v, **MASK, **a),
        lambda q, k, v: attention_reference(q, k, v, [L], WINDOW, SINK)[0],
        [(2, 2, 3 * L, 8)] * 3,
    ),
    "packed": (
        lambda qkv, **a: block_causal_attention_packed(qkv, **MASK, **a),
        packed_reference,
        [(2, 3 * L, 3, 2, 8)],
    ),
    "adaln_modulate": (
        lambda *x, **a: adaln_modulate(*x, segment_length=L, **a),
        lambda *x: reference.adaln_modulate(*x, [L]),
        [TOKENS, ROWS, ROWS],
    ),
    "adaln_modulate, ragged": (
        lambda *x, **a: adaln_modulate(*x, segment_length=[3, 4, 5], **a),
        lambda *x: reference.adaln_modulate(*x, [3, 4, 5]),
        [TOKENS, ROWS, ROWS],
    ),
    "gate_residual": (
        lambda *x, **a: gate_residual(*x, segment_length=L, **a),
        lambda *x: reference.gate_residual(*x, [L]),
        [TOKENS, TOKENS, ROWS],
    ),
    "gate_residual_adaln": (
        lambda *x, **a: gate_residual_adaln(*x, segment_length=L, **a),
        lambda *x: reference.gate_residual_adaln(*x, [L]),
        [TOKENS, TOKENS, ROWS, ROWS, ROWS],
    ),
}
each_op = pytest.mark.parametrize(("ours", "exact", "shapes"), OPS.values(), ids=OPS)


def draw(shapes, device, dtype=torch.float32):
    return tuple(torch.randn(shape, dtype=torch.float64, device=device).to(dtype) for shape in shapes)


def close(got, expected):
    for a, b in zip(as_tuple(got), as_tuple(expected), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-4, atol=1e-4)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def scalar(function):
    return lambda *x: sum((y.double().sin()).sum() for y in as_tuple(function(*x)))


@each_op
def test_forward_mode(ours, exact, shapes, device):
    """torch.func.jvp and a dual level, along all inputs and along each alone."""
    inputs = draw(shapes, device)
    for only in (None, *range(len(shapes))):
        tangents = tuple(x if only in (None, i) else torch.zeros_like(x) for i, x in enumerate(draw(shapes, device)))
        got, expected = (torch.func.jvp(function, inputs, tangents) for function in (ours, exact))
        close(got[0], expected[0])
        close(got[1], expected[1])
        with forward_ad.dual_level():
            duals = [
                x if only not in (None, i) else forward_ad.make_dual(x, t)
                for i, (x, t) in enumerate(zip(inputs, tangents, strict=True))
            ]
            outputs = [forward_ad.unpack_dual(y) for y in as_tuple(ours(*duals))]
        close(tuple(torch.zeros_like(y) if t is None else t for y, t in outputs), expected[1])


@pytest.mark.slow  # test_forward_mode compares with the reference
@each_op
def test_forward_mode_against_finite_differences(ours, exact, shapes, device):
    inputs = tuple(x.requires_grad_() for x in draw(shapes, device, torch.float64))
    torch.autograd.gradcheck(ours, inputs, check_forward_ad=True, check_backward_ad=False)


@each_op
def test_a_loss_of_primal_and_tangent(ours, exact, shapes, device):
    """MeanFlow: jvp in one input, then the gradient of a loss of both results in another one."""
    inputs, tangent = draw(shapes, device), torch.randn(shapes[0], device=device)

    def gradient(function):
        leaf = inputs[-1].clone().requires_grad_()
        primal, change = torch.func.jvp(lambda x: function(x, *inputs[1:-1], *rest(leaf)), inputs[:1], (tangent,))
        loss = sum((y.double() * dy.double()).sum() for y, dy in zip(as_tuple(primal), as_tuple(change), strict=True))
        return torch.autograd.grad(loss, leaf)

    def rest(leaf):
        return (leaf,) if len(inputs) > 1 else ()

    if len(inputs) > 1:
        close(gradient(ours), gradient(exact))


@each_op
def test_torch_func(ours, exact, shapes, device):
    inputs = draw(shapes, device)
    every = tuple(range(len(shapes)))
    close(torch.func.grad(scalar(ours), every)(*inputs), torch.func.grad(scalar(exact), every)(*inputs))
    primal, pull = torch.func.vjp(ours, *inputs)
    outputs = as_tuple(primal)
    cotangents = tuple(torch.randn_like(y) for y in outputs)
    _, pull_exact = torch.func.vjp(exact, *inputs)
    wide = tuple(g.double() for g in cotangents)
    single = len(outputs) == 1
    close(pull(cotangents[0] if single else cotangents), pull_exact(wide[0] if single else wide))


@each_op
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_of_gradients(ours, exact, shapes, device):
    """Per-sample gradients."""
    batches = tuple(torch.stack(xs) for xs in zip(draw(shapes, device), draw(shapes, device), strict=True))
    close(
        torch.func.vmap(torch.func.grad(scalar(ours)))(*batches),
        torch.func.vmap(torch.func.grad(scalar(exact)))(*batches),
    )


@each_op
def test_second_order_is_right_or_refused(ours, exact, shapes, device):
    inputs, tangent = draw(shapes, device), torch.randn(shapes[0], device=device)

    def twice(function):
        return torch.func.grad(lambda x: torch.func.grad(scalar(function))(x, *inputs[1:]).sin().sum())(inputs[0])

    def product(function):
        return torch.func.jvp(lambda x: torch.func.grad(scalar(function))(x, *inputs[1:]), inputs[:1], (tangent,))[1]

    for derivative in (twice, product):
        try:
            got = derivative(ours)
        except NotImplementedError as error:
            assert "no forward-mode derivative" in str(error) or "gradients of gradients" in str(error)
        else:
            close(got, derivative(exact))
    leaves = tuple(x.requires_grad_() for x in inputs)
    grads = torch.autograd.grad(scalar(ours)(*leaves), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients are not supported"):
        torch.autograd.grad(sum(g.sin().sum() for g in grads), leaves)


@each_op
def test_reverse_over_forward(ours, exact, shapes, device):
    inputs, tangent = draw(shapes, device), torch.randn(shapes[0], device=device)

    def product(function):
        def change(x):
            out = torch.func.jvp(lambda x: function(x, *inputs[1:]), (x,), (tangent,))[1]
            return sum(y.double().sin().sum() for y in as_tuple(out))

        return torch.func.grad(change)(inputs[0])

    close(product(ours), product(exact))


@pytest.mark.parametrize(("backend", "device"), on_devices("cpu", "triton", "cuda"))
def test_a_named_backend_refuses_tangents(backend, device):
    x, row = torch.randn(1, 8, 16, device=device), torch.randn(1, 2, 16, device=device)
    with pytest.raises(NotImplementedError, match=rf"segment_adaln on backend '{backend}' has no forward-mode"):
        torch.func.jvp(lambda x: adaln_modulate(x, row, row, segment_length=4, backend=backend), (x,), (x,))


def test_attention_on_a_named_backend_refuses_tangents():
    q = torch.randn(1, 2, 8, 8)
    with pytest.raises(NotImplementedError, match="segment_attention on backend 'cpu' has no forward-mode"):
        torch.func.jvp(lambda q: block_causal_attention(q, q, q, segment_length=4, backend="cpu"), (q,), (q,))


def test_sampling_refuses_tangents(device):
    q = torch.randn(1, 2, 4, 8, device=device)
    cache = HistoryCache(1, 1, 2, 8, 8, device=device)
    with pytest.raises(NotImplementedError, match=r"history_attention does not run under torch\.func"):
        torch.func.jvp(lambda q: history_attention(q, q, q, cache, layer=0), (q,), (q,))
    assert cache.length == 0


def test_compiled_jvp(device):
    function, exact, shapes = OPS["block_causal_attention"]
    inputs, tangents = draw(shapes, device), draw(shapes, device)
    expected = torch.func.jvp(exact, inputs, tangents)[1]

    def tangent(inputs, tangents, backend):
        return torch.func.jvp(lambda *x: function(*x, backend=backend), inputs, tangents)[1]

    for backend, fullgraph in (("torch", True), (None, False)):
        compiled = torch.compile(tangent, backend="aot_eager", fullgraph=fullgraph)
        close(compiled(inputs, tangents, backend), expected)
    x, row = torch.randn(1, 8, 16), torch.randn(1, 2, 16)  # backend "cpu"

    def on_cpu(x):
        return torch.func.jvp(lambda x: adaln_modulate(x, row, row, segment_length=4, backend="cpu"), (x,), (x,))

    with pytest.raises(NotImplementedError, match="on backend 'cpu' has no forward-mode derivative"):
        torch.compile(on_cpu, backend="aot_eager")(x)
