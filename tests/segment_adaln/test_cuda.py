"""What is specific to the CUDA kernels of the adaLN family; their values are also tested with the other backends'."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ard_kernels.common import gpu_support
from ard_kernels.segment_adaln import cuda, op
from testing.devices import on_devices

on_cuda = pytest.mark.parametrize(("backend", "device"), on_devices("cuda"))


def inputs(B, T, S, C, dtype):
    tokens = [torch.randn(B, T, C).to(dtype) for _ in range(5)]  # x, branch, h, grad_h, grad_y
    return tokens, [torch.randn(B, S, C).to(dtype) for _ in range(3)]


def run(emulated, B, lengths, C, dtype, per_token=False):
    """Every output of the gated op, forward and backward, and the counts of the main kernels."""
    torch.manual_seed(1)
    T = sum(lengths)
    (x, branch, h, grad_h, grad_y), (gate, shift, scale) = inputs(B, T, T if per_token else len(lengths), C, dtype)
    lengths = [1] if per_token else lengths
    out = op.adaln_op(x, branch, gate, shift, scale, None, None, lengths, "layer", 1e-6, dtype, "cuda")
    counts = [emulated.counts()]
    saved, wanted = (h, branch, gate, scale, None, None, *out[2:]), [True, True, True, False, False]
    grads = op.backward_op(grad_h, grad_y, *saved, lengths, dtype, wanted, "cuda")[:5]
    return (*out, *grads), [*counts, emulated.counts()]


@pytest.mark.simulated
@pytest.mark.parametrize("C", [8, 72, 264, 1152, 2568])
@pytest.mark.parametrize("lengths", [[5], [3, 1, 13]], ids=["one_segment", "ragged"])
def test_any_order_of_threads_gives_the_same_bits_cuda(C, lengths, emulated, poisoned):
    """Seeds draw which warp runs first: a missing barrier shows, and so does an odd token count that waits forever."""
    emulated.set_seed(0)
    first, _ = run(emulated, 2, lengths, C, torch.bfloat16)
    assert not any(x.isnan().any() for x in first)
    for seed in range(1, 5):
        emulated.set_seed(seed)
        assert all(
            torch.equal(a, b) for a, b in zip(first, run(emulated, 2, lengths, C, torch.bfloat16)[0], strict=True)
        ), seed


@pytest.mark.simulated
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("C", [40, 256, 512, 1152, 4104])
def test_shared_memory_is_free_of_bank_conflicts_cuda(C, dtype, emulated):
    """With rows per token the backward's only launch is its main kernel, which is then the one counted."""
    for counts in run(emulated, 1, [7], C, dtype, per_token=True)[1]:
        assert counts["async_copies"] > 0 and counts["shared_accesses"] > 0 and counts["bank_conflicts"] == 0, counts


@on_cuda
@pytest.mark.parametrize("C", [72, 512, 1152, 8192])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_off_their_boundaries(backend, device, C, dtype, poisoned):
    """gate, shift, scale that start on no 8-byte boundary take the element-wise variants: the same bits."""
    rows = [torch.randn(1, 2, C + 1, dtype=dtype, device=device)[..., 1:] for _ in range(3)]
    x, branch = torch.randn(2, 1, 6, C, dtype=dtype, device=device)
    shifted = op.adaln_op(x, branch, *rows, None, None, [3], "layer", 1e-6, dtype, backend)
    aligned = op.adaln_op(
        x, branch, *(row.contiguous() for row in rows), None, None, [3], "layer", 1e-6, dtype, backend
    )
    assert all(torch.equal(a, b) for a, b in zip(shifted, aligned, strict=True))


@on_cuda
@pytest.mark.parametrize("C", [256, 1152])
def test_variance_of_rows_far_from_zero(backend, device, C):
    """Mean 4096, deviation 1: E[x^2] - E[x]^2 in fp32 would have no digit left."""
    x, rows = torch.randn(1, 4, C, device=device) + 4096, torch.zeros(2, 1, 1, C, device=device)
    settings = [4], "layer", 1e-6, torch.float32, backend
    _, _, mean, rstd = op.adaln_op(x, None, None, *rows, None, None, *settings)
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean(-1), rtol=2e-7, atol=0)
    torch.testing.assert_close(rstd.double(), exact.var(-1, correction=0).rsqrt(), rtol=1e-6, atol=0)


@pytest.mark.simulated
def test_every_width_has_a_layout_cuda(emulated):
    """A row fits its threads, a block has at most 512, and no warp of a row is without elements."""
    for C in range(8, cuda.MOST_CHANNELS + 1, 8):
        for backward in (False, True):
            elements, threads, rows = emulated.adaln_geometry(C, backward)
            assert elements * threads >= C and threads % 32 == 0 and threads * rows <= 512
            assert rows == 1 or threads == 32, "rows side by side share no barrier"
            assert 8 * (threads - 32) < C, "the last warp's first vectors"


@on_cuda
def test_what_it_refuses(backend, device):
    refuses, device = cuda.refuses, torch.device(device)
    assert refuses(device, torch.bfloat16) is None and refuses(device, torch.bfloat16, 1152) is None
    assert "multiples of 8" in refuses(device, torch.bfloat16, 1150)
    assert "up to 8192" in refuses(device, torch.float16, 8200)
    assert "float64" in refuses(device, torch.float64, 64)


@pytest.mark.parametrize(("arch", "widest"), [(80, 8192), (86, 4608), (90, 8192), (100, 8192)])
@on_cuda
def test_shared_memory_limits_the_width(backend, device, arch, widest, monkeypatch):
    monkeypatch.setattr(gpu_support, "architecture", lambda device: arch)
    served = [C for C in range(8, 8200, 8) if cuda.refuses(torch.device(device), torch.float32, C) is None]
    assert served[-1] == widest and len(served) == widest // 8


@given(st.lists(st.integers(1, 300), min_size=1, max_size=6), st.integers(1, 64), st.integers(1, 900))
def test_chunks_are_a_good_cut(lengths, batch, slots):
    """Never slower, by the model, than the largest or the smallest chunks."""

    def time(tokens):
        blocks = batch * sum(-(-length // tokens) for length in lengths)
        return -(-blocks // slots) * (min(tokens, max(lengths)) + cuda.OVERHEAD)

    chosen = cuda.chunk_tokens(tuple(lengths), batch, 32, slots)
    assert 4 <= chosen <= 32 and time(chosen) <= min(time(4), time(32))
