"""Where the conditions of a sample come from: labels in turn, or prompts, of which stores keep the numbers.

Sample i's are a function of (seed, i), whatever the batches and processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ard.common.streams import shuffled
from ard.conditions.prompts import PromptStore
from ard.models.config import Condition, ModelConfig
from ard_kernels.common.arguments import described


class ConditionSource(Protocol):
    """stored: what stores of samples keep of the conditions. fingerprint: of what stored numbers stand for; None where
    they are the conditions themselves."""

    stored: tuple[Condition, ...]
    fingerprint: str | None

    def drawn(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """What is stored of the conditions of the samples (seed, index), (n, ...) each."""

    def in_turn(self, indices: Sequence[int], chosen: Sequence[int] = ()) -> tuple[Tensor, ...]:
        """The same of samples that take the chosen classes or prompts in turn; all, if none is chosen."""

    def tensors(self, *stored: Tensor) -> tuple[Tensor, ...]:
        """The model's conditions, (n, ...) each."""


class Classes:
    """Labels, all classes equally often: i mod the classes."""

    fingerprint: str | None = None

    def __init__(self, conditions: Sequence[Condition]):
        self.stored = tuple(conditions)
        if others := [condition for condition in self.stored if not condition.classes]:
            raise ValueError(
                f"conditions: {', '.join(map(str, others))} cannot be taken in turn as classes are; expected prompts "
                "for them, see `ard prompts encode`"
            )

    def drawn(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, ...]:
        return self.in_turn(indices)

    def in_turn(self, indices: Sequence[int], chosen: Sequence[int] = ()) -> tuple[Tensor, ...]:
        positions = torch.tensor([int(index) for index in indices], dtype=torch.int64)
        return tuple(_taken("classes", condition.classes, positions, chosen) for condition in self.stored)

    def tensors(self, *stored: Tensor) -> tuple[Tensor, ...]:
        return stored


class Prompts:
    """Text of a store of prompts: all equally often, in an order drawn from the seed."""

    def __init__(self, store: PromptStore):
        self.store = store
        self.fingerprint: str | None = store.spec.fingerprint()
        self.stored: tuple[Condition, ...] = (Condition("prompt", classes=store.spec.prompts),)

    def drawn(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, ...]:
        return (shuffled(seed, indices, self.store.spec.prompts, "prompts"),)

    def in_turn(self, indices: Sequence[int], chosen: Sequence[int] = ()) -> tuple[Tensor, ...]:
        positions = torch.tensor([int(index) for index in indices], dtype=torch.int64)
        return (_taken("prompts", self.store.spec.prompts, positions, chosen),)

    @property
    def texts(self) -> list[str]:
        """The prompts by number."""
        return self.store.texts[: self.store.spec.prompts]

    def number(self, prompt: str) -> int:
        """Of a prompt that samples draw. Raises ValueError for another text."""
        number = self.store.number(prompt)
        if number >= self.store.spec.prompts:
            raise ValueError(f"{self.store.folder} has {described(prompt)} as a negative prompt; expected a prompt")
        return number

    def tensors(self, *stored: Tensor) -> tuple[Tensor, ...]:
        """Text (n, N, E) and its mask (n, N)."""
        (numbers,) = stored
        return self.store.text(numbers)


def _taken(what: str, count: int, positions: Tensor, chosen: Sequence[int]) -> Tensor:
    numbers = torch.tensor(list(chosen) or range(count), dtype=torch.int64)
    if int(numbers.min()) < 0 or int(numbers.max()) >= count:
        raise ValueError(f"{what}: got {described(tuple(chosen))}; expected within [0, {count - 1}]")
    return numbers[positions % len(numbers)]


def source_for(stored: Sequence[Condition], fingerprint: str | None, source: ConditionSource | None) -> ConditionSource:
    """``source``, if it is the one of what is stored; labels in turn, where none is needed. Raises ValueError else."""
    if source is None and fingerprint is None:
        return Classes(stored)
    if source is None:
        raise ValueError("conditions: what is stored are numbers of prompts; expected their store beside it")
    if source.fingerprint != fingerprint or tuple(source.stored) != tuple(stored):
        raise ValueError(
            f"conditions: what is stored was made with prompts={fingerprint}, {', '.join(map(str, stored))}; got "
            f"prompts={source.fingerprint}, {', '.join(map(str, source.stored))}"
        )
    return source


def condition_source(model: ModelConfig, prompts: str | None) -> ConditionSource:
    """That of a model: classes, or the store of prompts in a folder, whose text must be of the model's sizes."""
    classes = all(condition.classes for condition in model.conditions)
    if classes != (prompts is None):
        needed = "none, its conditions are classes" if classes else "a folder of `ard prompts encode`"
        raise ValueError(f"prompts: got {prompts!r} for model.family={model.family!r}; expected {needed}")
    if prompts is None:
        return Classes(model.conditions)
    store = PromptStore(prompts)
    if store.spec.conditions != model.conditions:
        got, expected = (", ".join(map(str, each)) for each in (store.spec.conditions, model.conditions))
        raise ValueError(f"{prompts} holds {got}; expected the model's {expected}")
    return Prompts(store)


def encoder_of(source: ConditionSource) -> str | None:
    """Fingerprint of the text encoder of prompts; None where there is no text."""
    return source.store.spec.encoder if isinstance(source, Prompts) else None


def require_encoder(source: ConditionSource, expected: str | None, whose: str) -> None:
    """Raises ValueError for prompts that another text encoder has encoded: of the same sizes, but of another meaning.

    expected: its fingerprint, None where it is not known. whose: what has read its text so far.
    """
    if isinstance(source, Prompts) and expected is not None and source.store.spec.encoder != expected:
        raise ValueError(
            f"{source.store.folder} was encoded by {described(source.store.spec.encoder)}; expected "
            f"{described(expected)}, the text encoder of {whose}"
        )


def null_tensors(source: ConditionSource, negative_prompt: str | None) -> tuple[Tensor, ...] | None:
    """The conditions (1, ...) of a negative prompt; None without one. Raises ValueError for a text not stored."""
    if negative_prompt is None:
        return None
    if not isinstance(source, Prompts):
        raise ValueError(f"negative_prompt: got {negative_prompt!r}; expected none, where conditions are no prompts")
    return source.store.text(torch.tensor([source.store.number(negative_prompt)]))


def named(conditions: Sequence[Condition], tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """Tensors of conditions by name."""
    return {condition.name: tensor for condition, tensor in zip(conditions, tensors, strict=True)}
