"""Which weights a path means: a run, one checkpoint of it, a public checkpoint file, or a diffusers folder."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ard import exchange, training_state
from ard.checkpoint import load_student, load_teacher, read_state
from ard.config import build
from ard.files import shown
from ard.model import DiT
from ard.model_config import DiTConfig
from ard.recipe import Recipe, StudentConfig
from ard.student import ARDStudent

WEIGHTS = ("ema", "model")


@dataclass(frozen=True)
class Source:
    """Weights with the sha256 of `state_sha256`, and what their run says about them (nothing for a bare file)."""

    path: Path
    state: Mapping[str, Tensor]
    sha256: str
    facts: Mapping[str, Any]
    step: int | None = None


def open_source(path: str | Path, weights: str = "ema", *, unfinished: bool = False) -> Source:
    """Reads and, for a run's checkpoint, verifies. weights: "ema" or "model", of a run.

    path: a run's folder (its newest good checkpoint), one checkpoint's folder, a .safetensors, .pt or .pth file, or a
    diffusers DiT folder. Raises ValueError or FileNotFoundError saying what was found; and, but with ``unfinished``,
    ValueError for a run that has steps to go. (Who names one checkpoint has chosen that step.)
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: got {weights!r}; expected one of {WEIGHTS}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run, a checkpoint or a file of weights")
    if path.is_file():
        return _source(path, read_state(path), {})
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        found = training_state.read_newest(path / "checkpoints", [weights])
        if found is None:
            raise FileNotFoundError(f"{path} is a run without a checkpoint so far")
        checkpoint, (state,) = found
        steps = checkpoint.facts.get("steps")
        if not unfinished and (type(steps) is not int or checkpoint.step < steps):
            raise ValueError(
                f"{path} is unfinished, at step {checkpoint.step} of {shown(steps)}; expected a run that has ended. "
                "Give its command again to finish it, or take it as it is with --unfinished"
            )
        return _source(path, state, checkpoint.facts, checkpoint.step)
    if (path / training_state.CHECKPOINT_NAME).is_file():
        checkpoint = training_state.verified(path)
    else:
        state, config = exchange.load_diffusers(path)
        return _source(path, state, {"kind": "teacher", "model": asdict(config)})
    return _source(path, checkpoint.read(weights), checkpoint.facts, checkpoint.step)


def _source(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any], step: int | None = None) -> Source:
    return Source(path, state, state_sha256(state), facts, step)


def open_teacher(path: str | Path, config: DiTConfig, *, unfinished: bool = False) -> tuple[DiT, str]:
    """A frozen float32 teacher of exactly the sizes of ``config``, and the sha256 of its weights."""
    source = open_source(path, unfinished=unfinished)
    require_kind(source, "teacher")
    teacher = load_teacher(source.state, num_heads=config.num_heads, input_size=config.input_size)
    require_config(source, teacher.config, config)
    return teacher.float().requires_grad_(False), source.sha256


def open_student(
    path: str | Path, recipe: Recipe | None, weights: str = "ema", *, unfinished: bool = False
) -> tuple[ARDStudent, Source]:
    """A float32 student in eval mode; what its tensors do not show comes from its run, or else from ``recipe``.

    Raises ValueError if both are there and differ.
    """
    source = open_source(path, weights, unfinished=unfinished)
    require_kind(source, "student")
    if source.facts:
        config, routing, steps = model_config(source), *_student_facts(source)
    elif recipe:
        config, routing, steps = recipe.model, recipe.student, recipe.steps
    else:
        raise ValueError(f"{path} is a bare file of weights; expected a recipe beside it, for heads and history layers")
    student = load_student(
        source.state,
        num_heads=config.num_heads,
        input_size=config.input_size,
        history_layers=routing.history_layers,
        window=routing.window,
        sink=routing.sink,
    )
    if student.steps != steps:
        whose = "its checkpoint" if source.facts else "the recipe"
        raise ValueError(
            f"{path} has final layers for {student.steps} steps (a teacher has 1); expected {steps}, as {whose} says"
        )
    require_config(source, student.config, recipe.model if recipe else config)
    if source.facts and recipe:
        for name, value in recipe.student_facts()["student"].items():
            if source.facts["student"][name] != value:
                found = source.facts["student"][name]
                raise ValueError(f"{source.path} is a student with {name}={found!r}; expected the recipe's {value!r}")
    return student.float(), source


def model_config(source: Source) -> DiTConfig:
    """The sizes that a run's facts say."""
    try:
        return build(DiTConfig, source.facts.get("model"))
    except ValueError as error:
        raise ValueError(f"{source.path}: the model of its facts is none ({str(error)[:200]})") from error


def _student_facts(source: Source) -> tuple[StudentConfig, int]:
    """History layers, window and sink, and the steps."""
    student = source.facts.get("student")
    if not isinstance(student, dict) or type(student.get("steps")) is not int:
        raise ValueError(f"{source.path}: the student of its facts is {shown(student)}; expected one with steps")
    try:
        config = build(StudentConfig, {name: value for name, value in student.items() if name != "steps"})
    except ValueError as error:
        raise ValueError(f"{source.path}: the student of its facts is none ({str(error)[:200]})") from error
    return config, student["steps"]


def random_teacher(config: DiTConfig, seed: int = 0) -> tuple[DiT, str]:
    """A teacher with random weights, also where training starts from zeros, to try a recipe; and their sha256."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = DiT(config)
        for name, parameter in teacher.named_parameters():
            if name.endswith("weight") and not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return teacher.eval().requires_grad_(False), state_sha256(teacher.state_dict())


def state_sha256(state: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, in order of the names."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def require_kind(source: Source, kind: str) -> None:
    if source.facts and source.facts.get("kind") != kind:
        raise ValueError(f"{source.path} is a {source.facts.get('kind')}; expected a {kind}")


def require_config(source: Source, found: DiTConfig, expected: DiTConfig) -> None:
    for name, value in asdict(expected).items():
        if getattr(found, name) != value:
            raise ValueError(f"{source.path} has model.{name}={getattr(found, name)!r}; expected {value!r}")
