"""The C++ kernels of attention on the CPU: instruction sets, threads, memory, numbers at the edges, drawn calls."""

import os
import subprocess
import sys
import threading

import pytest
import torch

import ard_kernels as ak
from ard_kernels import SegmentMask, segment_attention
from ard_kernels.block_causal_attention import cpu
from ard_kernels.block_causal_attention.spec import Segments, empty_output
from ard_kernels.common import extension, kinds
from testing.attention_checks import MEMORY, check, hold, leaves
from testing.devices import DEVICES

pytestmark = pytest.mark.skipif("cpu" not in DEVICES, reason="these kernels run on the CPU")
FP32, BF16, FP16 = DTYPES = torch.float32, torch.bfloat16, torch.float16
NAN = float("nan")
ISAS = extension.module.cpu_isas() if extension.module else ()
HOLES = SegmentMask([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [1, 1, 0, 0, 1], [0, 1, 0, 0, 0]])  # row 1 and column 3: empty


@pytest.fixture(params=ISAS)
def isa(request):
    """Each instruction set of this CPU, in use while the test runs."""
    best = extension.module.cpu_isa()
    extension.module.use_cpu_isa(request.param)
    yield request.param
    extension.module.use_cpu_isa(best)


def run(q, k, v, mask, q_lengths, k_lengths=None, backend="cpu", seed=1, scale=None):
    """out, lse, and dq, dk, dv for a gradient of both."""
    how = {"segment_length": q_lengths, "key_segment_length": k_lengths, "scale": scale, "backend": backend}
    out, lse = segment_attention(q, k, v, mask, return_lse=True, **how)
    generator = torch.Generator().manual_seed(seed)
    grad_out, grad_lse = (torch.randn(x.shape, generator=generator).to(x.dtype) for x in (out, lse))
    return out, lse, *torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse))


def same(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# (B, H, kv_heads, lengths, D, dtype, mask): all but the last are work enough for several threads.
SIZES = {
    "heads": (2, 4, 4, [64] * 4, 72, FP32, SegmentMask.block_causal(4)),
    "one head, cut": (1, 1, 1, [600, 7, 500], 64, FP32, SegmentMask.block_causal(3)),
    "one key head, cut": (1, 6, 1, [100, 200, 30], 40, BF16, SegmentMask.block_causal(3, window=2, sink=1)),
    "tiles across segments": (1, 2, 1, [3, 5, 1, 2] * 40, 24, FP16, SegmentMask.block_causal(160, window=30)),
    "teacher forcing": (3, 2, 2, [9, 40, 33] * 2, 128, FP32, SegmentMask.teacher_forcing(3)),
    "one tile": (1, 1, 1, [20], 16, FP32, SegmentMask.block_causal(1)),
}


@pytest.mark.parametrize(("B", "H", "kv_heads", "lengths", "D", "dtype", "mask"), SIZES.values(), ids=SIZES)
def test_bit_equal_over_threads_and_runs(isa, B, H, kv_heads, lengths, D, dtype, mask, thread_counts):
    inputs = leaves("cpu", dtype, B, H, kv_heads, sum(lengths), sum(lengths), D)
    first = run(*inputs, mask, lengths)
    for count in thread_counts():
        for _ in range(2):
            assert same(first, run(*inputs, mask, lengths)), f"{count} threads"


def test_calls_of_several_threads_at_once(thread_counts):
    """Each thread of Python has scratch of its own, as its threads of OpenMP have."""
    mask, lengths = SegmentMask.block_causal(3), [100, 30, 64]
    calls = [leaves("cpu", dtype, 2, 2, 1, 194, 194, D) for dtype in (FP32, BF16) for D in (16, 80, 256)]
    expected, wrong = [run(*inputs, mask, lengths) for inputs in calls], []

    def work(i):
        for _ in range(3):
            if not same(expected[i], run(*calls[i], mask, lengths)):
                wrong.append(i)

    for _ in thread_counts():
        threads = [threading.Thread(target=work, args=(i,)) for i in range(len(calls))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set_of_this_cpu(isa, dtype, poisoned):
    for D in (8, 24, 72, 136, 256):
        check("cpu", "cpu", HOLES, [30, 4, 21, 70], [16, 16, 40, 5, 130], 2, 2, 2, D, dtype)
    check("cpu", "cpu", SegmentMask.block_causal(4), [130, 64, 65, 1], [130, 64, 65, 1], D=80, dtype=dtype)


@pytest.mark.parametrize("D", range(8, 257, 8))
def test_every_head_dim(D, poisoned):
    check("cpu", "cpu", SegmentMask.block_causal(3), [5, 1, 66], [5, 1, 66], share=2, D=D)


@pytest.mark.parametrize(
    ("heads", "q_lengths", "k_lengths"),
    [
        ((1, 1), [1], [1]),
        ((2, 8), [1], [300]),  # a step of a decoder
        ((1, 4), [300], [1]),
        ((1, 12), [64, 64], [64, 64]),
        ((3, 2), [1] * 70, [1] * 70),
        ((4, 1), [63, 65, 64], [17, 1, 500]),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_and_lengths(heads, q_lengths, k_lengths, dtype, poisoned):
    mask = SegmentMask.block_causal(len(q_lengths))
    check("cpu", "cpu", mask, q_lengths, k_lengths, 1, *heads, 16, dtype, drawn=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("memory", MEMORY)
def test_memory_is_read_where_it_is(memory, dtype, monkeypatch):
    """Bit-equal to contiguous tensors, without a copy: of q, k, v in that memory, and of a gradient."""
    addresses, mask, lengths = [], SegmentMask.block_causal(3, window=2), [20, 70, 3]
    forward, backward = cpu.forward, cpu.backward
    monkeypatch.setattr(cpu, "forward", lambda *x: addresses.extend(t.data_ptr() for t in x[:3]) or forward(*x))
    monkeypatch.setattr(cpu, "backward", lambda *x: addresses.append(x[0].data_ptr()) or backward(*x))
    views = [hold(memory, 2, heads, 93, 24, dtype).detach() for heads in (4, 2, 2)]
    grad_out = hold(memory, 2, 4, 93, 24, dtype).detach()
    results = []
    for tensors in ((*views, grad_out), [x.contiguous() for x in (*views, grad_out)]):
        addresses.clear()
        inputs = [x.detach().requires_grad_() for x in tensors[:3]]
        out = segment_attention(*inputs, mask, segment_length=lengths, backend="cpu")
        results.append((out, *torch.autograd.grad(out, inputs, tensors[3])))
        assert addresses == [x.data_ptr() for x in tensors]
    assert same(*results)


def guarded(shape, dtype, sections: int):
    """(memory full of NaN, a (B, H, T, D) view inside it): one of `sections` of a projection."""
    B, H, T, D = shape
    memory = torch.full((B, T + 2, sections, H, D + 8), NAN).to(dtype)
    return memory, memory[:, 1:-1, sections // 2, :, :D].transpose(1, 2)


@pytest.mark.parametrize("sections", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_are_written_wholly_and_nothing_beside_them(isa, dtype, sections):
    """Into views of larger memory: every element of them, no other one; as into memory of their own."""
    lengths, k_lengths = [30, 4, 21, 33], [16, 16, 40, 5, 30]
    segments = Segments(HOLES.code, tuple(lengths), tuple(k_lengths))
    q, k, v = (x.detach() for x in leaves("cpu", dtype, 2, 4, 2, 88, 107, 40))
    shared = q, k, v
    grad_out, grad_lse = torch.randn_like(q), torch.randn(2, 4, 88)
    own = [empty_output(q).fill_(NAN), torch.full((2, 4, 88), NAN)]
    cpu.forward(*shared, *own, segments, 0.2)
    out, lse = own
    assert out.isfinite().all() and not lse.isnan().any()
    lse_memory = torch.full((2 * 4 * 88 + 32,), NAN)
    memories = [guarded(x.shape, dtype, sections) for x in (out, q, k, v)]
    cpu.forward(*shared, memories[0][1], lse_memory[16:-16].view_as(lse), segments, 0.2)
    assert torch.equal(memories[0][1], out) and torch.equal(lse_memory[16:-16].view_as(lse), lse)
    assert lse_memory.isnan().sum() == 32
    grads = [torch.full_like(x, NAN) for x in (q, k, v)]
    for into in (grads, [view for _, view in memories[1:]]):
        cpu.backward(grad_out, grad_lse, q, k, v, out, lse, *into, segments, 0.2)
    for (memory, view), expected in zip(memories, (out, *grads), strict=True):
        assert torch.equal(view, expected) and expected.isfinite().all()
        assert memory.isfinite().sum() == expected.numel(), "written beside the tensor"


def test_offsets_beyond_int32():
    """Samples or tokens more than 2**31 elements apart; the memory between them is reserved, never touched."""
    storage, segments = torch.empty(2**32 + 4096, dtype=BF16), Segments("causal None 0", (2,), (2,))
    near, grad_out = torch.randn(2, 2, 2, 4, 64).bfloat16()
    for strides in ((2**31 + 64, 256, 64, 1), (64, 128, 2**30, 1)):
        far = storage.as_strided(near.shape, strides).copy_(near)
        out, lse = empty_output(near), torch.empty(2, 2, 4)
        for x in (far, near):
            ours = empty_output(near), torch.empty_like(lse)
            cpu.forward(x, x, x, *ours, segments, 0.3)
            assert x is far or same(ours, (out, lse))
            out, lse = ours
        expected, shared = [torch.empty_like(near) for _ in range(3)], (grad_out, None, near, near, near, out, lse)
        cpu.backward(*shared, *expected, segments, 0.3)
        for i in range(3):
            grads = [far if i == other else torch.empty_like(near) for other in range(3)]
            cpu.backward(*shared, *grads, segments, 0.3)
            assert same(grads, expected)


@pytest.mark.parametrize("amx", [True, False], ids=["AMX", "no AMX"])
@pytest.mark.parametrize(("dtype", "L", "gradients"), [(BF16, 128, 0), (BF16, 127, 0), (BF16, 128, 1), (FP16, 128, 0)])
def test_bf16_goes_to_pytorch_where_it_has_been_measured_faster(monkeypatch, amx, dtype, L, gradients):
    monkeypatch.setattr(kinds, "_plans", {})
    monkeypatch.setattr(cpu, "_torch_has_bf16_products", lambda: amx)
    q, k, v = leaves("cpu", dtype, 1, 2, 2, 2 * L, 2 * L, 64)
    outs = {}
    with torch.set_grad_enabled(bool(gradients)):
        for backend in (None, "cpu", "torch"):
            outs[backend] = segment_attention(q, k, v, SegmentMask.block_causal(2), segment_length=L, backend=backend)
    assert not torch.equal(outs["cpu"], outs["torch"])
    theirs = amx and dtype == BF16 and L >= 128 and not gradients
    assert torch.equal(outs[None], outs["torch" if theirs else "cpu"])


@pytest.mark.parametrize("backend", [None, "cpu", "torch"])
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "backward"])
def test_long_segments_in_bf16_compile_to_one_graph(gradients, backend):
    """Asking PyTorch for AMX, which happens for them alone, is nothing that Dynamo traces."""
    qkv = torch.randn(1, 256, 3, 2, 16, dtype=BF16, requires_grad=gradients)
    how = {"segment_length": 128, "backend": backend}

    def call(qkv, cache):
        step = ak.history_attention(*qkv[:, :128].detach().unbind(2), cache, layer=0, layout="bthd", backend=backend)
        out = ak.block_causal_attention(*qkv.unbind(2), layout="bthd", **how)
        return out, ak.block_causal_attention_packed(qkv, **how), step

    torch._dynamo.reset()
    caches = [ak.HistoryCache(1, 1, 2, 16, 256, BF16, "cpu") for _ in range(2)]
    with torch.set_grad_enabled(gradients):
        assert same(torch.compile(call, fullgraph=True, backend="eager")(qkv, caches[0]), call(qkv, caches[1]))


NO_MEMORY = """
import resource, sys, torch
from ard_kernels import SegmentMask, segment_attention
q, k = torch.randn(1, 4, 64, 64, requires_grad=True), torch.randn(1, 4, 100_000, 128)[..., :64]
how = {"segment_length": 64, "key_segment_length": 100_000, "backend": "cpu"}
out = segment_attention(q, k, k, SegmentMask([[1]]), **how)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (30 << 20),) * 2)
for call in (lambda: segment_attention(q, k, k, SegmentMask([[1]]), **how), lambda: out.sum().backward()):
    try:
        call()
    except (MemoryError, RuntimeError) as error:
        print("refused")
"""


@pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer needs its memory")
def test_no_memory_is_an_error_and_no_abort():
    """Scratch is allocated inside a parallel region, which no exception may leave."""
    done = subprocess.run([sys.executable, "-c", NO_MEMORY], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "refused\nrefused\n"), done.stderr[-2000:]
