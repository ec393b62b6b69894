"""Digit scenes: 16 x 16 images of a 2 x 2 grid with up to four of scikit-learn's scanned digits, and what they show in words.

    three above seven left, nothing right
    two bottom left, zero above nine right

A scene is four cells, (top left, top right, bottom left, bottom right), each a digit or EMPTY, at least one a digit:
11^4 - 1 of them, each with one prompt. A fifth of the scenes, drawn once, is held out: their words and places all occur in
others, their combination in no training.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from torch import Tensor

from ard.common.streams import random_stream
from ard.data.digits import IMAGE_SHAPE, NUM_CLASSES

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
EMPTY = NUM_CLASSES
CELLS = 4
CELL = IMAGE_SHAPE[1]  # pixels along a side of a cell
SCENE_SHAPE = (1, 2 * CELL, 2 * CELL)
EMPTY_SHARE = 0.25  # of the cells of drawn scenes
HELD_OUT_SHARE = 0.2

Scene = tuple[int, int, int, int]


def prompt_of(scene: Sequence[int]) -> str:
    """A scene in words: its left column, then its right one."""
    top_left, top_right, bottom_left, bottom_right = scene
    return f"{_column(top_left, bottom_left)} left, {_column(top_right, bottom_right)} right".replace("  ", " ")


def _column(top: int, bottom: int) -> str:
    if top == bottom == EMPTY:
        return "nothing"
    if bottom == EMPTY:
        return f"{WORDS[top]} top"
    return f"{WORDS[bottom]} bottom" if top == EMPTY else f"{WORDS[top]} above {WORDS[bottom]}"


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
    out = torch.empty(len(scenes), *SCENE_SHAPE)
    for index, scene in enumerate(scenes):
        draw = random_stream(seed, "cells", index)
        for place, cell in enumerate(scene):
            known = blank if cell == EMPTY else of_digit[cell]
            out[index, :, *_area(place)] = known[int(draw.integers(len(known)))]
    return out


def cells_of(images: Tensor) -> Tensor:
    """(n, 1, 16, 16) -> (n, 4, 1, 8, 8)."""
    return torch.stack([images[:, :, *_area(place)] for place in range(CELLS)], dim=1)


def _area(place: int) -> tuple[slice, slice]:
    top, left = CELL * (place // 2), CELL * (place % 2)
    return slice(top, top + CELL), slice(left, left + CELL)
