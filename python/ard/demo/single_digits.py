"""The demo of classes: scikit-learn's digits, 8 x 8, steered by their label."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ard.data import digits
from ard.data.latents import LatentsInMemory
from ard.demo.settings import DemoConfig
from ard.demo.students import Made, Stopwatch, averaged
from ard.evaluation.digit_classifier import DigitClassifier
from ard.evaluation.metrics import class_consistency
from ard.training import stages
from ard.weights.opened import open_source


class SingleDigits:
    """A `ard.demo.scores.Subject`."""

    name = "digits"

    def __init__(self, data: digits.Digits, classifier: DigitClassifier, config: DemoConfig):
        self.data, self.classifier, self.recipe = data, classifier, config.recipe
        self.real_images = torch.cat([data.train_images, data.held_out_images])
        (self.labels,) = self.conditions(config.demo.evaluation.count)
        self.captions = [str(label) for label in self.labels.tolist()]

    def make_teacher(self, out: Path, watch: Stopwatch) -> Made:
        recipe, data, folder = self.recipe, self.data, out / "teacher"
        assert recipe.teacher.train is not None  # of a DemoConfig
        with watch.training("teacher", recipe.teacher.train.steps) as on_step:
            teacher, fitted = stages.train_teacher(
                recipe, data.train_images, data.train_labels, folder, data="digits", resume=False, on_step=on_step
            )
        return Made(averaged(teacher, fitted), open_source(folder).sha256, fitted.log, recipe)

    def real(self) -> LatentsInMemory:
        return LatentsInMemory("digits", self.data.train_images, self.data.train_labels)

    def conditions(self, count: int) -> tuple[Tensor]:
        return (torch.arange(count) % digits.NUM_CLASSES,)

    def features(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)

    def shares(self, images: Tensor) -> dict[str, float]:
        return {"class_consistency": class_consistency(self.classifier(images), self.labels)}
