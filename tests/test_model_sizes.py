"""Every op, at the model's sizes on a GPU, tiny on the CPU: values against fp64, repeats bit for bit, CUDA graphs."""

import pytest
import torch

from testing.devices import simulated_slow
from testing.model_cases import model_layer, parameters, values
from testing.model_checks import check_values, differing_runs, graph_equals_eager

NAMES = ("backend", "device", "case")


@pytest.mark.parametrize(NAMES, parameters(values))
def test_values(backend, device, case, record_property):
    record_property("error_ratios", check_values(case, backend, torch.device(device)))


@pytest.mark.parametrize(NAMES, simulated_slow(parameters(model_layer(batch=2))))
def test_repeats_are_bit_equal(backend, device, case):
    assert differing_runs(case, backend, torch.device(device), repeats=2 if device == "cpu" else 1000) == 0


@pytest.mark.parametrize(NAMES, simulated_slow(parameters(model_layer(batch=4))))
def test_cuda_graph_equals_eager(backend, device, case):
    assert graph_equals_eager(case, backend, torch.device(device))
