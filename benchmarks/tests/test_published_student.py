"""The published design that the benchmarks compare with: the same results as the student, and its known FLOPs."""

import pytest
import torch
from ard.models.dit import DiTConfig
from ard.models.student import ARDStudent
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baselines.published_student import PublishedStudent, sampling_flops, training_flops


def small_student(mask):
    config = DiTConfig(input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5)
    student = ARDStudent(config, steps=4, history_layers=2, window=mask[0], sink=mask[1])
    for parameter in student.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return student


@pytest.mark.parametrize("mask", [(None, 0), (2, 0), (1, 1)])
def test_same_predictions(mask):
    student = small_student(mask)
    states, labels = torch.randn(2, 4, 3, 8, 8), torch.tensor([1, 4])
    torch.testing.assert_close(PublishedStudent(student)(states, labels), student(states, labels), rtol=1e-4, atol=1e-4)


def test_same_samples():
    student = small_student((None, 0))
    noise, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 4])
    got = PublishedStudent(student).sample(noise, labels)
    torch.testing.assert_close(got, student.sample(noise, labels), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="expected the block-causal mask"):
        PublishedStudent(small_student((1, 1))).sample(noise, labels)


def test_flops():
    """Counted and by formula."""
    config = DiTConfig.from_name("DiT-XL/2")
    with torch.device("meta"):
        student = PublishedStudent(ARDStudent(config, steps=4, history_layers=6))
        states, labels = torch.empty(1, 4, 4, 32, 32), torch.empty(1, dtype=torch.int64)
    for run, formula, expected in (
        (lambda: student(states, labels), training_flops(config, 4), 1_510_679_642_112),
        (lambda: student.sample(states[:, 0], labels), sampling_flops(config, 4, 6), 1_420_082_675_712),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert counter.get_total_flops() == formula == expected
