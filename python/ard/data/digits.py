"""The handwritten digits of scikit-learn.

Source: ``sklearn.datasets.load_digits``, the test set of the UCI "Optical Recognition of Handwritten Digits" data
(Alpaydin and Kaynak, 1998): 1797 real scans, 8x8, 17 grey levels, 10 classes, shipped inside scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

NUM_CLASSES = 10
IMAGE_SHAPE = (1, 8, 8)
GREY_LEVELS = 16


@dataclass(frozen=True)
class Digits:
    """Images float32 (n, 1, 8, 8) in [-1, 1] and labels int64 (n,), split once; the split has its own fixed seed."""

    train_images: torch.Tensor
    train_labels: torch.Tensor
    held_out_images: torch.Tensor
    held_out_labels: torch.Tensor


def load(held_out_share: float = 0.2, split_seed: int = 0) -> Digits:
    """All 1797 digits, shuffled by ``split_seed`` and split."""
    if not 0.0 < held_out_share < 1.0:
        raise ValueError(f"digits.load: held_out_share={held_out_share}; expected between 0 and 1")
    from sklearn.datasets import load_digits  # runs on other images do without scikit-learn

    source = load_digits()
    order = np.random.RandomState(split_seed).permutation(len(source.target))
    images = torch.from_numpy((source.images[order] / (GREY_LEVELS / 2) - 1.0).astype(np.float32))[:, None]
    labels = torch.from_numpy(source.target[order].astype(np.int64))
    held_out = round(held_out_share * len(labels))
    return Digits(images[held_out:], labels[held_out:], images[:held_out], labels[:held_out])
