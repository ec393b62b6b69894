"""The student on the CPU: one DiT-S/2 training step against the published design, DiT-XL/2 sampling against itself.

Sampling compares the same weights three ways: N = 6 history layers, N = 0, and four plain teacher forwards.
"""

from __future__ import annotations

import torch
from ard.losses import trajectory_loss
from ard.model import DiT, DiTConfig
from ard.student import ARDStudent

from ard_kernels import HistoryRouting
from benchmarks.baselines.published_student import PublishedStudent
from benchmarks.harness import interleaved, keep_freed_memory, print_rows, row, write_results

STEPS = 4


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Also the weights that DiT initialises to zero: a zero gate would hide work from nobody but the reader."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


def training_step(model, optimizer, states, labels, targets):
    def step():
        optimizer.zero_grad(set_to_none=True)
        loss = trajectory_loss(model(states, labels), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def bench_training(repeats: int) -> list[dict]:
    config = DiTConfig.from_name("DiT-S/2")
    students = [ARDStudent(config, steps=STEPS, history_layers=6) for _ in range(2)]
    students[1].load_state_dict(randomize(students[0]).state_dict())
    models = {"ours": students[0], "published_eager": PublishedStudent(students[1])}
    states, targets = torch.randn(2, 1, STEPS, config.in_channels, *config.input_hw)
    labels = torch.randint(config.num_classes, (1,))
    outputs = [model(states, labels) for model in models.values()]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)
    steps = {
        name: training_step(model, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True), states, labels, targets)
        for name, model in models.items()
    }
    timings = interleaved(steps, repeats, warmup=6)  # the first steps fault in the heap that later ones reuse
    return [row("student_training_step", "DiT-S/2 B1 S4 N6", "step", timings, "ours", ["published_eager"], 1.6)]


def bench_sampling(repeats: int) -> list[dict]:
    config = DiTConfig.from_name("DiT-XL/2")
    teacher = randomize(DiT(config)).requires_grad_(False)
    student = ARDStudent.from_teacher(teacher, steps=STEPS, history_layers=6)
    noise, labels = torch.randn(1, config.in_channels, *config.input_hw), torch.randint(config.num_classes, (1,))
    times = student.timesteps(STEPS, noise.device)[0]
    depth = config.depth

    def sample(history_layers):
        student.routing = HistoryRouting(depth, history_layers)
        return student.sample(noise, labels)

    @torch.no_grad()
    def teacher_forwards():
        for t in times:
            teacher(noise, t[None], labels)

    candidates = {"N6": lambda: sample(6), "N0": lambda: sample(0), "four_teacher_forwards": teacher_forwards}
    timings = interleaved(candidates, repeats, warmup=1)
    shape = "DiT-XL/2 B1 S4 N6 against"
    return [
        row("student_sampling", f"{shape} N0", "sampling", timings, "N6", ["N0"], 1 / 1.02),
        row("student_sampling", f"{shape} teacher", "sampling", timings, "N6", ["four_teacher_forwards"], 1 / 1.03),
    ]


def training() -> None:
    torch.manual_seed(0)
    keep_freed_memory()
    results = bench_training(repeats=20)
    print_rows(results)
    write_results("student_training", results)


def sampling() -> None:
    torch.manual_seed(0)
    keep_freed_memory()
    results = bench_sampling(repeats=13)
    print_rows(results)
    write_results("student_sampling", results)
