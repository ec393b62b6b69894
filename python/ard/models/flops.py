"""FLOPs of teacher and student, counted from the operations they run and computed by `ard_kernels.flops`.

Models are built on the meta device: shapes only, no weights. Batch 1, 2 FLOPs per multiply-add, convolution + linear +
attention; attention counts the pairs its mask allows and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from ard.models.config import ModelConfig
from ard.models.families import make_teacher
from ard.models.student import ARDStudent
from ard_kernels import flops as analytic

FlopTable = dict[str, dict[str, int | float]]


def flop_table(
    config: ModelConfig, *, steps: int, history_layers: int, window: int | None = None, sink: int = 0
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
    config: ModelConfig, *, steps: int, history_layers: int, window: int | None = None, sink: int = 0
) -> dict[str, int]:
    """The rows of `flop_table` without the overhead, as `FlopCounterMode` counts them."""
    with torch.device("meta"):
        teacher = make_teacher(config)
        student = ARDStudent(config, steps=steps, history_layers=history_layers, window=window, sink=sink)
        baseline = ARDStudent(config, steps=steps, history_layers=0)
        image, states = torch.empty(1, *config.image_shape), torch.empty(1, steps, *config.image_shape)
        t, conditions = torch.zeros(1), config.blank_conditions(1)
    return {
        "teacher_forward": _count(lambda: teacher(image, t, *conditions)),
        "baseline_sampling": _count(lambda: baseline.sample(image, *conditions)),
        "student_sampling": _count(lambda: student.sample(image, *conditions)),
        "student_training_forward": _count(lambda: student(states, *conditions)),
    }


def _count(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
