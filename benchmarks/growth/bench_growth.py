"""How time and memory of a training step and of sampling grow with segments S and tokens per segment L.

A student of two layers, both with history: what grows is attention, its mask and its cache.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from ard.models.dit import DiTConfig
from ard.models.student import ARDStudent
from ard.training.losses import trajectory_loss

from ard_kernels.tune.timing import interleaved
from benchmarks.baselines.published_student import PublishedStudent
from benchmarks.measure import Group, Measurement
from benchmarks.memory import peak_bytes
from benchmarks.results import compared
from benchmarks.student.work import all_captured, make_runs, randomize
from benchmarks.timing import DEVICE, TINY, wall_timer

ON_GPU = DEVICE.type == "cuda"
WIDTH, HEADS, BATCH = (1152, 16, 4) if ON_GPU else (72, 1, 1)
DEPTH = 2
POINTS = [(S, 256) for S in (1, 2, 3, 4, 6, 8)] + [(4, L) for L in (64, 1024, 4096)]  # S, L
if TINY:
    POINTS = [(2, 16)]


def make(S: int, L: int) -> tuple[ARDStudent, torch.Tensor, torch.Tensor]:
    """A student, its states (B, S, c, h, w) and labels."""
    size = 2 * math.isqrt(L)
    config = DiTConfig(input_size=size, hidden_size=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=10)
    with torch.device(DEVICE):
        student = randomize(ARDStudent(config, steps=S, history_layers=DEPTH))
        states = torch.randn(BATCH, S, config.in_channels, *config.input_hw)
        return student, states, torch.randint(config.num_classes, (BATCH,))


def compare(way: str, S: int, L: int) -> Measurement:
    student, states, labels = make(S, L)
    published = PublishedStudent(student)

    def training(model):
        def run():
            with torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU):
                loss = trajectory_loss(model(states, labels), states)
            return torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])

        return run

    def sampling(model):
        def run():
            with torch.autocast("cuda", torch.bfloat16, enabled=ON_GPU):
                return model.sample(states[:, 0], labels)

        return run

    step = training if way == "training" else sampling
    refused = {}
    models = {"ours": student, "published_eager": published}
    runs = make_runs({name: lambda model=model: step(model) for name, model in models.items()}, refused)
    memory = {name: peak_bytes(run, DEVICE) for name, run in runs.items()}
    runs, not_captured = all_captured(runs, DEVICE)
    timings = interleaved(runs, 20, 0, timer=wall_timer(DEVICE), seconds=1.5, least=2)
    shape = f"C{WIDTH} H{HEADS} depth{DEPTH} B{BATCH} S{S} L{L}"
    peers = [name for name in timings if name != "ours"]
    facts = {"S": S, "L": L, "peak_bytes": memory, "refused": refused, "not_captured": not_captured}
    facts["dtype"] = "bfloat16 autocast" if ON_GPU else "float32"
    row = compared(timings, "ours", peers, 1.0, op="growth", shape=shape, direction=way, **facts)
    return Measurement([row], timings, refused)


GROUPS = [
    Group(f"{way} S{S} L{L}", ("ours", "published_eager"), partial(compare, way, S, L))
    for way in ("training", "sampling")
    for S, L in POINTS
]


def test_growth(group, candidate, report):
    report(group, candidate)
