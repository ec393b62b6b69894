"""The small classifier whose features score generated digits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ard.common.settings import COUNT, SEED, Ranged
from ard.common.streams import batch_indices
from ard.data.digits import NUM_CLASSES, Digits


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
