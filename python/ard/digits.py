"""The handwritten digits of scikit-learn, and the small classifier whose features score generated digits.

Source: ``sklearn.datasets.load_digits``, the test set of the UCI "Optical Recognition of Handwritten Digits" data
(Alpaydin and Kaynak, 1998): 1797 real scans, 8x8, 17 grey levels, 10 classes, shipped inside scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ard.config import COUNT, SEED, Ranged
from ard.streams import batch_indices

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


class DigitClassifier(nn.Module):
    """Two convolutions and one hidden layer; the hidden layer's FEATURES activations are the features of the scores."""

    FEATURES = 64

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.GELU(),
            nn.Conv2d(32, 64, kernel_size=3, padding=1, stride=2),
            nn.GELU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, self.FEATURES),
            nn.GELU(),
        )
        self.head = nn.Linear(self.FEATURES, NUM_CLASSES)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> (n, FEATURES)."""
        return self.body(images)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, 1, 8, 8) -> logits (n, 10)."""
        return self.head(self.body(images))


@dataclass(frozen=True)
class ClassifierConfig(Ranged):
    steps: int = 400
    batch_size: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    seed: int = 0

    RANGES: ClassVar = {
        "steps": COUNT,
        "batch_size": "[1, 65536]",
        "learning_rate": "[0, 10]",
        "weight_decay": "[0, inf)",
        "seed": SEED,
    }


def train_classifier(digits: Digits, config: ClassifierConfig) -> tuple[DigitClassifier, float]:
    """Trains on the training split; returns the classifier, in eval mode, and its accuracy on the held-out split."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
    for step in range(config.steps):
        batch = batch_indices(config.seed, step, config.batch_size, len(digits.train_labels))
        loss = F.cross_entropy(model(digits.train_images[batch]), digits.train_labels[batch])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    model.eval().requires_grad_(False)
    accuracy = (model(digits.held_out_images).argmax(dim=1) == digits.held_out_labels).double().mean()
    return model, float(accuracy)
