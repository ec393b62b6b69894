"""The public contract of the adaLN family: errors, determinism, threads, compile, autocast, opcheck."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ard_kernels
from ard_kernels import adaln_modulate, gate_residual, gate_residual_adaln
from testing.devices import on_devices, simulated_exhaustive, simulated_slow

on_every_backend = pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton", "cuda"))

BAD = {
    "rank": (lambda x, r: (x[0], r, r), {}, "x has shape .*; expected 3 dims"),
    "tokens": (
        lambda x, r: (x, r, r),
        {"segment_length": 7},
        "x has 24 tokens; expected a multiple of",
    ),
    "rows": (lambda x, r: (x, r[:, :2], r), {}, r"shift has shape \(2, 2, 16\); expected \(2, 3, 16\) .per segment."),
    "rows_differ": (lambda x, r: (x, r, x), {}, r"scale has shape \(2, 24, 16\); expected shift's \(2, 3, 16\)"),
    "width": (lambda x, r: (x, r[..., :8], r), {}, "shift has shape"),
    "row_dtype": (lambda x, r: (x, r, r.half()), {}, "scale has dtype torch.float16; expected a float dtype equal to"),
    "dtype": (lambda x, r: (x.long(), r, r), {}, "x has dtype torch.int64; expected float32"),
    "device": (lambda x, r: (x, r, r.to("meta")), {}, "scale is on meta; expected x's (cpu|cuda)"),
    "eps": (lambda x, r: (x, r, r), {"eps": 0.0}, "eps is 0.0; expected a positive number"),
    "fp64": (
        lambda x, r: (x.double(), r, r),
        {"backend": "cpu"},
        "(float64 is served by the torch backend only|reads host memory)",
    ),
    "cuda_width": (
        lambda x, r: (x[..., :12], r[..., :12], r[..., :12]),
        {"backend": "cuda"},
        "(C is 12; it takes multiples of 8 up to 8192|runs in the emulator of testing/emulator only)",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "message"), BAD.values(), ids=BAD)
@pytest.mark.usefixtures("emulated_beside_no_gpu")
def test_bad_input(make, arguments, message, device):
    x, rows = torch.randn(2, 24, 16, device=device), torch.randn(2, 3, 16, device=device)
    with pytest.raises(ValueError, match=f"adaln_modulate: .*{message}"):
        adaln_modulate(*make(x, rows), **{"segment_length": 8, **arguments})


def test_bad_branch_and_gate(device):
    x, rows = torch.randn(2, 24, 16, device=device), torch.randn(2, 3, 16, device=device)
    with pytest.raises(ValueError, match=r"gate_residual: branch has shape .*; expected x's"):
        gate_residual(x, x[:, :8], rows, segment_length=8)
    with pytest.raises(ValueError, match=r"gate_residual_adaln: shift has shape .*; expected gate's"):
        gate_residual_adaln(x, x, rows, x, x, segment_length=8)


def inputs(device, B=2, T=96, S=3, C=72, dtype=torch.float32, grad=True):
    shapes = [(B, T, C)] * 2 + [(B, S, C)] * 3
    return [torch.randn(shape, device=device).to(dtype).requires_grad_(grad) for shape in shapes]


@pytest.mark.parametrize(
    ("backend", "device", "T", "C"),
    on_devices(
        torch=[(96, 72), (1024, 384)], cpu=[(96, 72), (1024, 384)], triton=[(32, 72)], cuda=[(32, 72), (32, 384)]
    ),
)
def test_bit_equal_over_runs_and_threads(backend, device, T, C, thread_counts):
    tensors = inputs(device, T=T, S=2, C=C)
    grads = torch.randn(2, 2, T, C, device=device)

    def run():
        h, y = gate_residual_adaln(*tensors, segment_length=T // 2, backend=backend)
        return h, y, *torch.autograd.grad((h, y), tensors, tuple(grads))

    first = run()
    for count in thread_counts():
        for _ in range(1 if backend in ("triton", "cuda") else 3):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


@pytest.mark.parametrize(("backend", "device"), simulated_exhaustive(on_devices("torch", "cpu", "triton", "cuda")))
def test_compiles_to_one_graph(backend, device):
    """Of any sizes; of fixed ones: test_variants.py."""

    def layer(x, rows):
        gate, shift, scale = rows.chunk(3, -1)
        y = adaln_modulate(x, shift, scale, segment_length=8, backend=backend)
        h, y = gate_residual_adaln(x, y.sin(), gate, shift, scale, segment_length=8, backend=backend)
        return gate_residual(h, y, gate, segment_length=8, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for B, S in ((1, 2), (2, 3)):
        x, rows = (torch.randn(shape, device=device, requires_grad=True) for shape in ((B, 8 * S, 16), (B, S, 48)))
        results = [torch.autograd.grad(f(x, rows).sum(), (x, rows)) for f in (compiled, layer)]
        torch.testing.assert_close(*results)


@pytest.mark.usefixtures("emulated_beside_no_gpu")
def test_compiles_with_inductor_and_follows_use_backend(device):
    x, branch, gate, shift, scale = inputs(device, grad=False)
    compiled = torch.compile(
        lambda: gate_residual_adaln(x.sin(), branch, gate, shift, scale, segment_length=32), fullgraph=True
    )
    for name in (
        param.values[0] for param in on_devices("torch", "cpu", "triton", "cuda") if param.values[1] == device.type
    ):
        with ard_kernels.use_backend(name):
            expected = gate_residual_adaln(x.sin(), branch, gate, shift, scale, segment_length=32)
            torch.testing.assert_close(compiled(), expected)


@on_every_backend
def test_autocast_gives_the_next_matmul_its_dtype(backend, device):
    """y comes in the autocast dtype, the residual h stays fp32; gradients return in each input's dtype."""
    x, branch, *rows = inputs(device)
    rows = [row.detach().bfloat16().requires_grad_() for row in rows]
    with torch.autocast(device, torch.bfloat16):
        h, y = gate_residual_adaln(x, branch.bfloat16(), *rows, segment_length=32, backend=backend)
        z = adaln_modulate(x, *rows[1:], segment_length=32, backend=backend)
    assert (h.dtype, y.dtype, z.dtype) == (torch.float32, torch.bfloat16, torch.bfloat16)
    expected = gate_residual_adaln(x, branch.bfloat16().float(), *(r.float() for r in rows), segment_length=32)
    torch.testing.assert_close(h, expected[0])
    torch.testing.assert_close(y, expected[1].bfloat16(), rtol=1e-2, atol=1e-2)
    (y.float().sum() + h.sum() + z.float().sum()).backward()
    assert x.grad.dtype == torch.float32 and rows[0].grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_float64_residual_takes_a_branch_of_any_dtype(device, dtype):
    """Also under torch.func, where the backward checks what it is given."""
    x, branch, gate, *_ = inputs(device, dtype=torch.float64)
    leaves = x, branch.detach().to(dtype).requires_grad_(), gate

    def total(x, branch, gate):
        return gate_residual(x, branch, gate, segment_length=32).square().sum()

    expected = torch.autograd.grad(total(*leaves), leaves)
    gradients = torch.func.grad(total, (0, 1, 2))(*(leaf.detach() for leaf in leaves))
    for gradient, own in zip(gradients, expected, strict=True):
        assert gradient.dtype == own.dtype and torch.equal(gradient, own)


@pytest.mark.parametrize("norm", [None, "layer", "rms"])
@on_every_backend
def test_outputs_are_what_compilers_expect_of_them(backend, device, norm):
    """In any memory order of the inputs, and of rows of another dtype than x without a shift to tell it."""
    x, branch, gate, _, scale = inputs(device, B=2, T=12, C=24, grad=False)
    x, branch = (t.transpose(0, 1).contiguous().transpose(0, 1) for t in (x, branch))
    gate, scale = gate.bfloat16(), None if norm is None else scale.bfloat16()
    forward, backward = torch.ops.ard.segment_adaln, torch.ops.ard.segment_adaln_backward
    call = (x, branch, gate, None, scale, None, None, [4], norm, 1e-6, torch.float32, backend)
    grads, h = (x, None if norm is None else x), None if norm is None else x
    wanted = [True, False, norm is not None, False, False]
    gradients = (*grads, h, branch, gate, scale, None, None, *forward(*call)[2:], [4], None, wanted, backend)
    for op, arguments in ((forward, call), (backward, gradients)):
        torch.library.opcheck(op, arguments, test_utils="test_faketensor")


def test_one_channel_of_any_stride(device):
    """contiguous() leaves it."""
    x, gate = torch.randn(2, 1, 24, device=device).mT, torch.randn(2, 3, 1, device=device)
    gradient = torch.func.grad(lambda x: gate_residual(x, x, gate, segment_length=8).sum())(x)
    torch.testing.assert_close(gradient, 1 + gate.repeat_interleave(8, 1))


def test_counted_as_no_flops(device):
    """conv, linear and attention are counted; the adaLN ops add nothing to that."""
    with FlopCounterMode(display=False) as counter:
        h, y = gate_residual_adaln(*inputs(device), segment_length=32)
        (h.sum() + y.sum()).backward()
    assert counter.get_total_flops() == 0


@pytest.mark.parametrize(
    ("backend", "device", "lengths", "dtype"),
    simulated_slow(
        on_devices(
            torch=[([4], torch.float32)],
            cpu=[([2, 10], torch.bfloat16)],
            triton=[([1], torch.float32)],
            cuda=[([2, 10], torch.bfloat16)],
        )
    ),
)
def test_opcheck(backend, device, lengths, dtype):
    segments = 12 // lengths[0] if len(lengths) == 1 else len(lengths)
    x, branch, gate, shift, scale = inputs(device, B=1, T=12, S=segments, C=24, dtype=dtype)
    forward, backward = torch.ops.ard.segment_adaln, torch.ops.ard.segment_adaln_backward
    affine, settings = (None, None), (lengths, "layer", 1e-6, dtype, backend)
    checks = [
        (forward, (x, None, None, shift, scale, *affine, *settings)),
        (forward, (x, branch, gate, shift, scale, *affine, *settings)),
        (forward, (x, branch, gate, None, None, *affine, lengths, None, *settings[2:])),
    ]
    with torch.no_grad():
        _, y, mean, rstd = forward(*checks[0][1])
    x, branch, gate, scale = (t.detach() for t in (x, branch, gate, scale))
    statistics, settings = (mean, rstd), (lengths, dtype, [True, True, True, False, False], backend)
    of_gate, of_shift, nothing = [True, *[False] * 4], [False, True, *[False] * 3], [None] * 5
    checks += [
        (
            backward,
            (None, y, x, None, None, scale, *affine, *statistics, lengths, dtype, [False, *settings[2][1:]], backend),
        ),
        # A shift of another dtype than x's, which nothing but row_dtype tells.
        (backward, (None, y, x, *[None] * 5, *statistics, lengths, torch.float32, of_shift, backend)),
        (backward, (x, y, x, branch, gate, scale, *affine, *statistics, *settings)),
        (backward, (None, y, x, branch, gate, scale, *affine, *statistics, *settings)),
        (backward, (x, None, None, branch, gate, *nothing, lengths, None, of_gate, backend)),
    ]
    for op, arguments in checks:
        torch.library.opcheck(op, arguments)


@on_every_backend
def test_offsets_beyond_int32(backend, device):
    """Two samples more than 2**31 elements apart; the memory between them is reserved, never touched."""
    storage = torch.empty(2**31 + 4096, dtype=torch.bfloat16, device=device)
    far = storage.as_strided((2, 16, 24), (2**31 + 64, 24, 1))
    near = torch.randn(2, 16, 24, device=device).bfloat16()
    far.copy_(near)
    rows = torch.randn(2, 2, 24, device=device)
    got = gate_residual_adaln(far, far, rows, rows, rows, segment_length=8, backend=backend)
    expected = gate_residual_adaln(near, near, rows, rows, rows, segment_length=8, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
