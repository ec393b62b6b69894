"""The published design that the benchmarks compare with: the same results as the student, and its known FLOPs."""

import pytest
import torch
from ard.model import DiTConfig
from ard.student import ARDStudent
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines.published_student import PublishedStudent


@pytest.mark.parametrize("mask", [(None, 0), (2, 0), (1, 1)])
def test_same_results(mask):
    config = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5)
    student = ARDStudent(config, steps=4, history_layers=2, window=mask[0], sink=mask[1])
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    states, labels = torch.randn(2, 4, 3, 8, 8), torch.tensor([1, 4])
    torch.testing.assert_close(PublishedStudent(student)(states, labels), student(states, labels), rtol=1e-4, atol=1e-4)


def test_flops_of_one_training_forward():
    with torch.device("meta"):
        student = PublishedStudent(ARDStudent(DiTConfig.from_name("DiT-XL/2"), steps=4, history_layers=6))
        states, labels = torch.empty(1, 4, 4, 32, 32), torch.empty(1, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        student(states, labels)
    assert counter.get_total_flops() == 1_510_679_642_112
