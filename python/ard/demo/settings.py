"""The settings of a demo: a recipe, and what is compared."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ard.common.settings import COUNT, SEED, Ranged, build, merge
from ard.config.recipe import Recipe, read_values
from ard.config.sections import PreviewConfig
from ard.data.scenes import SCENE_SHAPE
from ard.evaluation.digit_classifier import ClassifierConfig
from ard.models.pixart import PixArtConfig

RECIPES = {"dit": "digits", "sit": "digits_sit"}  # family -> shipped recipe
SCENES_RECIPE = "scenes"


@dataclass(frozen=True)
class EvaluationConfig(Ranged):
    count: int  # images per sampler; of scenes, half for prompts that were trained on and half for held-out ones
    batch_size: int
    seed: int  # of the held-out noise
    timing_batch_size: int
    timing_repeats: int

    RANGES: ClassVar = {
        "count": COUNT,
        "batch_size": "[1, 65536]",
        "seed": SEED,
        "timing_batch_size": "[1, 65536]",
        "timing_repeats": COUNT,
    }


@dataclass(frozen=True)
class ScenesConfig(Ranged):
    """Of digit scenes, and of the encoder of their prompts; its width and tokens are those that the model reads."""

    count: int  # for training the teacher; the prompts of the first ones, as many as trajectories, are stored
    seed: int
    encoder_layers: int
    encoder_heads: int
    longest_prompt: int  # bytes, with one for the end

    RANGES: ClassVar = {
        "count": COUNT,
        "seed": SEED,
        "encoder_layers": "[0, 64]",
        "encoder_heads": "[1, 1024]",
        "longest_prompt": "[1, 4096]",
    }


@dataclass(frozen=True)
class ComparisonConfig(Ranged):
    classifier: ClassifierConfig
    history_layers: tuple[int, ...]  # one student each; the first, 0, is the baseline, the last is fine-tuned
    seeds: tuple[int, ...]  # of the data order; replace those of the recipe's training
    evaluation: EvaluationConfig
    scenes: ScenesConfig | None = None  # instead of single digits
    workers: int | None = None  # processes of one thread each; as many as there are cores by default
    teacher_threads: int = 1  # of its training, which is alone; its bits depend on them, so not on the number of cores

    RANGES: ClassVar = {
        "history_layers": "[0, 1024]",
        "seeds": SEED,
        "workers": "[1, 64]",
        "teacher_threads": "[1, 64]",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.history_layers) < 2 or self.history_layers[0] != 0:
            raise ValueError(f"demo.history_layers is {list(self.history_layers)}; expected 0 first, then others")
        if not self.seeds:
            raise ValueError("demo.seeds is empty; expected at least one seed")

    @property
    def students(self) -> int:
        """That are trained beside each other."""
        return len(self.history_layers) * len(self.seeds)


@dataclass(frozen=True)
class DemoConfig:
    recipe: Recipe
    demo: ComparisonConfig

    def __post_init__(self) -> None:
        if self.demo.evaluation.seed == self.recipe.trajectories.seed:
            raise ValueError(
                f"demo.evaluation.seed is {self.demo.evaluation.seed}, as trajectories.seed; expected another one"
            )
        if self.recipe.teacher.train is None:
            raise ValueError("teacher.train is missing; expected the settings of the teacher's training")
        if self.recipe.gan is None:
            raise ValueError("gan is missing; expected the settings of the fine-tune")
        if self.demo.scenes:
            self._check_scenes(self.demo.scenes)

    def _check_scenes(self, scenes: ScenesConfig) -> None:
        model, trajectories = self.recipe.model, self.recipe.trajectories
        if not isinstance(model, PixArtConfig) or model.image_shape != SCENE_SHAPE:
            raise ValueError(
                f"model is of family={model.family!r} and {model.image_shape}; expected 'pixart' and {SCENE_SHAPE}, "
                "for scenes"
            )
        if trajectories.negative_prompt is None:
            raise ValueError("trajectories.negative_prompt is missing; expected '', the prompt of no scene")
        if scenes.count < trajectories.count:
            raise ValueError(
                f"demo.scenes.count is {scenes.count}; expected at least trajectories.count={trajectories.count}"
            )
        if model.caption_channels % scenes.encoder_heads:
            raise ValueError(
                f"demo.scenes.encoder_heads is {scenes.encoder_heads}; expected a divisor of "
                f"model.caption_channels={model.caption_channels}"
            )
        if self.demo.evaluation.count < 2:
            raise ValueError("demo.evaluation.count is 1; expected at least 2: a seen and a held-out prompt")


def load_config(
    quick: bool = False, changes: dict[str, Any] | None = None, family: str | None = None, scenes: bool = False
) -> DemoConfig:
    """The settings of configs/digits.yaml (digits_sit.yaml for the family "sit", scenes.yaml for scenes), under its
    ``quick`` section if asked, under ``changes``. family: "dit" by default; scenes have one of their own."""
    if scenes and family is not None:
        raise ValueError(f"family: got {family!r}; expected none with scenes, whose model is PixArt's")
    if not scenes and family is not None and family not in RECIPES:
        raise ValueError(
            f"family: got {family!r}; expected one of {', '.join(RECIPES)}, which the demo has a recipe for"
        )
    values = read_values(SCENES_RECIPE if scenes else RECIPES[family or "dit"])
    shorter = values["demo"].pop("quick")
    values = merge(merge(values, shorter if quick else {}), changes or {})
    comparison = build(ComparisonConfig, values.pop("demo"), "demo")
    return DemoConfig(replace(build(Recipe, values), preview=PreviewConfig(every=0)), comparison)
