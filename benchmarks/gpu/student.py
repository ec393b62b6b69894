"""The student as a stage: 4-step sampling of DiT-XL/2, then its training step, in bf16."""

from __future__ import annotations

import torch
from ard.model import DiTConfig

from benchmarks.gpu.record import Record
from benchmarks.rows import verdict
from benchmarks.student.work import compare_sampling, compare_training

# Inductor takes about that long for 28 layers and their backward, ours and the published design.
COMPILE_SECONDS = 180.0
TRAINING_GOALS = {"published_eager": 2.0, "published_compiled": 1.3}
SAMPLING_GOALS = {"N0": 1 / 1.012, "four_teacher_forwards": 1.0, "published_eager": 1.0}


def config_of(dry: bool) -> tuple[str, DiTConfig]:
    if dry:
        return "tiny", DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=1, num_classes=10)
    return "DiT-XL/2", DiTConfig.from_name("DiT-XL/2")


def training(record: Record, batch: int) -> list[dict]:
    name, config = config_of(record.dry)
    options, refused = {"backend": "aot_eager"} if record.dry else {}, {}
    if not record.dry and record.seconds_left < COMPILE_SECONDS:
        reason = f"{record.seconds_left:.0f} s left; compiling needs {COMPILE_SECONDS:.0f}"
        options, refused = None, dict.fromkeys(("ours_compiled", "published_compiled"), reason)
    seconds = max(5.0, record.seconds_left / 2)
    return compare_training(
        name, config, batch, record.device, goals=TRAINING_GOALS, compile_options=options, refused=refused,
        seconds=seconds, rounds=2 if record.dry else 7, warmup=1,
    ).rows  # fmt: skip


def sampling(record: Record, batch: int) -> list[dict]:
    name, config = config_of(record.dry)
    seconds, rounds, warmup = max(3.0, record.seconds_left / 4), *((2, 1) if record.dry else (30, 3))
    return compare_sampling(
        name, config, batch, record.device, goals=SAMPLING_GOALS, seconds=seconds, rounds=rounds, warmup=warmup
    ).rows


def student(record: Record) -> str:
    """Sampling (quick) first, then training."""
    torch.manual_seed(0)

    def keep(results: list[dict]) -> None:
        for result in results:
            text = "ran" if record.dry else "; ".join(map(verdict, result["targets"]))
            record.add(result, f"{result['op']} {result['shape']} {result['direction']}: {text}")

    for batch in (1,) if record.dry else (1, 32):
        if not record.over:
            record.attempt(f"sampling B{batch}", lambda b=batch: keep(sampling(record, b)))
    for batch in (1,) if record.dry else (32, 8):
        if not record.over:
            record.attempt(f"training B{batch}", lambda b=batch: keep(training(record, b)))
        if record.device.type == "cuda":
            torch.cuda.empty_cache()
    return f"{len(record.rows)} rows"
