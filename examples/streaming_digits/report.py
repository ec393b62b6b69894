"""The table and the animation."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from moving import SIDE
from PIL import Image, ImageDraw

ZOOM, GAP, MARGIN = 2, 2, 140
GREYS = 8  # levels of the animation: few, so that it stays small


def mean_and_range(values: list[float]) -> str:
    """In percent: the mean over seeds, and the range where there is one."""
    mean = f"{100 * sum(values) / len(values):.0f} %"
    low, high = f"{100 * min(values):.0f}", f"{100 * max(values):.0f}"
    return mean if low == high else f"{mean} ({low}-{high})"


def shares(scores: list[dict]) -> list[str]:
    """Of every span the share of frames with the right digit, then that of right moves in all spans."""
    names = list(scores[0])
    right = [mean_and_range([seed[name]["right"] for seed in scores]) for name in names]
    return [*right, mean_and_range([sum(seed[name]["moves"] for name in names) / len(names) for seed in scores])]


def table(seeds: list[dict]) -> str:
    """Markdown, a line per model and view."""
    real = [seed["real"] for seed in seeds]
    head = ["steps", "a frame sees", *real[0], "right moves", "frames/s", "cache bytes, frame 10", "at the end"]
    lines = [["real clips", "", "", *shares(real), "", "", ""]]
    for rows in zip(*(seed["rows"] for seed in seeds), strict=True):  # one model and view, every seed
        first = rows[0]
        speed = sum(row["frames_per_second"] for row in rows) / len(rows)
        lines.append([first["model"], str(first["steps"]), first["view"], *shares([row["scores"] for row in rows])])
        lines[-1] += [f"{speed:.0f}", *(f"{size:,}" for size in first["cache_bytes"])]
    lines = [["", *head], [":--", "--:", ":--", *["--:"] * (len(head) - 2)], *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write(folder: Path, settings: dict, losses: list[float], seeds: list[dict], seconds: tuple[float, float]) -> None:
    """report.json, report.md; losses: the teacher's; seconds: of the whole program, then CPU seconds but the seeds'."""
    wall, cpu = seconds
    cpu += sum(seed["cpu_seconds"] for seed in seeds)
    result = {"settings": settings, "seconds": wall, "cpu_seconds": cpu, "teacher_losses": losses, "seeds": []}
    for seed in seeds:
        result["seeds"].append({name: value for name, value in seed.items() if name != "videos"})
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    text = f"""\
Share of frames that show the digit of the first, given frame; of moves, those by one place in both axes.
{settings["seeds"]} seeds: mean and range; {settings["streams"]} streams of {settings["rollout"]} frames each.

{table(seeds)}

{seeds[0]["parameters"]:,} parameters; the whole program took {wall:.0f} s, {cpu:.0f} CPU seconds.
"""
    (folder / "report.md").write_text(text)


def animate(path: Path, videos: dict[str, torch.Tensor], columns: int = 8, ends: int = 30) -> None:
    """An animated WebP: a row per name, a column per stream, of videos (streams, frames, 32, 32) in [-1, 1].

    Shown are the first and the last `ends` frames, so that the file stays small.
    """
    cell = SIDE * ZOOM + GAP
    size = MARGIN + columns * cell + GAP, len(videos) * cell + GAP + 14
    pictures = []
    frames = range(next(iter(videos.values())).shape[1])
    for frame in frames if len(frames) <= 2 * ends else (*frames[:ends], *frames[-ends:]):
        picture = Image.new("RGB", size, (200, 200, 200))
        draw = ImageDraw.Draw(picture)
        draw.text((6, size[1] - 13), f"frame {frame + 1}", fill=0)
        for row, (name, video) in enumerate(videos.items()):
            draw.text((6, GAP + row * cell + cell // 2 - 8), name, fill=0)
            grey = ((1 - video[:columns, frame]) / 2 * (GREYS - 1)).round() * (255 / (GREYS - 1))
            for column, image in enumerate(grey.clamp(0, 255).byte().numpy()):
                digit = Image.fromarray(image).resize((SIDE * ZOOM, SIDE * ZOOM), Image.Resampling.NEAREST)
                picture.paste(digit, (MARGIN + column * cell, GAP + row * cell))
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=150, loop=0, lossless=True)
