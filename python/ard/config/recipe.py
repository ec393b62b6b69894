"""Settings of teacher, trajectories, distillation and GAN fine-tune: frozen dataclasses, read from YAML.

A recipe is one YAML file (configs/*.yaml). ``extends: other.yaml`` lays it over another one beside it, ``extends:
digits`` over a shipped one; ``key.sub=value`` on the command line is laid over both. Its value is YAML, or, for a
setting that is text, the text as it stands; ``~`` in a path is the home folder. Sections that only other commands need
(``demo``) are not part of a recipe.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

from ard.common.settings import build, field_kind, merge, require_known
from ard.config.sections import (
    ExecutionConfig,
    GanConfig,
    PreviewConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
    TrajectoriesConfig,
)
from ard.models.config import ModelConfig
from ard.models.families import config_class
from ard_kernels.common.arguments import described

FOREIGN_SECTIONS = ("demo",)


@dataclass(frozen=True)
class Recipe:
    model: ModelConfig
    teacher: TeacherConfig
    trajectories: TrajectoriesConfig
    student: StudentConfig
    distill: TrainConfig
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    preview: PreviewConfig = field(default_factory=lambda: PreviewConfig(every=0))
    gan: GanConfig | None = None

    VARIANTS: ClassVar = {"model": config_class}

    def __post_init__(self) -> None:
        model, trajectories, student = self.model, self.trajectories, self.student
        convention = model.CONVENTION
        if trajectories.solver not in (None, *convention.solvers):
            raise ValueError(
                f"trajectories.solver is {trajectories.solver!r}; expected one of {convention.solvers}, for "
                f"model.family={model.family!r}"
            )
        if trajectories.shift and convention.schedule == "ddpm":
            raise ValueError(
                f"trajectories.shift is {trajectories.shift}; expected 0 for model.family={model.family!r}"
            )
        times = convention.grid(trajectories.sampling_steps, trajectories.shift)[:-1]
        if trajectories.cfg_interval is not None:
            first, last = convention.check_interval(trajectories.cfg_interval, "trajectories.cfg_interval")
            if trajectories.cfg_scale != 1.0 and not any(first <= time <= last for time in times):
                raise ValueError(
                    f"trajectories.cfg_interval is {[first, last]}; expected one with a step in it: none of "
                    f"{trajectories.sampling_steps} would be guided"
                )
        ends = sorted((convention.noise_time, convention.data_time))
        time = self.gan.feature_timestep if self.gan else None
        if time is not None and not ends[0] <= time <= ends[1]:
            raise ValueError(
                f"gan.feature_timestep is {time:g}; expected within [{ends[0]:g}, {ends[1]:g}], the times of "
                f"model.family={model.family!r}"
            )
        most = {
            "trajectories.cfg_channels": (trajectories.cfg_channels, f"model.in_channels={model.in_channels}"),
            "student.history_layers": (student.history_layers, f"model.depth={model.depth}"),
        }
        for name, (value, limit) in most.items():
            if value > int(limit.rpartition("=")[2]):
                raise ValueError(f"{name} is {value}; expected at most {limit}")
        if student.state not in trajectories.store:
            store = list(trajectories.store)
            raise ValueError(f"student.state is {student.state!r}; expected one of trajectories.store={store}")
        if self.gan and self.gan.kernel_size // 2 > model.tokens:
            raise ValueError(
                f"gan.kernel_size is {self.gan.kernel_size}; expected at most {2 * model.tokens + 1}, which wraps "
                f"around the {model.tokens} tokens once"
            )

    @property
    def steps(self) -> int:
        """S, the student's steps."""
        return len(self.trajectories.keep)

    @property
    def segment_times(self) -> tuple[float, ...] | None:
        """The times of the student's segments; None for even ones."""
        convention, trajectories = self.model.CONVENTION, self.trajectories
        if (self.student.times or ("even" if convention.schedule == "ddpm" else "kept")) == "even":
            return None
        kept = convention.kept_times(trajectories.sampling_steps, trajectories.keep, trajectories.shift)
        return (convention.grid(trajectories.sampling_steps, trajectories.shift)[0], *kept[:-1])

    def student_facts(self) -> dict[str, Any]:
        """What a reader of a student's checkpoint needs to build it."""
        student = {**dataclasses.asdict(self.student), "steps": self.steps, "timesteps": self.segment_times}
        del student["times"]  # which timesteps say
        return {"kind": "student", "model": dataclasses.asdict(self.model), "student": student}


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a YAML file, or in the shipped one of that name ("imagenet256"), with ``key.sub=value`` over it.

    Raises ValueError on an unknown key (naming the nearest valid one), a missing key, or a value of the wrong type or
    outside its range.
    """
    values = {key: value for key, value in read_values(source).items() if key not in FOREIGN_SECTIONS}
    for override in overrides:
        values = merge(values, parse_override(Recipe, override, values))
    return build(Recipe, values)


def parse_override(cls: type, text: str, values: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """``key.sub=value`` as the nested mapping to lay over the ``values`` that ``cls`` is built from.

    The value is YAML; where the field takes text it is that text as it stands, but null and ~ are None where the field
    takes that. Raises ValueError on an unknown key, naming the nearest valid one, and on a value that is not YAML.
    """
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ValueError(f"override: got {described(text)}; expected key.sub=value")
    names = key.split(".")
    kind: Any = cls
    below: Any = values
    for depth, name in enumerate(names):
        section: Any = next((each for each in (kind, *typing.get_args(kind)) if dataclasses.is_dataclass(each)), None)
        if section is None:
            above = ".".join(names[:depth])
            raise ValueError(f"config: unknown key {described(key)}; {above!r} is no section; expected {above}=value")
        require_known(section, name, ".".join(names[:depth]))
        below = below.get(name) if isinstance(below, Mapping) else None
        kind = field_kind(section, name, below)
    kinds = (kind, *typing.get_args(kind)) if typing.get_origin(kind) is not tuple else (kind,)
    if str not in kinds:
        from ard.config.yaml_files import parse_yaml  # what trains without a recipe does without PyYAML

        nested = parse_yaml(value, f"override: got {described(text)}; expected key.sub=value, the value YAML")
    else:
        nested = None if value in ("null", "~") and type(None) in kinds else value
    for name in reversed(names):
        nested = {name: nested}
    return nested


def read_values(source: str | Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping of a YAML file with those it extends under it; relative names are beside it.

    above: the files that extend this one.
    """
    shipped = {path.stem: path for path in sorted(Path(str(files("ard") / "configs")).glob("*.yaml"))}
    path = shipped.get(str(source), Path(source))
    if not path.exists():
        raise ValueError(
            f"config: no such file and no shipped recipe {described(str(source))}; expected a YAML file or one of "
            + ", ".join(shipped)
        )
    if path.resolve() in above:
        raise ValueError(f"config: {path} extends itself, by way of {', '.join(other.name for other in above)}")
    from ard.config.yaml_files import read_yaml  # what trains without a recipe does without PyYAML

    values = read_yaml(path)
    base = values.pop("extends", None)
    if not isinstance(base, str | None):
        raise ValueError(f"{path}: extends is {described(base)}; expected the name of a YAML file beside it")
    if base is None:
        return values
    return merge(read_values(base if base in shipped else path.parent / base, (*above, path.resolve())), values)


def recipe_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `read_recipe` reads back to an equal one."""
    import yaml

    return yaml.safe_dump(plain(recipe), sort_keys=False)


def plain(config: Any) -> dict[str, Any]:
    """A config, or a mapping, as mappings, lists and scalars."""

    def convert(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: convert(item) for key, item in value.items()}
        return [convert(item) for item in value] if isinstance(value, tuple) else value

    return convert(config if isinstance(config, dict) else dataclasses.asdict(config))
