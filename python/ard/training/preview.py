"""What the averaged student makes during training: a grid of samples, and its Frechet distance to the teacher."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ard.common.process import Process
from ard.common.streams import noise_at
from ard.config.choices import autocast
from ard.config.recipe import Recipe
from ard.config.sections import PreviewConfig
from ard.data.trajectories import Trajectories
from ard.evaluation.features import load_features
from ard.evaluation.metrics import FeatureStatistics, feature_statistics, frechet_distance
from ard.models.student import ARDStudent
from ard.storage.images import latent_preview, to_uint8, write_grid
from ard.weights.vae import LatentCodec


class Preview:
    """Called with the updates done and the whole averaged weights; every rank samples its share.

    The noise is held out (another seed than the store's), the conditions are the trajectories'; the reference are their
    final states.
    """

    def __init__(
        self,
        student: ARDStudent,
        trajectories: Trajectories,
        settings: PreviewConfig,
        recipe: Recipe,
        folder: Path,
        process: Process,
    ):
        self.settings, self.folder, self.process = settings, folder / "samples", process
        self.context = autocast(recipe.execution.precision, process.device)
        with torch.device("meta"):
            self.student = ARDStudent(student.config, **student.settings).eval()
        self.features = load_features(settings.features, device=process.device)
        self.decode = LatentCodec(settings.vae, device=process.device).decode if settings.vae else None
        count, spec = min(settings.count, len(trajectories)), trajectories.spec
        if count < 2:
            raise ValueError(f"preview: there are {count} trajectories; expected at least 2, or preview.every=0")
        self.indices = process.share(torch.arange(count))
        self.noise = noise_at(spec.seed + 1, self.indices.tolist(), spec.image_shape)
        self.conditions = trajectories.conditions
        finals = [trajectories.pairs(part, recipe.student.state)[1][:, -1].float() for part in self._parts()]
        self.reference = self._statistics(torch.cat(finals))

    def __call__(self, step: int, weights: dict[str, Tensor]) -> dict[str, float]:
        self.student.load_state_dict(weights, assign=True)
        samples = []
        with torch.no_grad(), self.context():
            for noise, indices in zip(self.noise.split(self.settings.batch_size), self._parts(), strict=True):
                inputs = (tensor.to(self.process.device) for tensor in (noise, *self.conditions(indices)))
                samples.append(self.student.sample(*inputs)[:, -1].float())
        images = torch.cat(samples)
        self.student.to("meta")  # whole weights stay on no GPU between previews
        distance = frechet_distance(self._statistics(images), self.reference)
        grid = self.process.gather(images[: self.settings.grid])[: self.settings.grid]
        if self.process.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            pictures = self.decode(grid) if self.decode else latent_preview(grid)
            write_grid(
                self.folder / f"step-{step:08d}.png", to_uint8(pictures), columns=max(1, round(len(grid) ** 0.5))
            )
        return {"frechet_to_teacher": distance}

    def _statistics(self, states: Tensor) -> FeatureStatistics:
        """Of all ranks' states together."""
        rows = []
        with torch.no_grad():
            for part in states.split(self.settings.batch_size):
                batch = part.to(self.process.device)
                rows.append(self.features.extract(self.decode(batch) if self.decode else batch))
        return feature_statistics(self.process.gather(torch.cat(rows)))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.indices.split(self.settings.batch_size)
