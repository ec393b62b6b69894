"""Digit scenes: 16 x 16 images of a 2 x 2 grid with up to four of scikit-learn's scanned digits, and what they show.

    three above seven, nothing above two

A scene is four cells, (top left, top right, bottom left, bottom right), each a digit or EMPTY, at least one a digit:
11^4 - 1 of them, each with one prompt, its left column first. A fifth of the scenes, drawn once, is held out: their
words and places all occur in others, their combination in no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ard.common.streams import random_stream
from ard.data.digits import IMAGE_SHAPE, NUM_CLASSES

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "nothing")
EMPTY = NUM_CLASSES
CELLS = 4
CELL = IMAGE_SHAPE[1]  # pixels along a side of a cell
SCENE_SHAPE = (1, 2 * CELL, 2 * CELL)
EMPTY_SHARE = 0.25  # of the cells of drawn scenes
HELD_OUT_SHARE = 0.2

Scene = tuple[int, ...]


def prompt_of(scene: Sequence[int]) -> str:
    """A scene in words."""
    top_left, top_right, bottom_left, bottom_right = (WORDS[cell] for cell in scene)
    return f"{top_left} above {bottom_left}, {top_right} above {bottom_right}"


@cache
def _held_out() -> frozenset[int]:
    """Codes of the held-out scenes; the split has its own fixed seed."""
    codes = np.random.RandomState(0).permutation((NUM_CLASSES + 1) ** CELLS)
    return frozenset(codes[: round(HELD_OUT_SHARE * len(codes))].tolist())


def is_held_out(scene: Sequence[int]) -> bool:
    code = 0
    for cell in scene:
        code = code * (NUM_CLASSES + 1) + cell
    return code in _held_out()


def draw_scenes(count: int, seed: int, *, held_out: bool) -> list[Scene]:
    """Scenes of one side of the split; scene i is a function of (seed, i)."""
    return [_drawn(random_stream(seed, "scenes", index), held_out) for index in range(count)]


def _drawn(draw: np.random.Generator, held_out: bool) -> Scene:
    while True:
        digits = draw.integers(NUM_CLASSES, size=CELLS)
        cells = np.where(draw.random(CELLS) < EMPTY_SHARE, EMPTY, digits).tolist()
        if cells != [EMPTY] * CELLS and is_held_out(cells) == held_out:
            return tuple(cells)


def render(scenes: Sequence[Scene], images: Tensor, labels: Tensor, seed: int) -> Tensor:
    """Scenes (n, 1, 16, 16) of real digits: for each cell any of the images (m, 1, 8, 8) with its label; empty is -1.

    Which ones is a function of (seed, i).
    """
    of_digit = [images[labels == digit] for digit in range(NUM_CLASSES)]
    blank = torch.full((1, *IMAGE_SHAPE), -1.0)
    cells = torch.empty(len(scenes), CELLS, *IMAGE_SHAPE)
    for index, scene in enumerate(scenes):
        draw = random_stream(seed, "cells", index)
        for place, cell in enumerate(scene):
            known = blank if cell == EMPTY else of_digit[cell]
            cells[index, place] = known[int(draw.integers(len(known)))]
    rows = cells.unflatten(1, (2, 2)).permute(0, 3, 1, 4, 2, 5)  # (n, 1, 2, 8, 2, 8)
    return rows.reshape(len(scenes), *SCENE_SHAPE)


def cells_of(images: Tensor) -> Tensor:
    """(n, 1, 16, 16) -> (n, 4, 1, 8, 8)."""
    grid = images.unflatten(3, (2, CELL)).unflatten(2, (2, CELL))  # (n, 1, 2, 8, 2, 8)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
