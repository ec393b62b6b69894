"""The student on the device: a DiT-XL/2 training step against the published design, 4-step sampling against itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ard.losses import trajectory_loss
from ard.model import DiT, DiTConfig
from ard.student import ARDStudent

from ard_kernels import HistoryRouting
from benchmarks.baselines.published_student import PublishedStudent
from benchmarks.gpu.kernels import goal, verdict
from benchmarks.gpu.record import Record, describe
from benchmarks.gpu.timing import wall_timer
from benchmarks.harness import interleaved, row
from benchmarks.student import randomize

STEPS = 4
# Inductor takes about that long for 28 layers and their backward, ours and the published design.
COMPILE_SECONDS = 180.0


def config_of(dry: bool) -> tuple[str, DiTConfig]:
    if dry:
        return "tiny", DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=1, num_classes=10)
    return "DiT-XL/2", DiTConfig.from_name("DiT-XL/2")


def training_step(model, states, labels, targets, device: torch.device) -> Callable[[], object]:
    """bf16 autocast, AdamW, gradient norm clipped: one step of the trainer."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            loss = trajectory_loss(model(states, labels), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)  # the next candidate has the memory

    return step


def peak_gigabytes(run: Callable[[], object], device: torch.device) -> float | None:
    """Peak memory of one call above what was held before it."""
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return (torch.cuda.max_memory_allocated(device) - held) / 1e9


def bench_training(record: Record, batch: int) -> dict:
    """One row per batch size: ours, ours compiled, the published design eager and compiled."""
    device, (name, config) = record.device, config_of(record.dry)
    with torch.device(device):
        ours = randomize(ARDStudent(config, steps=STEPS, history_layers=min(6, config.depth)))
        states, targets = torch.randn(2, batch, STEPS, config.in_channels, *config.input_hw)
        labels = torch.randint(config.num_classes, (batch,))
    published = PublishedStudent(ours)
    models = {"ours": ours, "published_eager": published}
    if record.dry or record.seconds_left > COMPILE_SECONDS:
        how = {"backend": "aot_eager"} if record.dry else {}
        models |= {"ours_compiled": torch.compile(ours, **how), "published_compiled": torch.compile(published, **how)}
        refused = {}
    else:
        reason = f"{record.seconds_left:.0f} s left; compiling needs {COMPILE_SECONDS:.0f}"
        refused = dict.fromkeys(("ours_compiled", "published_compiled"), reason)
    steps, memory = {}, {}
    for label, model in models.items():
        try:
            step = training_step(model, states, labels, targets, device)
            step()
            memory[label] = peak_gigabytes(step, device)
            steps[label] = step
        except Exception as error:
            refused[label] = describe(error)
            torch.cuda.empty_cache()
    repeats = (2, 1) if record.dry else (7, 1)
    timings = interleaved(steps, *repeats, timer=wall_timer(device), seconds=max(5.0, record.seconds_left / 2))
    best_ours = min((label for label in timings if label.startswith("ours")), key=lambda label: timings[label].median)
    peers = [label for label in timings if label.startswith("published")]
    targets_met = [
        goal(f"times {peer}", timings[peer].median / timings[best_ours].median, target)
        for peer, target in (("published_eager", 2.0), ("published_compiled", 1.3))
        if peer in timings
    ]
    if memory.get("published_eager"):
        targets_met.append(
            goal("of the eager baseline's memory saved", 1 - memory["ours"] / memory["published_eager"], 0.5)
        )
    return row(
        "student_training_step", f"{name} B{batch} S{STEPS}", "step", timings, best_ours, peers, 1.3,
        dtype="bfloat16 autocast", refused=refused, peak_GB=memory, targets=targets_met,
    )  # fmt: skip


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`run` as a CUDA graph; on the CPU itself."""
    if device.type != "cuda":
        return run
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def bench_sampling(record: Record, batch: int) -> list[dict]:
    """N = 6 against N = 0 and against four plain teacher forwards, each one CUDA graph where it can be captured."""
    device, (name, config) = record.device, config_of(record.dry)
    dtype = torch.float32 if record.dry else torch.bfloat16
    with torch.device(device):
        teacher = randomize(DiT(config)).to(dtype).requires_grad_(False)
        noise = torch.randn(batch, config.in_channels, *config.input_hw, dtype=dtype)
        labels = torch.randint(config.num_classes, (batch,))
    N = min(6, config.depth)
    student = ARDStudent.from_teacher(teacher, steps=STEPS, history_layers=N)
    times = student.timesteps(STEPS, device)[0]

    def sample(history_layers, cache):
        student.routing = HistoryRouting(config.depth, history_layers)
        return student.sample(noise, labels, cache=cache)

    @torch.no_grad()
    def teacher_forwards():
        for t in times:
            teacher(noise, t[None], labels)

    cache = student.new_cache(batch)
    student.routing = HistoryRouting(config.depth, 0)
    empty = student.new_cache(batch)
    runs, eager = {}, {}
    plain = {"N6": lambda: sample(N, cache), "N0": lambda: sample(0, empty), "four_teacher_forwards": teacher_forwards}
    for label, run in plain.items():
        try:
            runs[label] = captured(run, device)
        except Exception as error:
            runs[label], eager[label] = run, describe(error)
            torch.cuda.synchronize(device)
    repeats = (2, 1) if record.dry else (30, 3)
    timings = interleaved(runs, *repeats, timer=wall_timer(device), seconds=max(3.0, record.seconds_left / 4))
    rows = []
    for peer, target in (("N0", 1 / 1.012), ("four_teacher_forwards", 1.0)):
        against = goal(f"times {peer}", timings[peer].median / timings["N6"].median, target)
        facts = {"dtype": str(dtype), "not_captured": eager, "targets": [against]}
        shape, way = f"{name} B{batch} S{STEPS} N{N}", f"sampling against {peer}"
        rows.append(row("student_sampling", shape, way, timings, "N6", [peer], target, **facts))
    return rows


def student(record: Record) -> str:
    """Sampling (quick) first, then training."""
    torch.manual_seed(0)

    def keep(result):
        text = "ran" if record.dry else "; ".join(map(verdict, result["targets"]))
        record.add(result, f"{result['op']} {result['shape']} {result['direction']}: {text}")

    for batch in (1,) if record.dry else (1, 32):
        if not record.over:
            record.attempt(f"sampling B{batch}", lambda b=batch: [keep(r) for r in bench_sampling(record, b)])
    for batch in (1,) if record.dry else (32, 8):
        if not record.over:
            record.attempt(f"training B{batch}", lambda b=batch: keep(bench_training(record, b)))
        if record.device.type == "cuda":
            torch.cuda.empty_cache()
    return f"{len(record.rows)} rows"
