"""What `ard demo` draws: the sample grid, the loss curves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ard.demo.scores import is_tuned
from ard.storage.files import atomic_path

GRID_COLUMNS, WIDE_COLUMNS = 20, 8
COLOURS = ("#c44e52", "#4c72b0", "#55a868", "#8172b3")  # baseline first
TEACHER_COLOUR = "#444444"


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
    path: Path,
    teacher_images: torch.Tensor,
    student_images: dict[tuple[str, int], torch.Tensor],
    captions: Sequence[str],
    wide: bool = False,
) -> None:
    """One column per noise: the teacher's image, and per sampler (first seed) its image and the difference to it.

    teacher_images: (n, 1, h, w) in [-1, 1]; student_images: (sampler, seed) -> the same; captions: n column titles.
    wide: fewer and larger columns, for captions that are sentences; a comma ends a line.
    """
    shown = captions[: WIDE_COLUMNS if wide else GRID_COLUMNS]
    columns = torch.arange(len(shown)) if wide else torch.tensor(np.argsort(shown, kind="stable"))
    size, title = (1.15, 7) if wide else (0.62, 10)
    first_seed: dict[str, torch.Tensor] = {}
    for (name, _), images in student_images.items():
        first_seed.setdefault(name, images)
    rows = [("teacher", teacher_images[columns], "gray_r")]
    for name, images in first_seed.items():
        rows.append((name, images[columns], "gray_r"))
        if not is_tuned(name):  # it is trained away from the teacher
            rows.append((f"{name} minus teacher", images[columns] - teacher_images[columns], "RdBu_r"))
    inches = (size * len(columns) + 1.9, (size + 0.04) * len(rows) + 0.55)
    figure = Figure(figsize=inches, dpi=80 if wide else 110, layout="constrained")
    axes = np.atleast_2d(figure.subplots(len(rows), len(columns), squeeze=False))
    for (name, images, colours), row_axes in zip(rows, axes, strict=True):
        for image, one in zip(images, row_axes, strict=True):
            one.imshow(image[0].numpy(), cmap=colours, vmin=-1, vmax=1, interpolation="nearest")
            one.set(xticks=[], yticks=[])
            one.spines[:].set_color("#dddddd")
        row_axes[0].set_ylabel(name, rotation=0, ha="right", va="center")
    for column, one in zip(columns.tolist(), axes[0], strict=True):
        one.set_title(captions[column].replace(", ", ",\n"), fontsize=title)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
