"""What the trials of self-checks catch: mistakes planted in the CPU's kernels, whose checks take milliseconds."""

import pytest
import torch

from ard_kernels.block_causal_attention import cpu as attention_cpu
from ard_kernels.common import backends, self_check
from ard_kernels.common.findings import FAILED, PASSED, Kind
from ard_kernels.qk_norm_rope import cpu as rope_cpu
from ard_kernels.segment_adaln import cpu as adaln_cpu

CPU = torch.device("cpu")
ATTENTION = ("segment_attention", torch.bfloat16, 64)
ADALN = ("adaln_modulate", torch.float32, 24)


def double_where(argument, condition):
    """What a kernel has written as its argument of that number is twice as large in calls of one kind."""
    return lambda args: args[argument].mul_(2) if condition(args) else None


def one_row(args):
    """A tenth is lost in the norm of all rows, in bf16."""
    args[8][-1, -1, -1] *= 1.1


def other_infinity(args):
    args[4].masked_fill_(args[4] == -float("inf"), float("inf"))


OF_CPU = {  # label: kernels, direction, mistake, kind, where it shows
    "short segments": (attention_cpu, "forward", double_where(3, lambda a: a[5].q_lengths == (16,)), ATTENTION, "out"),
    "no gradient of lse": (attention_cpu, "backward", double_where(7, lambda a: a[1] is None), ATTENTION, "dqkv"),
    "packed": (attention_cpu, "backward", double_where(8, lambda a: a[8].stride(1) < a[8].shape[2]), ATTENTION, "dqkv"),
    "one row": (attention_cpu, "backward", one_row, ATTENTION, "dk: error of a row"),
    "lse of what sees nothing": (attention_cpu, "forward", other_infinity, ATTENTION, "lse: error inf"),
    "rows per token": (adaln_cpu, "forward", double_where(8, lambda a: a[11] == [1]), ADALN, "y"),
    "heads of 72": (rope_cpu, "forward", double_where(1, lambda a: a[0].shape[-1] == 72),
                    ("qk_norm_rope", torch.float32, 1152), "y"),
}  # fmt: skip


@pytest.mark.parametrize("label", OF_CPU)
def test_trials_have_calls_of_every_kind(label, monkeypatch):
    """Mistakes in calls that once were in no trial, or lost among many rows."""
    module, direction, how, (op, dtype, width), where = OF_CPU[label]
    kind = Kind(op, "cpu", dtype, width)
    assert self_check.examine(kind, CPU, 1).status == PASSED
    real = getattr(module, direction)
    monkeypatch.setattr(module, direction, lambda *args: (real(*args), how(args)))
    finding = self_check.examine(kind, CPU, 1)
    assert finding.status == FAILED and where in finding.why, finding


def test_every_op_with_a_gpu_kernel_has_trials():
    assert {op for op in backends._refusals if backends.has_backend(op, "triton")} <= self_check.UNITS.keys()
