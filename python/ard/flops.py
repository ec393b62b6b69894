"""FLOPs of teacher and student, counted from the operations they run and computed by `ard_kernels.flops`.

Models are built on the meta device: shapes only, no weights. Batch 1, 2 FLOPs per multiply-add, convolution + linear +
attention; attention counts the pairs its mask allows and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ard.model import DiT
from ard.model_config import DiTConfig
from ard.student import ARDStudent
from ard_kernels import flops as analytic

FlopTable = dict[str, dict[str, int | float]]


def flop_table(
    config: DiTConfig, *, steps: int, history_layers: int, window: int | None = None, sink: int = 0
) -> FlopTable:
    """{"teacher_forward": {"analytic": int, "counted": int}, ...}, and the overhead of the student's sampling.

    baseline_sampling is `steps` forwards without history; overhead = student_sampling / baseline_sampling - 1.
    """
    columns: FlopTable = {
        "analytic": {
            "teacher_forward": analytic.teacher_forward(config),
            "baseline_sampling": analytic.baseline_sampling(config, steps),
            "student_sampling": analytic.student_sampling(config, steps, history_layers, window, sink),
            "student_training_forward": analytic.student_forward(config, steps, history_layers, window, sink),
        },
        "counted": {
            **counted_flops(config, steps=steps, history_layers=history_layers, window=window, sink=sink),
        },
    }
    for column in columns.values():
        column["overhead"] = column["student_sampling"] / column["baseline_sampling"] - 1.0
    return {row: {name: column[row] for name, column in columns.items()} for row in columns["analytic"]}


def counted_flops(
    config: DiTConfig, *, steps: int, history_layers: int, window: int | None = None, sink: int = 0
) -> dict[str, int]:
    """The rows of `flop_table` without the overhead, as `FlopCounterMode` counts them."""
    image_shape = (config.in_channels, *config.input_hw)
    with torch.device("meta"):
        teacher = DiT(config)
        student = ARDStudent(config, steps=steps, history_layers=history_layers, window=window, sink=sink)
        baseline = ARDStudent(config, steps=steps, history_layers=0)
        image, states = torch.empty(1, *image_shape), torch.empty(1, steps, *image_shape)
        t, labels = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    return {
        "teacher_forward": _count(lambda: teacher(image, t, labels)),
        "baseline_sampling": _count(lambda: baseline.sample(image, labels)),
        "student_sampling": _count(lambda: student.sample(image, labels)),
        "student_training_forward": _count(lambda: student(states, labels)),
    }


def _count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
