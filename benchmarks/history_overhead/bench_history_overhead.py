"""What history costs in time, in sampling and in a training step, beside what its FLOPs say."""

from __future__ import annotations

from functools import partial

import torch
from ard.models.student import ARDStudent
from ard.training.losses import trajectory_loss

from ard_kernels import HistoryRouting, flops
from ard_kernels.tune.timing import interleaved
from benchmarks.measure import Group, Measurement
from benchmarks.results import compared
from benchmarks.student.work import all_captured, model_named, randomize
from benchmarks.timing import DEVICE, TINY, wall_timer
from testing.cases import MASKS

ON_GPU = DEVICE.type == "cuda"
MODEL, BATCH = ("tiny", 1) if TINY else ("DiT-XL/2", 8) if ON_GPU else ("DiT-S/2", 1)
CONFIG = model_named(MODEL)
LAYERS = tuple(CONFIG.depth * i // 4 for i in range(5))  # N: none to all
# Time may exceed what the FLOPs say by 2 %, on a GPU 0.2 %: about what the targets leave beside the FLOPs' 1.1 %.
ALLOWED = 1.002 if ON_GPU else 1.02


def compare(way: str, steps: int, layers: tuple[int, ...], mask: str) -> Measurement:
    """A row for each N > 0 against N = 0."""
    window, sink = MASKS[mask]
    with torch.device(DEVICE):
        student = randomize(ARDStudent(CONFIG, steps=steps, history_layers=0, window=window, sink=sink))
        states = torch.randn(BATCH, steps, CONFIG.in_channels, *CONFIG.input_hw)
        labels = torch.randint(CONFIG.num_classes, (BATCH,))

    def run(N):
        student.routing = HistoryRouting(CONFIG.depth, N, window=window, sink=sink)
        with torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU):
            if way == "sampling":
                return student.sample(states[:, 0], labels)
            loss = trajectory_loss(student(states, labels), states)
        return torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])

    runs, not_captured = all_captured({f"N{N}": partial(run, N) for N in layers}, DEVICE)
    timings = interleaved(runs, 20, 1, timer=wall_timer(DEVICE), seconds=5.0)
    rows = []
    for N in layers[1:]:
        factor = flop_ratio(way, steps, N, window, sink)
        only = {name: timings[name] for name in (f"N{N}", "N0")}
        shape = f"{MODEL} B{BATCH} S{steps} N{N} {mask}"
        facts = {"S": steps, "N": N, "mask": mask, "flop_ratio": factor, "not_captured": not_captured}
        facts["dtype"] = "bfloat16 autocast" if ON_GPU else "float32"
        facts |= {"op": "history_overhead", "shape": shape, "direction": way}
        rows.append(compared(only, f"N{N}", ["N0"], 1 / factor / ALLOWED, **facts))
    return Measurement(rows, timings)


def flop_ratio(way: str, steps: int, N: int, window: int | None, sink: int) -> float:
    """FLOPs with history over those without; with the backward a linear costs 3 forwards, attention 3.5."""
    added, baseline = flops.history(CONFIG, steps, N, window, sink), flops.baseline_sampling(CONFIG, steps)
    if way == "sampling":
        return 1 + added / baseline
    attention = CONFIG.depth * steps * flops.attention(CONFIG.tokens, CONFIG.tokens, CONFIG.hidden_size)
    return 1 + 3.5 * added / (3 * (baseline - attention) + 3.5 * attention)


def group(way: str, steps: int, layers: tuple[int, ...], mask: str = "M4") -> Group:
    names = tuple(f"N{N}" for N in layers)
    return Group(f"{way} {MODEL} S{steps} {mask}", names, partial(compare, way, steps, layers, mask))


HALF = (0, LAYERS[2], LAYERS[4])
GROUPS = [
    group("sampling", 2, LAYERS),
    group("sampling", 4, LAYERS),
    group("sampling", 8, HALF),
    *(group("sampling", 4, HALF, mask) for mask in ("M2", "M3")),
    group("training", 4, HALF),
]
if TINY:
    GROUPS = [group("sampling", 2, (0, 2)), group("training", 2, (0, 2))]


def test_time(group, candidate, report):
    report(group, candidate)
