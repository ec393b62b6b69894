"""What the student's tests share."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch


@pytest.fixture(autouse=True)
def _the_gpu_only_where_asked(request, monkeypatch):
    """`ard` takes a GPU where there is one: in these tests only if the fixture `device` says so."""
    asked = "device" in request.fixturenames and request.getfixturevalue("device").type == "cuda"
    if not asked:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def pillow():
    """For what writes pictures."""
    return pytest.importorskip("PIL")


@pytest.fixture(autouse=True, scope="session")
def _one_classifier():
    """The digits' classifier, always the same, is trained once per process: it takes seconds."""
    from ard.evaluation import digit_classifier

    train, trained = digit_classifier.train_classifier, {}

    def once(data, config):
        if config not in trained:
            trained[config] = train(data, config)
        return deepcopy(trained[config])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digit_classifier, "train_classifier", once)
        yield
