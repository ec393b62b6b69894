"""The public contract: errors, determinism, threads, compile, autocast, opcheck, FLOPs."""

import sys

import numpy
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import ard_kernels
from ard_kernels import block_causal_attention, block_causal_attention_packed
from ard_kernels.block_causal_attention import cuda
from ard_kernels.block_causal_attention.mask import causal_code
from ard_kernels.block_causal_attention.spec import useful_pairs
from ard_kernels.common import extension, gpu_support
from testing.devices import on_devices, simulated_exhaustive, simulated_slow

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
SERVED = on_devices(torch=[(16, FP32)], cpu=[(16, FP32)], triton=[(16, FP32)], cuda=[(64, BF16)])


def qkv(*shape, dtype=torch.float32, grad=False, device="cpu"):
    return tuple(torch.randn(shape, device=device).to(dtype).requires_grad_(grad) for _ in range(3))


BAD = {
    "tokens": (lambda q: (q, q, q), {"segment_length": 256}, "q has 1000 tokens; expected a multiple of"),
    "zero_length": (lambda q: (q, q, q), {"segment_length": 0}, "segment_length is 0; expected an int >= 1 .tokens."),
    "ragged_sum": (lambda q: (q, q, q), {"segment_length": [10, 20]}, "sums to 30; expected the 1000 tokens of q"),
    "ragged_zero": (
        lambda q: (q, q, q),
        {"segment_length": [1000, 0]},
        r"segment_length\[1\] is 0; expected an int >= 1",
    ),
    "float_length": (
        lambda q: (q, q, q),
        {"segment_length": 100.0},
        "segment_length is 100.0; expected an int or a sequence",
    ),
    "window": (lambda q: (q, q, q), {"segment_length": 100, "window": 0}, "window is 0; expected None or an int >= 1"),
    "sink": (lambda q: (q, q, q), {"segment_length": 100, "sink": -1}, "sink is -1; expected an int >= 0"),
    "layout": (lambda q: (q, q, q), {"segment_length": 100, "layout": "bhdt"}, "expected 'bhtd' or 'bthd'"),
    "rank": (lambda q: (q[0], q[0], q[0]), {"segment_length": 100}, "q has shape .*; expected 4 dims"),
    "shape": (lambda q: (q, q[:, :, :500], q), {"segment_length": 100}, "k has shape .*; expected q's"),
    "dtype": (lambda q: (q, q, q.half()), {"segment_length": 100}, "v has dtype torch.float16; expected q's"),
    "int_dtype": (lambda q: (q.int(),) * 3, {"segment_length": 100}, "q has dtype torch.int32; expected float32"),
    "device": (lambda q: (q, q.to("meta"), q), {"segment_length": 100}, "k is on meta; expected q's (cpu|cuda)"),
    "head_dim": (lambda q: (q[..., :12],) * 3, {"segment_length": 100}, "q has head dim 12; expected a multiple of 8"),
    "backend": (lambda q: (q, q, q), {"segment_length": 100, "backend": "nope"}, "unknown backend"),
    "no_cuda": (
        lambda q: (q, q, q),
        {"segment_length": 100, "backend": "cuda"},
        "'cuda' .argument backend. cannot",
    ),
    "cpu": (
        lambda q: (q.double(),) * 3,
        {"segment_length": 100, "backend": "cpu"},
        "'cpu' .argument backend. cannot run on (cpu .*: float64 is served by|cuda .*: tensors are on cuda)",
    ),
}


@pytest.mark.parametrize(("make", "arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input(make, arguments, message, device):
    q = torch.randn(1, 2, 1000, 16, device=device)
    with pytest.raises(ValueError, match=f"block_causal_attention: .*{message}"):
        block_causal_attention(*make(q), **arguments)


def test_lengths_may_come_as_a_tensor_or_array(device):
    q, k, v = qkv(1, 2, 32, 16, device=device)
    expected = block_causal_attention(q, k, v, segment_length=[8, 24])
    for lengths in (torch.tensor([8, 24]), numpy.array([8, 24]), (8, 24)):
        assert torch.equal(block_causal_attention(q, k, v, segment_length=lengths), expected)
    assert block_causal_attention(q, k, v, segment_length=numpy.int64(16)).shape == q.shape


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), SERVED)
def test_double_backward_is_refused(backend, device, D, dtype):
    q, k, v = qkv(1, 2, 32, D, dtype=dtype, grad=True, device=device)
    out = block_causal_attention(q, k, v, segment_length=16, backend=backend)
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="gradients of gradients are not supported"):
        torch.autograd.grad(grad.sum(), q)


@pytest.mark.parametrize(
    ("backend", "device", "length", "heads", "dtype"),
    on_devices(
        torch=[(16, 4, FP32), (64, 4, FP32)],
        cpu=[(16, 4, FP32), (64, 4, BF16)],
        triton=[(8, 1, FP32)],
        cuda=[(16, 1, BF16)],
    ),
)
def test_bit_equal_over_runs_and_threads(backend, device, length, heads, dtype, thread_counts):
    q, k, v = qkv(2, heads, 4 * length, 72, dtype=dtype, grad=True, device=device)
    grad_out = torch.randn_like(q)

    def run():
        out = block_causal_attention(q, k, v, segment_length=length, backend=backend)
        return out, *torch.autograd.grad(out, (q, k, v), grad_out)

    first = run()
    # With backend torch it depends on the chip whether PyTorch's matmuls round by the number of threads.
    for count in [torch.get_num_threads()] if backend == "torch" else thread_counts():
        for _ in range(3 if backend in ("torch", "cpu") else 1):
            assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


@pytest.mark.parametrize("segment_length", [16, [8, 40, 16]])
@pytest.mark.parametrize("mask", [(None, 0), (1, 0), (1, 1)])
def test_flop_counter_counts_the_useful_pairs(segment_length, mask, device):
    q, k, v = qkv(2, 3, 64, 24, grad=True, device=device)
    lengths = [segment_length] if isinstance(segment_length, int) else segment_length
    pairs = useful_pairs(lengths, 64, *mask)
    with FlopCounterMode(display=False) as counter:
        out = block_causal_attention(q, k, v, segment_length=segment_length, window=mask[0], sink=mask[1])
    assert counter.get_total_flops() == 4 * 2 * 3 * 24 * pairs
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 10 * 2 * 3 * 24 * pairs
    packed = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)
    with FlopCounterMode(display=False) as counter:
        out = block_causal_attention_packed(packed, segment_length=segment_length, window=mask[0], sink=mask[1])
        out.sum().backward()
    assert counter.get_total_flops() == 14 * 2 * 3 * 24 * pairs


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 48, 4, 2, 16), r"qkv has shape .*; expected 5 dims \(B, T, 3, H, D\)"),
        ((2, 48, 3, 16), r"qkv has shape .*; expected 5 dims \(B, T, 3, H, D\)"),
        ((2, 48, 3, 2, 12), "qkv has head dim 12; expected a multiple of 8"),
        ((2, 40, 3, 2, 16), "qkv has 40 tokens; expected a multiple of segment_length=16"),
    ],
)
def test_bad_packed_input(shape, message, device):
    with pytest.raises(ValueError, match=f"block_causal_attention_packed: {message}"):
        block_causal_attention_packed(torch.randn(shape, device=device), segment_length=16)


@pytest.mark.parametrize(("backend", "device", "D", "dtype"), simulated_exhaustive(SERVED))
def test_compiles_to_one_graph(backend, device, D, dtype):
    """Of any sizes; of fixed ones: test_compiles_with_inductor, and test_segments.py."""

    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def layer(x, window):
        B, T, C = x.shape
        q, k, v = (x * 2).view(B, T, 3, 1, C // 3).unbind(2)
        out = block_causal_attention(q, k, v, segment_length=8, window=window, layout="bthd", backend=backend)
        return out.reshape(B, T, C // 3).sin()

    for B, T in ((1, 24), (2, 32)):
        x = torch.randn(B, T, 3 * D, device=device).to(dtype).requires_grad_()
        out = layer(x, 2)
        expected = layer._torchdynamo_orig_callable(x, 2)
        torch.testing.assert_close(out, expected)
        grads = [torch.autograd.grad(y.sum(), x)[0] for y in (out, expected)]
        torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("backend", "device", "D", "dtype"),
    simulated_exhaustive(on_devices(torch=[(16, FP32)], cpu=[(16, FP32)], triton=[(16, FP32)], cuda=[(72, FP16)])),
)
def test_compiles_with_inductor(backend, device, D, dtype):
    def layer(q, k, v):
        return block_causal_attention(q * 2, k, v, segment_length=16, backend=backend).sin()

    q, k, v = qkv(2, 2, 48, D, dtype=dtype, device=device)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(q, k, v), layer(q, k, v))


@pytest.mark.parametrize(("backend", "device"), on_devices("torch", "cpu", "triton", "cuda"))
def test_autocast_casts_as_sdpa_does(backend, device):
    q, k, v = qkv(1, 2, 32, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        out = block_causal_attention(q, k, v, segment_length=16, backend=backend)
    assert out.dtype == torch.bfloat16
    halves = (x.bfloat16() for x in (q, k, v))
    assert torch.equal(out, block_causal_attention(*halves, segment_length=16, backend=backend))


@pytest.mark.parametrize(
    ("backend", "device", "D", "dtype", "lengths", "window", "sink"),
    simulated_slow(
        on_devices(
            torch=[(16, FP32, [3, 8, 5], 1, 1)],
            cpu=[(16, BF16, [8], None, 0)],
            triton=[(16, BF16, [3, 8, 5], 1, 1)],
            cuda=[(72, BF16, [8], 1, 0)],
        )
    ),
)
def test_opcheck(backend, device, D, dtype, lengths, window, sink):
    q, k, v = qkv(2, 1, 16, D, dtype=dtype, grad=True, device=device)
    packed_settings = (causal_code(window, sink), lengths, 0.25, backend)
    settings = (causal_code(window, sink), lengths, lengths, 0.25, backend)
    torch.library.opcheck(torch.ops.ard.segment_attention, (q, k, v, *settings))
    out, lse = (x.detach() for x in torch.ops.ard.segment_attention(q, k, v, *settings))
    inputs = (torch.randn_like(out), None, *(x.detach() for x in (q, k, v)), out, lse, *settings)
    torch.library.opcheck(torch.ops.ard.segment_attention_backward, inputs)
    packed = torch.stack((q, k, v)).permute(1, 3, 0, 2, 4)
    torch.library.opcheck(torch.ops.ard.segment_attention_packed, (packed, *packed_settings))
    inputs = (torch.randn_like(out), None, packed.detach(), out, lse, *packed_settings)
    torch.library.opcheck(torch.ops.ard.segment_attention_packed_backward, inputs)


def test_use_backend_and_environment(monkeypatch):
    q, k, v = qkv(1, 1, 32, 16, dtype=torch.float64)
    with ard_kernels.use_backend("cpu"), pytest.raises(ValueError, match=r"'cpu' \(use_backend\) cannot run"):
        block_causal_attention(q, k, v, segment_length=16)
    with ard_kernels.use_backend("cpu"), ard_kernels.use_backend("torch"):
        block_causal_attention(q, k, v, segment_length=16)
    with ard_kernels.use_backend("cpu"):  # the argument wins
        block_causal_attention(q, k, v, segment_length=16, backend="torch")
    monkeypatch.setattr(sys.modules["ard_kernels.common.backends"], "_environment", "cuda")
    with pytest.raises(ValueError, match=r"'cuda' \(environment ARD_BACKEND\)"):
        block_causal_attention(q, k, v, segment_length=16)
    with pytest.raises(ValueError, match="name is 'nope'; expected one of"), ard_kernels.use_backend("nope"):
        pass


def test_backends_lists_a_reason_for_every_refusal(device):
    table = ard_kernels.backends(device)["block_causal_attention"]
    assert table["torch"].available and not table["torch"].reason
    assert all(status.reason for status in table.values() if not status.available)


@pytest.mark.simulated
def test_the_interpreter_is_never_the_automatic_choice(monkeypatch):
    module = sys.modules["ard_kernels.common.backends"]
    assert ard_kernels.backends("cpu")["block_causal_attention"]["triton"].available
    assert module.resolve("block_causal_attention", None, torch.device("cpu"), torch.float32, 16) == "cpu"
    assert module.resolve("block_causal_attention", None, torch.device("cpu"), torch.float64, 16) == "torch"
    monkeypatch.setattr(ard_kernels.common.triton_support, "INTERPRETING", False)
    q, k, v = qkv(1, 1, 32, 16)
    with pytest.raises(ValueError, match="runs in Triton's interpreter only"):
        block_causal_attention(q, k, v, segment_length=16, backend="triton")
    q, k, v = qkv(1, 1, 32, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="float64 is served by the torch backend only"):
        block_causal_attention(q, k, v, segment_length=16, backend="triton")


@pytest.mark.parametrize(("arch", "served"), [(80, cuda.HEAD_DIMS), (86, (64, 72, 80)), (90, cuda.HEAD_DIMS)])
@pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))
def test_what_the_cuda_kernels_refuse(backend, device, arch, served, monkeypatch):
    """float32, head dims that are not compiled, and those whose tiles do not fit a block's shared memory."""
    device = torch.device(device)
    monkeypatch.setattr(gpu_support, "architecture", lambda device: arch)
    assert tuple(extension.gpu(device).attention_shared_bytes) == cuda.HEAD_DIMS
    assert tuple(D for D in range(8, 257, 8) if cuda.refuses(device, torch.bfloat16, D) is None) == served
    assert "tensor-core" in cuda.refuses(device, torch.float32, 72)
    assert "not compiled; expected one of 64, 72" in cuda.refuses(device, torch.float16, 40)
    if arch == 86:
        assert "shared memory" in cuda.refuses(device, torch.float16, 128)
