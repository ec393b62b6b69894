"""Plots of one device's results: ours against peers, roofline, growth, overhead of history."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.results import Row
from benchmarks.tables import words

OURS, PEER, BEST, GOAL = "#0072b2", "#bbbbbb", "#d55e00", "#555555"  # told apart without colour vision too
OP_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def draw(name: str, rooms: dict[str, dict], folder: Path) -> dict[str, str]:
    """Write folder/<name>-<plot>.png; {plot: title} of those there is data for."""
    rows = [row for content in rooms.values() for row in content["rows"] if row.best_peer]
    apart = ("growth", "history_overhead", "data_path")
    plots = {
        "speed": (draw_speed, "Time of the alternatives over ours", [r for r in rows if r.op not in apart]),
        "roofline": (
            draw_roofline,
            "Useful rate against the measured ceilings",
            [r for r in rows if r.facts.get("ceiling") and r.facts.get("intensity")],
        ),
        "growth": (
            draw_growth, "Time and memory over segments and tokens", [r for r in rows if r.op == "growth"]
        ),
        "overhead": (
            draw_overhead, "Overhead of history: FLOPs and time", [r for r in rows if r.op == "history_overhead"]
        ),
    }  # fmt: skip
    made = {}
    for plot, (function, title, found) in plots.items():
        if found:
            figure = function(found)
            figure.savefig(folder / f"{name}-{plot}.png", dpi=72, pil_kwargs={"optimize": True})
            plt.close(figure)
            made[plot] = title
    return made


def label(row: Row) -> str:
    shape = row.shape.removeprefix(row.op).replace(row.dtype, "").replace("packed", "")
    return f"{row.op} {' '.join(shape.split(', rows')[0].split())}, {row.direction}"


def draw_speed(rows: Sequence[Row]) -> plt.Figure:
    """A bar to the fastest alternative, dots for the others, a tick at the target."""
    figure, axes = plt.subplots(figsize=(11, 0.24 * len(rows) + 1.2), layout="constrained")
    for y, row in enumerate(reversed(rows)):
        ours = row.time(row.ours)
        peers = [n for n in row.milliseconds if n not in (row.ours, row.best_peer, "copy", "matmul")]
        axes.barh(y, row.ratio - 1, left=1, height=0.6, color=OURS if row.met else BEST)
        others = [row.time(n) / ours for n in peers]
        axes.plot(others, [y] * len(others), ".", color=PEER)
        axes.plot([row.target], [y], "|", color=GOAL, markersize=9)
    axes.set_yticks(range(len(rows)), [label(row) for row in reversed(rows)], fontsize=7)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    ticks = (0.25, 0.5, 1, 2, 4, 8, 16)
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlim(0.2, 20)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("time of the alternative / ours; bar: the fastest (blue: target met), dots: others, tick: target")
    return figure


def useful_tflops(row: Row) -> float:
    rate = row.facts["rate"]
    return rate if row.facts["unit"] == "TFLOP/s" else rate * row.facts["intensity"] / 1e3


def draw_roofline(rows: Sequence[Row]) -> plt.Figure:
    """Useful TFLOP/s over FLOPs per byte; the roofs are the medians of the ceilings measured beside the kernels."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    ceilings: dict[str, list[float]] = {}
    for row in rows:
        ceilings.setdefault(row.facts["unit"], []).append(row.facts["ceiling"])
    middle = {unit: statistics.median_high(values) for unit, values in ceilings.items()}
    left, right = min(r.facts["intensity"] for r in rows) / 2, max(r.facts["intensity"] for r in rows) * 2
    if len(middle) == 2:
        knee = middle["TFLOP/s"] * 1e3 / middle["GB/s"]
        roof = [middle["GB/s"] * left / 1e3, middle["TFLOP/s"], middle["TFLOP/s"]]
        axes.plot([left, knee, max(right, 2 * knee)], roof, color="black", linewidth=1)
        said = f"copy {middle['GB/s']:.0f} GB/s, matmul {1e3 * middle['TFLOP/s']:.0f} GFLOP/s"
        axes.set_title(f"measured: {said}", fontsize=9)
    for color, op in zip(OP_COLORS, dict.fromkeys(r.op for r in rows), strict=False):
        for way, marker in (("forward", "o"), ("backward", "v"), ("forward+backward", "s")):
            points = [r for r in rows if (r.op, r.direction) == (op, way)]
            rates = [useful_tflops(r) for r in points]
            name = f"{op}, {way}" if points else None
            axes.plot([r.facts["intensity"] for r in points], rates, marker, color=color, label=name, markersize=6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("useful FLOPs per byte that must move")
    axes.set_ylabel("useful TFLOP/s")
    axes.legend(fontsize=7)
    return figure


def growth_value(row: Row, candidate: str, what: str) -> float:
    """Milliseconds, or megabytes at the peak; NaN where it was not measured."""
    if what == "time":
        return row.time(candidate)
    return (row.facts["peak_bytes"][candidate] or math.nan) / 1e6


def draw_growth(rows: Sequence[Row]) -> plt.Figure:
    figure, grid = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    for axes_row, (what, unit) in zip(grid, (("time", "ms"), ("peak memory", "MB")), strict=True):
        for axes, (key, other, fixed) in zip(axes_row, (("S", "L", 256), ("L", "S", 4)), strict=True):
            some = sorted((r for r in rows if r.facts[other] == fixed), key=lambda r: r.facts[key])
            if all(math.isnan(growth_value(r, "ours", what)) for r in some):
                axes.set_axis_off()
                continue
            for way, style in (("training", "-o"), ("sampling", "--s")):
                points = [r for r in some if r.direction == way]
                for name, color in (("ours", OURS), ("published_eager", BEST)):
                    values = [growth_value(r, name, what) for r in points]
                    axes.plot([r.facts[key] for r in points], values, style, color=color, label=f"{words(name)}, {way}")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks([r.facts[key] for r in some], [str(r.facts[key]) for r in some])
            axes.set_xlabel(f"{'segments S' if key == 'S' else 'tokens per segment L'} ({other} = {fixed})")
            axes.set_ylabel(f"{what}, {unit}")
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("")
    grid[0][0].legend(fontsize=7)
    grid[0][0].set_title(rows[0].shape.split(" S")[0], fontsize=9)
    return figure


def draw_overhead(rows: Sequence[Row]) -> plt.Figure:
    """Each point one (S, N, mask): what history adds to FLOPs and to time, with the spread of the rounds."""
    figure, axes = plt.subplots(figsize=(7, 5), layout="constrained")
    kinds = dict.fromkeys((r.direction, r.facts["S"], r.facts["mask"]) for r in rows)
    for i, (way, S, mask) in enumerate(kinds):
        points = [r for r in rows if (r.direction, r.facts["S"], r.facts["mask"]) == (way, S, mask)]
        spreads = [r.ratio_by_round for r in points]
        time = [100 / s["median"] - 100 for s in spreads]
        low = [max(0.0, t - (100 / s["p80"] - 100)) for t, s in zip(time, spreads, strict=True)]
        high = [max(0.0, 100 / s["p20"] - 100 - t) for t, s in zip(time, spreads, strict=True)]
        flops = [100 * r.facts["flop_ratio"] - 100 for r in points]
        color = OP_COLORS[i % len(OP_COLORS)]
        axes.errorbar(flops, time, [low, high], fmt="o", color=color, capsize=2, label=f"{way}, S={S}, {mask}")
    most = max(100 * r.facts["flop_ratio"] - 100 for r in rows)
    axes.plot([0, most], [0, most], color="black", linewidth=0.8, label="time = FLOPs")
    axes.set_xlabel("FLOPs added by history, %")
    axes.set_ylabel("time added, % (median of rounds, p20 to p80)")
    axes.set_title(rows[0].shape.split(" S")[0], fontsize=9)
    axes.legend(fontsize=7)
    return figure
