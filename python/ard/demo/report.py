"""What `ard demo` writes as text: report.md."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from ard.demo.scores import DISTANCES, is_tuned
from ard.demo.workers import cores
from ard.storage.files import atomic_path
from ard_kernels.common.machine import processor

TITLES = {"digits": "handwritten digits", "scenes": "scenes of handwritten digits, from prompts"}
DISTANCE_HEADINGS = {  # score -> heading of the table over seeds, digits; heading of every run, digits
    "frechet_to_teacher": ("Frechet distance to teacher", 2, "Frechet to teacher", 3),
    "endpoint_mse": ("endpoint MSE", 4, "endpoint MSE", 4),
    "frechet_to_real": ("Frechet distance to real {}", 1, "Frechet to real", 2),
}
SHARE_HEADINGS = {
    "class_consistency": ("classified as their label", "classified as label"),
    "scenes_seen": ("all 4 cells right, seen prompts", "4 cells, seen"),
    "scenes_held_out": ("all 4 cells right, held-out prompts", "4 cells, held out"),
    "cells_seen": ("cells right, seen prompts", "cells, seen"),
    "cells_held_out": ("cells right, held-out prompts", "cells, held out"),
}


def environment(workers: int) -> dict:
    """Hardware and versions that produced a report; workers: processes beside this one."""
    return {
        "cpu": processor(),
        "cpu_count": os.cpu_count(),
        "cores": cores(),
        "workers": workers,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def write_markdown(path: Path, result: dict) -> Path:
    """report.md from the content of report.json."""
    sections = [
        f"# Autoregressive distillation on {TITLES[result['subject']]}",
        "**Quick run: every stage is shortened, so the figures show that the code runs, not what the method does.**"
        if result["quick"]
        else "",
        _headline(result),
        _score_table(result),
        _how_to_read(result),
        _how_to_read_text(result) if result["subject"] == "scenes" else "",
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
        if is_tuned(name):
            parts.append(
                f"A GAN fine-tune against the real {result['subject']} divides the Frechet distance to them of "
                f"{ratios['over']} by {_ratio(ratios['frechet_to_real'], 2)}: {over}."
            )
        else:
            parts.append(
                f"At equal training, reading the history in {name.removeprefix('N=')} of {depth} layers divides the "
                f"Frechet distance to the teacher by {_ratio(ratios['frechet_to_teacher'])} and the error to the "
                f"teacher's endpoint by {_ratio(ratios['endpoint_mse'])}: {over}."
            )
    if result["subject"] == "scenes":
        parts += [_adherence(result, name, gains) for name, gains in result["summary"]["larger_by"].items()]
    return "\n\n".join(parts)


def _adherence(result: dict, name: str, gains: dict) -> str:
    """What a sampler changes in the share of scenes that are all as their prompt says, seed by seed."""
    said = []
    for side, words in (("seen", "seen prompts"), ("held_out", "held-out prompts")):
        gain = gains[f"scenes_{side}"]
        mean, least, most = (100 * gain[each] for each in ("mean", "min", "max"))
        said.append(f"**{mean:+.1f}** points on {words} ({least:+.1f} to {most:+.1f})")
    return f"All four cells as the prompt says, {name} less {gains['over']}, seed by seed: {' and '.join(said)}."


def _ratio(spread: dict, digits: int = 1) -> str:
    return f"**{spread['mean']:.{digits}f}** ({spread['min']:.{digits}f} to {spread['max']:.{digits}f})"


def _spread(spread: dict, digits: int) -> str:
    return f"{spread['mean']:.{digits}f} ({spread['min']:.{digits}f}-{spread['max']:.{digits}f})"


def _percent(spread: dict) -> str:
    return f"{100 * spread['mean']:.1f} % ({100 * spread['min']:.1f}-{100 * spread['max']:.1f})"


def _student_name(name: str) -> str:
    return f"student, {name}" + (" (step distillation)" if name == "N=0" else "")


def _shares(result: dict) -> list[str]:
    """The scores of a row that are shares."""
    return [name for name in SHARE_HEADINGS if name in result["teacher"]]


def _score_table(result: dict) -> str:
    teacher, count = result["teacher"], result["settings"]["demo"]["evaluation"]["count"]
    steps, shares = result["settings"]["trajectories"], _shares(result)
    rows = [["real scenes", "", "", "0", *_plain_shares(result["real"], shares)]] if result["real"] else []
    known = ["0", "0", f"{teacher['frechet_to_real']:.1f}"]
    rows.append([f"teacher, {steps['sampling_steps']} steps", *known, *_plain_shares(teacher, shares)])
    for name, scores in result["summary"]["scores"].items():
        distances = [_spread(scores[metric], DISTANCE_HEADINGS[metric][1]) for metric in DISTANCES]
        percents = [_percent(scores[metric]) for metric in shares]
        rows.append([f"{_student_name(name)}, {len(steps['keep'])} steps", *distances, *percents])
    headings = [DISTANCE_HEADINGS[metric][0].format(result["subject"]) for metric in DISTANCES]
    first = f"sampler ({count} images each)"
    return _table([first, *headings, *(SHARE_HEADINGS[metric][0] for metric in shares)], rows)


def _plain_shares(scores: dict, shares: list[str]) -> list[str]:
    return [f"{100 * scores[metric]:.1f} %" for metric in shares]


def _how_to_read(result: dict) -> str:
    settings, scenes = result["settings"]["demo"], result["subject"] == "scenes"
    seeds, accuracy = len(settings["seeds"]), 100 * result["classifier_held_out_accuracy"]
    steers, rows = ("prompts", " (of each cell)") if scenes else ("labels", "")
    real = "scenes of the same prompts made of any of the 1797 scans" if scenes else "all 1797 scans"
    last = (
        "The last columns say how well the prompts are followed; read them against the rows of the teacher and of the "
        "real scenes, which the classifier does not always read right. "
        if scenes
        else "The last column says how recognisable the images are; read it against the teacher's row. "
    )
    return (
        f"How to read it: all samplers take the same {settings['evaluation']['count']} noise images and {steers}; "
        "no training saw that noise. The Frechet distance compares Gaussians fitted to the 64 hidden activations"
        f"{rows} of a small classifier of these digits (accuracy {accuracy:.1f} % on digits held out from its "
        "training); it is not FID, and its values compare only within this report. To the teacher: how far the "
        "student's distribution is from that of the teacher's images. Endpoint MSE: mean squared difference, per pixel "
        "on the [-1, 1] scale, to the image the teacher makes from the same noise. To the real ones: against "
        f"{real}; the teacher and the GAN's heads were trained on 80 % of them. {last}"
        "The students of one seed share initial weights (the teacher's), batches, their order, and "
        f"all hyper-parameters; cells give the mean over {seeds} seed{'s' * (seeds > 1)} and, in brackets, the "
        "smallest and largest. All seeds share one teacher, so the ranges do not hold the spread over teachers."
    )


def _how_to_read_text(result: dict) -> str:
    settings = result["settings"]["demo"]
    return (
        "A prompt names the digit, or nothing, in each of the four cells. Half of the images are of prompts that "
        "teacher, encoder and students were trained on, half of held-out ones: a fifth of all combinations, which no "
        "training saw. A cell is right where the classifier reads the digit that the prompt says, or finds no ink "
        "where it says nothing; all four must be, for the scene. The text encoder takes bytes "
        f"({settings['scenes']['encoder_layers']} transformer layer{'s' * (settings['scenes']['encoder_layers'] != 1)}"
        "), was trained with the teacher and is frozen after."
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
            f"{cost['times_baseline']:.3f}",
        ]
        for cost in costs
    ]
    header = ["sampler", "MFLOPs", "relative to N=0", "milliseconds", "relative to N=0"]
    evaluation = result["settings"]["demo"]["evaluation"]
    return _table(header, rows) + (
        "\n\nFLOPs are computed (2 per multiply-add; convolution, linear, attention). Time is measured in batches of "
        f"{evaluation['timing_batch_size']}, in {evaluation['timing_repeats']} turns (the teacher in every fifth): the "
        "median, and the median of the ratios in a turn."
    )


def _run_table(result: dict) -> str:
    shares = _shares(result)
    rows = [
        [
            row["sampler"],
            str(row["seed"]),
            *(f"{row[metric]:.{DISTANCE_HEADINGS[metric][3]}f}" for metric in DISTANCES),
            *(f"{100 * row[metric]:.2f} %" for metric in shares),
        ]
        for row in result["students"]
    ]
    headings = [*(DISTANCE_HEADINGS[metric][2] for metric in DISTANCES), *(SHARE_HEADINGS[m][1] for m in shares)]
    return _table(["student", "seed", *headings], rows)


def _settings(result: dict) -> str:
    settings, environment = result["settings"], result["environment"]
    model, train, gan = settings["model"], settings["teacher"]["train"], settings["gan"]
    trajectories, students, demo = settings["trajectories"], settings["distill"], settings["demo"]
    return "\n".join(
        [
            f"- Model: {model['family']}, width {model['hidden_size']}, depth {model['depth']}, {model['num_heads']} "
            f"heads, patch {model['patch_size']}, {result['teacher']['parameters']:,} parameters.",
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
            f"- Machine: {environment['cpu']}, {environment['cores']} of {environment['cpu_count']} cores, "
            f"{environment['workers']} processes of one thread, {environment['system']}; Python "
            f"{environment['python']}, torch {environment['torch']}.",
        ]
    )


def _timings(result: dict) -> str:
    seconds = result["seconds_per_stage"]
    rows = [[name, f"{value:.1f}"] for name, value in seconds.items()]
    return _table(["stage", "seconds"], [*rows, ["all", f"{sum(seconds.values()):.1f}"]])
