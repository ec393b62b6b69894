"""What the student's tests share."""

from __future__ import annotations

from copy import deepcopy

import pytest


@pytest.fixture
def pillow():
    """For what writes pictures."""
    return pytest.importorskip("PIL")


@pytest.fixture(autouse=True, scope="session")
def _one_classifier():
    """The digits' classifier, always the same, is trained once per process: it takes seconds."""
    from ard import digits

    train, trained = digits.train_classifier, {}

    def once(data: digits.Digits, config: digits.ClassifierConfig) -> tuple[digits.DigitClassifier, float]:
        if config not in trained:
            trained[config] = train(data, config)
        return deepcopy(trained[config])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_classifier", once)
        yield
