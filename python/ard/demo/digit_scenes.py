"""The demo of text: scenes of digits, 16 x 16, steered by prompts through a byte encoder trained with the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ard.conditions.prompts import PromptStore, write_prompts
from ard.config.recipe import Recipe
from ard.data import scenes
from ard.data.digits import Digits
from ard.data.latents import LatentsInMemory
from ard.demo.byte_encoder import ByteEncoder
from ard.demo.settings import DemoConfig
from ard.demo.students import Made, Stopwatch, averaged
from ard.evaluation.digit_classifier import DigitClassifier
from ard.models.families import make_teacher
from ard.models.pixart import PixArtConfig
from ard.storage import checkpoints
from ard.training.objectives import TeacherObjective
from ard.training.trainer import Trainer
from ard.weights.opened import open_source, state_sha256

SEEN, HELD_OUT = "seen", "held-out"  # stores of prompts


class WithEncoder(nn.Module):
    """A teacher of text with the encoder that it is trained with: states, times, bytes (n, M) -> the prediction."""

    def __init__(self, model: PixArtConfig, encoder: ByteEncoder):
        super().__init__()
        self.teacher, self.encoder = make_teacher(model), encoder

    def forward(self, x: Tensor, t: Tensor, bytes_nM: Tensor) -> Tensor:
        return self.teacher(x, t, *self.encoder(bytes_nM))


class FrozenEncoder:
    """A trained `ByteEncoder` as `ard.conditions.prompts.TextEncoder`."""

    def __init__(self, encoder: ByteEncoder, channels: int):
        self.encoder, self.tokens, self.channels = encoder, encoder.tokens, channels
        self.fingerprint = state_sha256(encoder.state_dict())

    def lengths(self, texts: Sequence[str]) -> list[int]:
        return [len(text.split(" ")) + 1 for text in texts]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self.encoder(self.encoder.bytes_of(texts))


class Reader:
    """Reads scenes back, cell by cell: the classifier's digit, or EMPTY where there is less ink than half that of the
    palest real digit."""

    def __init__(self, classifier: DigitClassifier, digits: Tensor):
        self.classifier, self.least = classifier, float(_ink(digits).min()) / 2

    def __call__(self, images: Tensor) -> Tensor:
        """Scenes (n, 1, 16, 16) -> (n, 4) int64."""
        cells = scenes.cells_of(images).flatten(0, 1)
        found = self.classifier(cells).argmax(dim=1)
        return torch.where(_ink(cells) < self.least, scenes.EMPTY, found).view(-1, scenes.CELLS)


def _ink(images: Tensor) -> Tensor:
    return ((images.clamp(-1.0, 1.0) + 1.0) / 2.0).mean(dim=(1, 2, 3))


class DigitScenes:
    """A `ard.demo.scores.Subject`: evaluated images take in turn a prompt of the trajectories and a held-out one."""

    name = "scenes"

    def __init__(self, data: Digits, classifier: DigitClassifier, config: DemoConfig):
        settings, count = config.demo.scenes, config.demo.evaluation.count
        assert settings is not None  # of a config for scenes
        self.settings, self.recipe, self.classifier = settings, config.recipe, classifier
        self.reader = Reader(classifier, data.train_images)
        self.train_scenes = scenes.draw_scenes(settings.count, settings.seed, held_out=False)
        self.train_images = scenes.render(self.train_scenes, data.train_images, data.train_labels, settings.seed)
        # Those that trajectories are made of, as far as they go.
        drawn = list(dict.fromkeys(self.train_scenes[: config.recipe.trajectories.count]))
        held_out = scenes.draw_scenes(count // 2, settings.seed, held_out=True)
        self.scenes = [held_out[i // 2] if i % 2 else drawn[i // 2 % len(drawn)] for i in range(count)]
        self.held_out = torch.arange(count) % 2 == 1
        self.texts = [scenes.prompt_of(scene) for scene in self.scenes]
        self.captions = [text + "\n(held out)" * (i % 2) for i, text in enumerate(self.texts)]
        # Real scenes of the same prompts, of any scans: what a perfect sampler would be at.
        images = torch.cat([data.train_images, data.held_out_images])
        labels = torch.cat([data.train_labels, data.held_out_labels])
        self.real_images = scenes.render(self.scenes, images, labels, config.demo.evaluation.seed)
        self.prompts: dict[str, PromptStore] = {}

    def make_teacher(self, out: Path, watch: Stopwatch) -> Made:
        """The averaged teacher and encoder; the store of prompts in the recipe."""
        recipe, settings, config = self.recipe, self.settings, self.recipe.teacher.train
        model = recipe.model
        assert config is not None and isinstance(model, PixArtConfig)  # of a DemoConfig
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            encoder = ByteEncoder(
                settings.longest_prompt,
                model.caption_tokens,
                model.caption_channels,
                settings.encoder_layers,
                settings.encoder_heads,
            )
            both = WithEncoder(model, encoder)
        prompts = [scenes.prompt_of(scene) for scene in self.train_scenes]
        empty = encoder.bytes_of([recipe.trajectories.negative_prompt or ""])
        objective = TeacherObjective(
            self.train_images,
            encoder.bytes_of(prompts),
            convention=model.CONVENTION,
            null=lambda bytes_nM: (empty.expand_as(bytes_nM),),
            label_dropout=recipe.teacher.label_dropout,
            seed=config.seed,
        )
        with watch.training("teacher and encoder", config.steps) as on_step:
            fitted = Trainer(both, objective, config, execution=recipe.execution).fit(on_step=on_step)
        both = averaged(both, fitted)
        parts = {"ema": both.teacher.state_dict(), "encoder": encoder.state_dict()}
        facts = {"kind": "teacher", "model": asdict(model), "steps": config.steps}
        checkpoints.remove_all(out / "teacher" / "checkpoints")
        checkpoints.save(out / "teacher" / "checkpoints", config.steps, parts, facts, keep_last=1)
        recipe = self._store_prompts(FrozenEncoder(encoder, model.caption_channels), prompts, out, watch)
        return Made(both.teacher, open_source(out / "teacher").sha256, fitted.log, recipe)

    def _store_prompts(self, encoder: FrozenEncoder, prompts: list[str], out: Path, watch: Stopwatch) -> Recipe:
        """The recipe with the store of the prompts that trajectories draw; another one holds the held-out prompts."""
        trajectories = self.recipe.trajectories
        given = {
            SEEN: prompts[: trajectories.count],
            HELD_OUT: [text for text, held in zip(self.texts, self.held_out.tolist(), strict=True) if held],
        }
        with watch.stage("prompts", len(given)) as advance:
            for side, texts in given.items():
                # The texts are functions of their number and of scenes.seed, which the encoder depends on.
                folder = out / "prompts" / side / f"{encoder.fingerprint[:16]}-{len(texts)}"
                negative = [trajectories.negative_prompt or ""]
                self.prompts[side] = write_prompts(folder, texts, encoder, negative=negative, batch_size=256)
                advance()
        drawn = str(self.prompts[SEEN].folder)
        return replace(self.recipe, trajectories=replace(trajectories, prompts=drawn))

    def real(self) -> LatentsInMemory:
        count = self.recipe.trajectories.count
        texts = [scenes.prompt_of(scene) for scene in self.train_scenes[:count]]
        return LatentsInMemory(
            f"scenes {self.settings.seed} {count}", self.train_images[:count], *self._text(texts, SEEN)
        )

    def conditions(self, count: int) -> tuple[Tensor, ...]:
        chosen = [index % len(self.scenes) for index in range(count)]
        rows = [self._text([self.texts[i]], HELD_OUT if self.held_out[i] else SEEN) for i in chosen]
        return tuple(torch.cat(tensors) for tensors in zip(*rows, strict=True))

    def _text(self, texts: Sequence[str], side: str) -> tuple[Tensor, Tensor]:
        store = self.prompts[side]
        return store.text(torch.tensor([store.number(text) for text in texts]))

    def features(self, images: Tensor) -> Tensor:
        """Of each cell."""
        return self.classifier.features(scenes.cells_of(images).flatten(0, 1))

    def shares(self, images: Tensor) -> dict[str, float]:
        """All four cells as the prompt says, and single cells; of seen prompts and of held-out ones."""
        right = self.reader(images) == torch.tensor(self.scenes)
        sides = {"seen": right[~self.held_out], "held_out": right[self.held_out]}
        whole = {f"scenes_{side}": float(cells.all(dim=1).double().mean()) for side, cells in sides.items()}
        return {**whole, **{f"cells_{side}": float(cells.double().mean()) for side, cells in sides.items()}}
