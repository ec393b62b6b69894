"""The emulator that runs the CUDA kernels' source finds mistakes: kernels with one each (testing/emulator/probes.h)."""

import pytest
import torch

from ard_kernels.common import extension

NONE, NO_BARRIER, NO_WAIT, NEVER_WAITS, SKIPS_BARRIER = range(5)
DIVERGES, OUT_OF_BOUNDS, PAST_END, MISALIGNED, CONFLICTS = range(5, 10)


def probe(mistake, seed=0):
    """What the kernel made of 0 .. 63, which it should reverse."""
    start, out = torch.arange(64.0), torch.full((64,), -1.0)
    extension.emulated.set_seed(seed)
    try:
        extension.emulated.probe(start.data_ptr(), out.data_ptr(), mistake)
    finally:
        extension.emulated.set_seed(0)
    return out


@pytest.mark.parametrize("seed", range(4))
def test_a_right_kernel_is_right_cuda(seed):
    assert torch.equal(probe(NONE, seed), torch.arange(64.0).flip(0))
    assert extension.emulated.counts()["bank_conflicts"] == 0


@pytest.mark.parametrize("mistake", [NO_BARRIER, NO_WAIT], ids=["no_barrier", "no_wait"])
def test_reading_too_early_gives_nan_cuda(mistake):
    """Without the barrier one order of the two warps is as good as right; drawn ones are not."""
    assert any(probe(mistake, seed).isnan().any() for seed in range(4))


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (NEVER_WAITS, "never waited for"),
        (SKIPS_BARRIER, "deadlock: waits for sync_block"),
        (DIVERGES, "comes to"),
        (OUT_OF_BOUNDS, "outside of shared memory"),
        (PAST_END, "wrote past shared memory"),
        (MISALIGNED, "misaligned access to global memory"),
    ],
)
def test_mistakes_are_errors_cuda(mistake, message):
    with pytest.raises(RuntimeError, match=message):
        probe(mistake)


def test_bank_conflicts_are_counted_cuda():
    """Two warps, each reads 32 words of one bank: 31 passes too many each."""
    assert torch.equal(probe(CONFLICTS), torch.arange(64.0).flip(0))
    assert extension.emulated.counts()["bank_conflicts"] == 62
