"""The student's two jobs, a training step and sampling in S steps, beside the published design and plain forwards."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from ard.models.dit import DiT, DiTConfig
from ard.models.student import ARDStudent
from ard.training.losses import trajectory_loss
from torch import Tensor, nn

from ard_kernels import HistoryRouting
from ard_kernels.tune.search import describe, relative
from ard_kernels.tune.timing import interleaved
from benchmarks.baselines.published_student import PublishedStudent
from benchmarks.measure import Group, Measurement
from benchmarks.memory import peak_bytes
from benchmarks.results import compared, goal
from benchmarks.timing import DEVICE, TINY, wall_timer

STEPS = 4


def randomize(module: nn.Module) -> nn.Module:
    """Also the weights that DiT initialises to zero: a zero gate would hide work from nobody but the reader."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


def training_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, states: Tensor, labels: Tensor, targets: Tensor
) -> Callable[[], Tensor]:
    """One step of the trainer: loss, gradients, norm clipped, AdamW; bf16 autocast on a GPU."""
    on_gpu = states.device.type == "cuda"

    def step() -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16) if on_gpu else nullcontext():
            loss = trajectory_loss(model(states, labels), targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if on_gpu:
            optimizer.zero_grad(set_to_none=True)  # the next candidate has the memory
        return loss.detach()

    return step


def make_runs(makers: dict[str, Callable[[], Callable]], refused: dict[str, str]) -> dict[str, Callable[[], object]]:
    """What each maker gives, called once; `refused` takes the reasons of the others."""
    runs = {}
    for name, make in makers.items():
        try:
            run = make()
            run()
            runs[name] = run
        except Exception as error:
            refused[name] = describe(error)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    return runs


def compare_training(
    name: str, config: DiTConfig, batch: int, device: torch.device, *, goals: dict[str, float],
    compile_options: dict, seconds: float, rounds: int, warmup: int = 2, compile_ours: bool = True,
) -> Measurement:  # fmt: skip
    """A row for each peer of `goals` (least ratio of its time to ours): published_eager, published_compiled.

    With published_compiled ours is eager or compiled, whichever is faster, unless `compile_ours` is False.
    compile_options: of torch.compile.
    """
    N = min(6, config.depth)
    with torch.device(device):
        ours = randomize(ARDStudent(config, steps=STEPS, history_layers=N))
        states, targets = torch.randn(2, batch, STEPS, config.in_channels, *config.input_hw)
        labels = torch.randint(config.num_classes, (batch,))
    published, refused = PublishedStudent(ours), {}
    models = {"ours": ours} | ({"published_eager": published} if "published_eager" in goals else {})
    if "published_compiled" in goals:
        models |= {"ours_compiled": torch.compile(ours, **compile_options)} if compile_ours else {}
        models["published_compiled"] = torch.compile(published, **compile_options)
    with torch.no_grad():
        difference = relative(*(model(states[:1], labels[:1]) for model in (published, ours)))
    if difference > 1e-4:
        raise RuntimeError(f"published_eager gives other predictions than ours, {difference:.1e} of the 2-norm")
    # All have the same weights; so they share the optimizer's states, 5.4 GB of DiT-XL/2.
    optimizer = torch.optim.AdamW(ours.parameters(), lr=1e-4, fused=True)
    steps = {n: lambda m=m: training_step(m, optimizer, states, labels, targets) for n, m in models.items()}
    runs = make_runs(steps, refused)
    memory = {label: peak_bytes(run, device) for label, run in runs.items()}
    timings = interleaved(runs, rounds, warmup, timer=wall_timer(device), seconds=seconds)
    mine = min((label for label in timings if label.startswith("ours")), key=lambda label: timings[label].median)
    rows = []
    for peer, target in goals.items():
        peers = [peer] if peer in timings else []  # without: refused, for want of memory perhaps
        targets_met = [goal(f"times {peer}", timings[peer].median / timings[mine].median, target) for peer in peers]
        if device.type == "cuda" and peers == ["published_eager"]:
            saved = 1 - memory[mine] / memory[peer]
            targets_met.append(goal("of the eager baseline's memory above weights and optimizer saved", saved, 0.5))
        only = {label: timings[label] for label in timings if label == peer or label.startswith("ours")}
        facts = {"dtype": "bfloat16 autocast" if device.type == "cuda" else "float32", "targets": targets_met}
        facts |= {"refused": refused, "peak_bytes": {label: memory[label] for label in only}}
        shape, way = f"{name} B{batch} S{STEPS} N{N}", f"step against {peer}"
        facts |= {"op": "student_training_step", "shape": shape, "direction": way}
        rows.append(compared(only, mine, peers, target, **facts))
    return Measurement(rows, timings, refused)


def model_named(name: str) -> DiTConfig:
    if name == "tiny":
        return DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=1, num_classes=10)
    return DiTConfig.from_name(name)


def training_groups(goals: dict[str, float]) -> list[Group]:
    """`compare_training` of this device's model and batches."""
    on_gpu = DEVICE.type == "cuda"
    model = "tiny" if TINY else "DiT-XL/2" if on_gpu else "DiT-S/2"
    batches = (8, 32) if on_gpu else (1,)  # with 32 the published design needs more than 80 GB
    how = {"seconds": 1.0, "rounds": 2} if TINY else {"seconds": 60.0, "rounds": 30}
    how["compile_options"] = {"backend": "aot_eager"} if TINY else {"dynamic": False}
    how["compile_ours"] = compile_ours = on_gpu or TINY  # Inductor gains nothing in it on the CPU, and takes 30 s
    names = ["ours", *(["ours_compiled"] if compile_ours and "published_compiled" in goals else []), *goals]
    return [
        Group(
            f"training {model} B{batch}",
            tuple(names),
            partial(compare_training, model, model_named(model), batch, DEVICE, goals=goals, warmup=1, **how),
        )
        for batch in batches
    ]


def all_captured(
    runs: dict[str, Callable[[], object]], device: torch.device
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """Each of `runs` as a CUDA graph, so that the GPU is timed and not Python; itself where it cannot be captured.

    Second, why those cannot. The graphs share memory: nobody reads what a replay leaves there, and they take turns.
    """
    graphs, reasons = {}, {}
    pool = torch.cuda.graph_pool_handle() if device.type == "cuda" else None
    for label, run in runs.items():
        try:
            graphs[label] = captured(run, device, pool)
        except Exception as error:
            graphs[label], reasons[label] = run, describe(error)
            torch.cuda.synchronize(device)
    return graphs, reasons


def captured(run: Callable[[], object], device: torch.device, pool) -> Callable[[], object]:
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
    with torch.cuda.graph(graph, pool=pool):
        run()
    return partial(replay, graph, run)


def replay(graph: torch.cuda.CUDAGraph, owner: Callable[[], object]) -> None:
    """`owner` is kept alive: the graph reads memory, such as a cache, that belongs to it."""
    graph.replay()


def compare_sampling(
    name: str, config: DiTConfig, batch: int, device: torch.device, *, goals: dict[str, float],
    seconds: float, rounds: int, warmup: int = 1,
) -> Measurement:  # fmt: skip
    """S-step sampling with N = 6 history layers: a row for each peer of `goals` (least ratio of its time to ours).

    Peers: N0, the same student without history; four_teacher_forwards; published_eager. On a GPU each is one CUDA
    graph where it can be captured.
    """
    N, dtype = min(6, config.depth), torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        teacher = randomize(DiT(config)).to(dtype).requires_grad_(False)
        noise = torch.randn(batch, config.in_channels, *config.input_hw, dtype=dtype)
        labels = torch.randint(config.num_classes, (batch,))
    student = ARDStudent.from_teacher(teacher, steps=STEPS, history_layers=N)
    times = student.timesteps(STEPS, device)[0]
    routings = {"N6": HistoryRouting(config.depth, N), "N0": HistoryRouting(config.depth, 0)}

    def ours(label: str) -> Callable[[], Tensor]:
        student.routing = routings[label]
        cache = student.new_cache(batch)

        def run() -> Tensor:
            student.routing = routings[label]
            return student.sample(noise, labels, cache=cache)

        return run

    @torch.no_grad()
    def teacher_forwards() -> None:
        for t in times:
            teacher(noise, t.expand(batch), labels)

    def published() -> Callable[[], Tensor]:
        student.routing = routings["N6"]
        sample, expected = PublishedStudent(student).sample, student.sample(noise, labels)
        difference = relative(sample(noise, labels), expected)
        if difference > (1e-4 if dtype == torch.float32 else 5e-2):
            raise RuntimeError(f"gives other images than ours, {difference:.1e} of the 2-norm")

        def run() -> Tensor:
            student.routing = routings["N6"]
            return sample(noise, labels)

        return run

    makers = {"N6": lambda: ours("N6"), "N0": lambda: ours("N0"), "four_teacher_forwards": lambda: teacher_forwards}
    makers |= {"published_eager": published}
    refused: dict[str, str] = {}
    runs = make_runs({label: makers[label] for label in ("N6", *goals)}, refused)
    memory = {label: peak_bytes(run, device) for label, run in runs.items()}
    runs, not_captured = all_captured(runs, device)
    timings = interleaved(runs, rounds, warmup, timer=wall_timer(device), seconds=seconds)
    rows = []
    for peer, target in goals.items():
        if peer not in timings:
            continue
        against = goal(f"times {peer}", timings[peer].median / timings["N6"].median, target)
        only = {label: timings[label] for label in ("N6", peer)}
        facts = {"dtype": str(dtype).removeprefix("torch."), "not_captured": not_captured, "targets": [against]}
        facts |= {"refused": refused, "peak_bytes": {label: memory[label] for label in only}}
        shape, way = f"{name} B{batch} S{STEPS} N{N}", f"sampling against {peer}"
        facts |= {"op": "student_sampling", "shape": shape, "direction": way}
        rows.append(compared(only, "N6", [peer], target, **facts))
    return Measurement(rows, timings, refused)
