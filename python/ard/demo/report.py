"""What `ard demo` writes: report.md, the sample grid, the loss curves."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ard.storage.files import atomic_path

GRID_COLUMNS = 20
COLOURS = ("#c44e52", "#4c72b0", "#55a868", "#8172b3")  # baseline first
TEACHER_COLOUR = "#444444"


def environment() -> dict:
    """Hardware and versions that produced a report."""
    return {
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def write_markdown(path: Path, result: dict) -> Path:
    """report.md from the content of report.json."""
    sections = [
        "# Autoregressive distillation on handwritten digits",
        "**Quick run: every stage is shortened, so the figures show that the code runs, not what the method does.**"
        if result["quick"]
        else "",
        _headline(result),
        _score_table(result),
        _how_to_read(result),
        "![Samples from the same noise](grid.png)",
        "![Training losses](losses.png)",
        "## Cost of one image",
        _cost_table(result),
        "## Every run",
        _run_table(result),
        "## Settings",
        _settings(result),
        "## Time",
        _timings(result),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    with atomic_path(path) as temporary:
        temporary.write_text(text)
    return path


def _table(header: list[str], rows: list[list[str]]) -> str:
    rule = [":--"] + ["--:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *rows])


def _headline(result: dict) -> str:
    seeds, depth = len(result["settings"]["demo"]["seeds"]), result["settings"]["model"]["depth"]
    over = f"mean over {seeds} seed{'s' * (seeds > 1)}, with the range"
    parts = []
    for name, ratios in result["summary"]["times_smaller"].items():
        if _is_tuned(name):
            parts.append(
                f"A GAN fine-tune against the real digits divides the Frechet distance to them of {ratios['over']} "
                f"by {_ratio(ratios['frechet_to_real'], 2)}: {over}."
            )
        else:
            parts.append(
                f"At equal training, reading the history in {name.removeprefix('N=')} of {depth} layers divides the "
                f"Frechet distance to the teacher by {_ratio(ratios['frechet_to_teacher'])} and the error to the "
                f"teacher's endpoint by {_ratio(ratios['endpoint_mse'])}: {over}."
            )
    return "\n\n".join(parts)


def _is_tuned(name: str) -> bool:
    return name.endswith("+ GAN")


def _ratio(spread: dict, digits: int = 1) -> str:
    return f"**{spread['mean']:.{digits}f}** ({spread['min']:.{digits}f} to {spread['max']:.{digits}f})"


def _spread(spread: dict, digits: int) -> str:
    return f"{spread['mean']:.{digits}f} ({spread['min']:.{digits}f}-{spread['max']:.{digits}f})"


def _percent(spread: dict) -> str:
    return f"{100 * spread['mean']:.1f} % ({100 * spread['min']:.1f}-{100 * spread['max']:.1f})"


def _student_name(name: str) -> str:
    return f"student, {name}" + (" (step distillation)" if name == "N=0" else "")


def _score_table(result: dict) -> str:
    teacher, count = result["teacher"], result["settings"]["demo"]["evaluation"]["count"]
    steps = result["settings"]["trajectories"]
    rows = [
        [
            f"teacher, {steps['sampling_steps']} steps",
            "0",
            "0",
            f"{teacher['frechet_to_real']:.1f}",
            f"{100 * teacher['class_consistency']:.1f} %",
        ]
    ]
    for name, scores in result["summary"]["scores"].items():
        rows.append(
            [
                f"{_student_name(name)}, {len(steps['keep'])} steps",
                _spread(scores["frechet_to_teacher"], 2),
                _spread(scores["endpoint_mse"], 4),
                _spread(scores["frechet_to_real"], 1),
                _percent(scores["class_consistency"]),
            ]
        )
    header = [
        f"sampler ({count} images each)",
        "Frechet distance to teacher",
        "endpoint MSE",
        "Frechet distance to real digits",
        "classified as their label",
    ]
    return _table(header, rows)


def _how_to_read(result: dict) -> str:
    settings = result["settings"]["demo"]
    seeds, accuracy = len(settings["seeds"]), 100 * result["classifier_held_out_accuracy"]
    return (
        f"How to read it: all samplers start from the same {settings['evaluation']['count']} noise images and labels, "
        "which no training saw. The Frechet distance compares Gaussians fitted to the 64 hidden activations of a small "
        f"classifier of these digits (accuracy {accuracy:.1f} % on digits held out from its training); it is not FID, "
        "and its values compare only within this report. To the teacher: how far the student's distribution is from "
        "that of the teacher's images. Endpoint MSE: mean squared difference, per pixel on the [-1, 1] scale, to the "
        "image the teacher makes from the same noise. To real digits: against all 1797 scans; the teacher and the "
        "GAN's heads were trained on 80 % of them. The last column says how recognisable the images are; read it "
        "against the teacher's row. "
        "The students of one seed share initial weights (the teacher's), batches, their order, and "
        "all hyper-parameters; cells give the mean over "
        f"{seeds} seed{'s' * (seeds > 1)} and, in brackets, the smallest and largest. All seeds share one teacher, so "
        "the ranges do not hold the spread over teachers."
    )


def _cost_table(result: dict) -> str:
    costs = result["costs_per_image"]
    baseline = next(cost for cost in costs if cost["history_layers"] == 0)
    rows = [
        [
            cost["sampler"],
            f"{cost['flops'] / 1e6:.2f}",
            f"{cost['flops'] / baseline['flops']:.4f}",
            f"{1e3 * cost['seconds']:.3f}",
            f"{cost['seconds'] / baseline['seconds']:.3f}",
        ]
        for cost in costs
    ]
    header = ["sampler", "MFLOPs", "relative to N=0", "milliseconds", "relative to N=0"]
    evaluation = result["settings"]["demo"]["evaluation"]
    return _table(header, rows) + (
        "\n\nFLOPs are computed (2 per multiply-add; convolution, linear, attention). Time is measured in batches of "
        f"{evaluation['timing_batch_size']}, the median of {evaluation['timing_repeats']} runs that take turns."
    )


def _run_table(result: dict) -> str:
    rows = [
        [
            row["sampler"],
            str(row["seed"]),
            f"{row['frechet_to_teacher']:.3f}",
            f"{row['endpoint_mse']:.4f}",
            f"{row['frechet_to_real']:.2f}",
            f"{100 * row['class_consistency']:.2f} %",
        ]
        for row in result["students"]
    ]
    return _table(
        ["student", "seed", "Frechet to teacher", "endpoint MSE", "Frechet to real", "classified as label"], rows
    )


def _settings(result: dict) -> str:
    settings, environment = result["settings"], result["environment"]
    model, train, gan = settings["model"], settings["teacher"]["train"], settings["gan"]
    trajectories, students, demo = settings["trajectories"], settings["distill"], settings["demo"]
    return "\n".join(
        [
            f"- Model: DiT, width {model['hidden_size']}, depth {model['depth']}, {model['num_heads']} heads, "
            f"patch {model['patch_size']}, {result['teacher']['parameters']:,} parameters.",
            f"- Teacher: {train['steps']} steps of batch {train['batch_size']}, seed {train['seed']}; sampled with "
            f"{trajectories['sampling_steps']} DDIM steps, guidance {trajectories['cfg_scale']}.",
            f"- Trajectories: {trajectories['count']}, seed {trajectories['seed']}, states at respaced indices "
            f"{', '.join(map(str, trajectories['keep']))}; the students learn the "
            + ("x0-predictions" if settings["student"]["state"] == "x0" else "ODE states")
            + " there.",
            f"- Students: {students['steps']} steps of batch {students['batch_size']}, AdamW, learning rate "
            f"{students['learning_rate']:g}, EMA {students['ema_decay']}, seeds {', '.join(map(str, demo['seeds']))}.",
            f"- GAN: {gan['train']['steps']} more steps of batch {gan['train']['batch_size']}, learning rate "
            f"{gan['train']['learning_rate']:g}, the heads' {gan['discriminator_learning_rate']:g}, generator weight "
            f"{gan['factor']:g} times the adaptive one from step {gan['start']}.",
            f"- Held-out noise: seed {demo['evaluation']['seed']}.",
            f"- Machine: {environment['cpu']}, {environment['cpu_count']} cores, {environment['torch_threads']} "
            f"threads used, {environment['system']}; Python {environment['python']}, torch {environment['torch']}.",
        ]
    )


def _timings(result: dict) -> str:
    seconds = result["seconds_per_stage"]
    rows = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    return _table(["stage", "seconds"], [*rows, ["all", f"{sum(seconds.values()):.1f}"]])


def write_losses(path: Path, teacher_log: list[dict], student_logs: dict[tuple[str, int], list[dict]]) -> None:
    """Two log-scale panels: the teacher's loss, and the students' by sampler, one line per seed.

    student_logs: (sampler, seed) -> log.
    """
    figure = Figure(figsize=(10, 3.8), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(
        [line["step"] for line in teacher_log], [line["loss"] for line in teacher_log], color=TEACHER_COLOUR, lw=1.2
    )
    left.set_title("Teacher: epsilon MSE")
    names = list(dict.fromkeys(name for name, _ in student_logs))
    for name, colour in zip(names, _colours(len(names)), strict=True):
        logs = [log for (own, _), log in student_logs.items() if own == name]
        for index, log in enumerate(logs):
            label = name + (f" ({len(logs)} seeds)" if len(logs) > 1 else "") if index == 0 else None
            right.plot(
                [line["step"] for line in log], [line["loss"] for line in log], color=colour, lw=1.2, label=label
            )
    right.set_title("Students: MSE to the next state, teacher-forced")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, which="both")
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def _colours(count: int) -> list:
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    tab20 = matplotlib.colormaps["tab20"]
    return [tab20(i % tab20.N) for i in range(count)]


def write_grid(
    path: Path, teacher_images: torch.Tensor, student_images: dict[tuple[str, int], torch.Tensor], labels: torch.Tensor
) -> None:
    """One column per noise: the teacher's image, and per sampler (first seed) its image and the difference to it.

    teacher_images: (n, 1, h, w) in [-1, 1]; student_images: (sampler, seed) -> the same; labels: (n,), column titles.
    """
    columns = torch.arange(min(GRID_COLUMNS, len(labels)))
    columns = columns[labels[columns].argsort(stable=True)]
    first_seed: dict[str, torch.Tensor] = {}
    for (name, _), images in student_images.items():
        first_seed.setdefault(name, images)
    rows = [("teacher", teacher_images[columns], "gray_r")]
    for name, images in first_seed.items():
        rows.append((name, images[columns], "gray_r"))
        if not _is_tuned(name):  # it is trained away from the teacher
            rows.append((f"{name} minus teacher", images[columns] - teacher_images[columns], "RdBu_r"))
    figure = Figure(figsize=(0.62 * len(columns) + 1.9, 0.66 * len(rows) + 0.55), dpi=110, layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(rows), len(columns), squeeze=False))
    for (name, images, colours), row_axes in zip(rows, axes, strict=True):
        for image, one in zip(images, row_axes, strict=True):
            one.imshow(image[0].numpy(), cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
            one.set(xticks=[], yticks=[])
            one.spines[:].set_color("#dddddd")
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for label, one in zip(labels[columns].tolist(), axes[0], strict=True):
        one.set_title(str(label), fontsize=10)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
