"""Which weights a path means: a run, one checkpoint of it, a public checkpoint file, or a diffusers folder."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ard.common.settings import build
from ard.config.recipe import Recipe, plain
from ard.config.sections import StudentConfig
from ard.models.config import ModelConfig
from ard.models.families import config_class, make_teacher
from ard.models.student import ARDStudent
from ard.models.trunk import Teacher
from ard.storage import checkpoints
from ard.storage.files import shown
from ard.weights import diffusers_format
from ard.weights.names import unseen_of
from ard.weights.public import load_student, load_teacher, read_state, student_of, student_steps, teacher_of

WEIGHTS = ("ema", "model")
TEXT_ENCODER = "text_encoder"  # among the facts of a student that is steered by text: the encoder's fingerprint
UNSTATED = ("caption_tokens",)  # fields of a model that a diffusers folder does not say


@dataclass(frozen=True)
class Source:
    """Weights with the sha256 of `state_sha256`, and what their run says about them (nothing for a bare file)."""

    path: Path
    state: Mapping[str, Tensor]
    sha256: str
    facts: Mapping[str, Any]
    step: int | None = None

    @property
    def text_encoder(self) -> str | None:
        """Fingerprint of the encoder whose text a student has read; None where its run says none."""
        return self.facts.get(TEXT_ENCODER)


def open_source(path: str | Path, weights: str = "ema", *, unfinished: bool = False) -> Source:
    """Reads and, for a run's checkpoint, verifies. weights: "ema" or "model", of a run or of a file that has both.

    path: a run's folder (its newest good checkpoint), one checkpoint's folder, a .safetensors, .pt or .pth file, or a
    diffusers folder of a DiT or a PixArt. Raises ValueError or FileNotFoundError saying what was found; and, but with
    ``unfinished``, ValueError for a run that has steps to go. (Who names one checkpoint has chosen that step.)
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: got {weights!r}; expected one of {WEIGHTS}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a run, a checkpoint or a file of weights")
    if path.is_file():
        return _source(path, read_state(path, weights), {})
    if (path / "checkpoints").is_dir() or (path / "config.yaml").is_file():
        found = checkpoints.read_newest(path / "checkpoints", [weights])
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
    if (path / checkpoints.CHECKPOINT_NAME).is_file():
        checkpoint = checkpoints.verified(path)
    else:
        state, config = diffusers_format.load_diffusers(path)
        stated = {name: value for name, value in asdict(config).items() if name not in UNSTATED}
        return _source(path, state, {"kind": "teacher", "model": stated})
    return _source(path, checkpoint.read(weights), checkpoint.facts, checkpoint.step)


def _source(path: Path, state: Mapping[str, Tensor], facts: Mapping[str, Any], step: int | None = None) -> Source:
    return Source(path, state, state_sha256(state), facts, step)


def open_teacher(path: str | Path, config: ModelConfig, *, unfinished: bool = False) -> tuple[Teacher, str]:
    """A frozen float32 teacher of exactly the sizes of ``config``, and the sha256 of its weights."""
    source = open_source(path, unfinished=unfinished)
    require_kind(source, "teacher")
    if source.facts:
        require_config(source, model_config(source, config), config)
        teacher = teacher_of(config, source.state)
    else:
        sizes: dict[str, Any] = {"num_heads": config.num_heads, "input_size": config.input_size, **unseen_of(config)}
        teacher = load_teacher(source.state, family=config.family, **sizes)
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
        config, (routing, steps, timesteps) = model_config(source), _student_facts(source)
    elif recipe:
        config, routing = recipe.model, recipe.student
        steps, timesteps = recipe.steps, recipe.segment_times
    else:
        raise ValueError(
            f"{path} is a bare file of weights; expected a recipe (--config) beside it, for heads and history layers"
        )
    if (found := student_steps(source.state)) != steps:
        whose = "its checkpoint" if source.facts else "the recipe"
        raise ValueError(
            f"{path} has final layers for {found} steps (a teacher has 1); expected {steps}, as {whose} says"
        )
    routed: dict[str, Any] = {"window": routing.window, "sink": routing.sink, "timesteps": timesteps}
    if source.facts:
        student = student_of(config, source.state, history_layers=routing.history_layers, **routed)
    else:
        student = load_student(
            source.state,
            num_heads=config.num_heads,
            input_size=config.input_size,
            history_layers=routing.history_layers,
            family=config.family,
            **routed,
            **unseen_of(config),
        )
    require_config(source, student.config, recipe.model if recipe else config)
    if source.facts and recipe:
        for name, value in plain(recipe.student_facts()["student"]).items():
            found = source.facts["student"].get(name)
            if found != value:
                raise ValueError(f"{source.path} is a student with {name}={found!r}; expected the recipe's {value!r}")
    return student.float(), source


def model_config(source: Source, beside: ModelConfig | None = None) -> ModelConfig:
    """The sizes that a source's facts say; of those that a diffusers folder cannot say, ``beside``'s."""
    values = source.facts.get("model")
    if beside and isinstance(values, Mapping) and values.get("family") == beside.family:
        named = [name for name in UNSTATED if hasattr(beside, name) and name not in values]
        values = {**values, **{name: getattr(beside, name) for name in named}}
    try:
        return build(config_class(values) if isinstance(values, Mapping) else ModelConfig, values)
    except ValueError as error:
        raise ValueError(f"{source.path}: the model of its facts is none ({str(error)[:200]})") from error


def _student_facts(source: Source) -> tuple[StudentConfig, int, tuple[float, ...] | None]:
    """History layers, window and sink; the steps; and the times of the segments, None for even ones."""
    student = source.facts.get("student")
    if not isinstance(student, dict) or type(student.get("steps")) is not int:
        raise ValueError(f"{source.path}: the student of its facts is {shown(student)}; expected one with steps")
    settings = {name: value for name, value in student.items() if name not in ("steps", "timesteps")}
    times = student.get("timesteps")
    numbers = isinstance(times, list) and all(type(time) in (int, float) and math.isfinite(time) for time in times)
    if times is not None and (not numbers or len(times) != student["steps"]):
        raise ValueError(f"{source.path}: the timesteps of its facts are {shown(times)}; expected one for each step")
    try:
        config = build(StudentConfig, settings)
    except ValueError as error:
        raise ValueError(f"{source.path}: the student of its facts is none ({str(error)[:200]})") from error
    return config, student["steps"], None if times is None else tuple(map(float, times))


def random_teacher(config: ModelConfig, seed: int = 0) -> tuple[Teacher, str]:
    """A teacher with random weights, also where training starts from zeros, to try a recipe; and their sha256."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        teacher = make_teacher(config)
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


def require_config(source: Source, found: ModelConfig, expected: ModelConfig) -> None:
    if found.family != expected.family:  # whose tensors might fit all the same
        raise ValueError(f"{source.path} has model.family={found.family!r}; expected {expected.family!r}")
    for name, value in asdict(expected).items():
        if getattr(found, name) != value:
            raise ValueError(f"{source.path} has model.{name}={getattr(found, name)!r}; expected {value!r}")
