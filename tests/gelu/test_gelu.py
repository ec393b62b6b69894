"""`gelu` against float64: values, gradients, memory orders, what is not finite, instruction sets, threads, contract."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import ard_kernels
from ard_kernels import gelu
from ard_kernels.common import extension
from testing.devices import on_devices
from testing.oracle import BACKWARD_FACTOR, assert_close

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
on_every_backend = pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu"))
MEMORY = {
    "dense": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "strided": lambda x: torch.stack((x, x), -1)[..., 0],
    "expanded": lambda x: x[:1].expand_as(x),
    "offset": lambda x: torch.cat((x.flatten()[:1], x.flatten()))[1:].view_as(x),
}


def results(function, x, grad):
    """y and dx."""
    leaf = x.detach().requires_grad_()
    y = function(leaf)
    return y, torch.autograd.grad(y, leaf, grad.to(y.dtype))[0]


def plain(x):
    return F.gelu(x, approximate="tanh")


def check(x, backend):
    grad = torch.randn_like(x)
    got, peer, exact = (results(f, x, grad) for f in (lambda x: gelu(x, backend=backend), plain, plain64))
    assert got[0].dtype == x.dtype and got[0].stride() == torch.empty_like(x).stride()
    assert_close(got[0], peer[0], exact[0], label="y")
    assert_close(got[1], peer[1], exact[1], factor=BACKWARD_FACTOR, label="dx")


def plain64(x):
    return plain(x.double())


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
def test_values_and_gradients(backend, device, dtype, memory):
    check(MEMORY[memory](torch.randn(37, 75, dtype=dtype, device=device) * 3), backend)


@pytest.mark.parametrize(("backend", "device"), on_devices("cpu"))
def test_drawn_sizes(backend, device):
    @settings(max_examples=60)
    @given(n=st.integers(1, 5000), dtype=st.sampled_from(DTYPES), scale=st.sampled_from([1e-3, 1.0, 30.0]))
    def draw(n, dtype, scale):
        check(torch.randn(n, generator=torch.Generator().manual_seed(n)).mul(scale).to(dtype), backend)

    draw()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_of_this_cpu(dtype):
    best = extension.module.cpu_isa()
    try:
        for name in extension.module.cpu_isas():
            extension.module.use_cpu_isa(name)
            check(torch.randn(5, 2053, dtype=dtype) * 3, "cpu")
            # From -20 on y is less than the smallest number beside 1.
            steps = torch.linspace(-20, 20, 40001)
            assert (gelu(steps, backend="cpu") - plain64(steps)).abs().max() < 2e-6
    finally:
        extension.module.use_cpu_isa(best)


@on_every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_is_as_in_pytorch(backend, device, dtype):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e20, -1e20, 88.0, -88.0, 0.0, -0.0], device=device)
    got, expected = (results(f, x.to(dtype), torch.ones_like(x)) for f in (lambda x: gelu(x, backend=backend), plain))
    torch.testing.assert_close(got, expected, equal_nan=True)
    assert torch.equal(got[0].signbit()[-2:], expected[0].signbit()[-2:])


@pytest.mark.parametrize(("backend", "device"), on_devices("cpu"))  # PyTorch's kernel rounds by where a thread ends
def test_bit_equal_over_runs_and_threads(backend, device):
    x, grad = (torch.randn(300, 1000, device=device) for _ in range(2))
    before, first = torch.get_num_threads(), results(lambda x: gelu(x, backend=backend), x, grad)
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            again = results(lambda x: gelu(x, backend=backend), x, grad)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), f"{count} threads"
    finally:
        torch.set_num_threads(before)


@on_every_backend
def test_opcheck(backend, device):
    x = torch.randn(3, 40, device=device, requires_grad=True)
    torch.library.opcheck(torch.ops.ard.gelu, (x, backend))
    torch.library.opcheck(torch.ops.ard.gelu_backward, (torch.randn_like(x), x.detach(), backend))


@on_every_backend
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_to_one_graph(backend, device, dynamic):
    def layer(x):
        return gelu(x.sin(), backend=backend) * 2

    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (8, 24):
        x = torch.randn(n, 40, device=device)
        torch.testing.assert_close(results(compiled, x, x), results(layer, x, x))


@on_every_backend
def test_autocast_leaves_it_alone(backend, device):
    x = torch.randn(64, device=device)
    with torch.autocast(device, torch.bfloat16):
        assert torch.equal(gelu(x, backend=backend), gelu(x, backend=backend).float())


def test_derivatives(device):
    x, tangent = (torch.randn(50, dtype=torch.float64, device=device) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x: gelu(x, backend="torch"), x.requires_grad_())
    got, expected = (torch.func.jvp(f, (x.detach(),), (tangent,)) for f in (gelu, plain))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(
        torch.func.grad(lambda x: gelu(x).sum())(x), torch.func.grad(lambda x: plain(x).sum())(x)
    )


def test_automatic_choice_and_empty_input(device):
    assert gelu(torch.randn(0, 3, device=device, requires_grad=True)).shape == (0, 3)
    x = torch.randn(2000, device=device)
    assert torch.equal(gelu(x), gelu(x, backend="cpu" if device.type == "cpu" else "torch"))


BAD = {
    "no tensor": (lambda: gelu([1.0]), r"gelu: x is \[1.0\]; expected a tensor"),
    "integers": (lambda: gelu(torch.arange(4)), "gelu: x has dtype torch.int64; expected"),
    "sparse": (lambda: gelu(torch.eye(3).to_sparse()), "expected a dense one"),
    "fp64": (lambda: gelu(torch.zeros(4).double(), backend="cpu"), "backend 'cpu' .* cannot run"),
    "backend": (lambda: gelu(torch.zeros(4), backend="triton"), "gelu has no triton implementation"),
    "raw integers": (lambda: torch.ops.ard.gelu(torch.arange(4), "cpu"), "gelu: x has dtype torch.int64; expected"),
    "raw dtype": (lambda: torch.ops.ard.gelu(torch.zeros(4).double(), "cpu"), "cannot run"),
    "raw grad": (
        lambda: torch.ops.ard.gelu_backward(torch.zeros(3), torch.zeros(4), "cpu"),
        r"grad is .* shape \(3,\)",
    ),
}


@pytest.mark.parametrize(("call", "message"), BAD.values(), ids=BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_listed_in_backends():
    status = ard_kernels.backends("cpu")["gelu"]
    assert status["cpu"].available and status["torch"].available and not status["cuda"].available
