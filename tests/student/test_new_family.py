"""What a new family takes: docs/add_a_model.md, done here for two tiny ones."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import pytest
import torch
from ard import ARDStudent
from ard.config.recipe import read_recipe
from ard.data.trajectories import StoreSpec, TrajectoryStore, generate_store
from ard.diffusion import generate, trajectory
from ard.models.config import ClassConfig, Condition, ModelConfig
from ard.models.convention import Convention
from ard.models.dit import DiT, DiTBlock, DiTTrunk
from ard.models.families import FAMILIES, Family, make_teacher
from ard.models.layers import PatchEmbed, TimestepEmbedder, sincos_position_embedding
from ard.models.sit import SiTConfig
from ard.models.trunk import Teacher, Trunk
from ard.training.objectives import MicroBatch, StudentObjective
from student.test_families import SIT
from student.test_model import randomized
from torch import Tensor

# A family in full: its config, its trunk, its teacher, and below one line of the registry.


@dataclass(frozen=True)
class BackwardsConfig(ClassConfig):
    family: str = field(default="backwards", kw_only=True)

    CONVENTION: ClassVar = Convention("velocity", "linear", noise_time=1000.0, data_time=0.0, velocity_to_noise=True)


class BackwardsTrunk(DiTTrunk):
    """DiT's network, which sees the square root of the time."""

    def condition(self, t_BS: Tensor, *conditions: Tensor) -> Tensor:
        return super().condition(t_BS.double().sqrt(), *conditions)


class Backwards(Teacher, BackwardsTrunk):
    pass


@pytest.fixture
def backwards(monkeypatch) -> BackwardsConfig:
    monkeypatch.setitem(FAMILIES, "backwards", Family(BackwardsConfig, BackwardsTrunk, Backwards))
    return BackwardsConfig(input_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3)


def test_a_new_family_needs_its_file_and_a_line(backwards, tmp_path):
    """Teacher, trajectories, distillation, checkpoint, sampling and plan, by its registration alone."""
    from ard.diffusion.sampling import SamplingConfig, write_samples
    from ard.training import stages
    from ard.training.plan import plan
    from ard.weights.opened import open_student, open_teacher

    recipe = read_recipe("digits", ["trajectories.count=12", "trajectories.shard_size=8", "trajectories.batch_size=4"])
    recipe = replace(recipe, model=backwards, gan=None, preview=replace(recipe.preview, every=0))
    recipe = replace(recipe, distill=replace(recipe.distill, steps=3, batch_size=4))
    recipe = replace(recipe, teacher=replace(recipe.teacher, train=replace(recipe.teacher.train, steps=2)))
    images, labels = torch.randn(30, 3, 4, 4).clamp(-1, 1), torch.arange(30) % 3
    stages.train_teacher(recipe, images, labels, tmp_path / "teacher", data="noise")
    teacher, sha256 = open_teacher(tmp_path / "teacher", backwards)
    assert type(teacher) is Backwards
    store = stages.make_trajectories(recipe, teacher, sha256, tmp_path / "store")
    assert store.spec.family == "backwards" and store.spec.solver == "euler"
    stages.distill(recipe, teacher, sha256, store, tmp_path / "student")
    student, _ = open_student(tmp_path / "student", recipe)
    assert student.segment_times == (1000.0, 600.0, 400.0, 200.0)
    write_samples(student, tmp_path / "samples", SamplingConfig(5, batch_size=5))
    assert plan(recipe)["flops"]["overhead of the history"] > 0


@dataclass(frozen=True)
class PairConfig(ClassConfig):
    """Steered by two classes."""

    family: str = field(default="pair", kw_only=True)

    CONVENTION: ClassVar = Convention("velocity", "linear", noise_time=0.0, data_time=1.0)
    conditions: ClassVar = (Condition("labels", classes=3), Condition("style", classes=2))


class PairTrunk(DiTTrunk):
    def condition(self, t_BS: Tensor, *conditions: Tensor) -> Tensor:
        return super().condition(t_BS, conditions[0]) + conditions[1][:, None, None]


class Pair(Teacher, PairTrunk):
    pass


def test_samples_of_two_classes(monkeypatch, tmp_path, pillow):
    """Images with the labels; what else steers them has no place in the file."""
    from ard.diffusion.sampling import SamplingConfig, write_samples

    monkeypatch.setitem(FAMILIES, "pair", Family(PairConfig, PairTrunk, Pair))
    config = PairConfig(input_size=4, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    student = ARDStudent(config, steps=2, history_layers=1)
    write_samples(student, tmp_path, SamplingConfig(5, batch_size=5))
    assert np.load(tmp_path / "samples.npz")["arr_1"].tolist() == [0, 1, 2, 0, 1]


@dataclass(frozen=True)
class TextConfig(ModelConfig):
    """Steered by text: a number of tokens, some of which are there."""

    family: str = field(default="text", kw_only=True)

    CONVENTION: ClassVar = Convention("x0", "linear", noise_time=0.0, data_time=1.0)
    conditions: ClassVar = (Condition("text", (6, 10), "float32"), Condition("text_mask", (6,), "bool"))


class TextBlock(DiTBlock):
    """Adds what it reads in the text to every token, then does as DiT's."""

    def __init__(self, config: TextConfig):
        super().__init__(config)
        self.read = torch.nn.Linear(10, config.hidden_size)

    def residuals(self, x_BTC, pending, attend, segment_length, rows_BSR, context):
        text_BNE, mask_BN = context
        read_BC = (self.read(text_BNE) * mask_BN[..., None]).sum(1) / mask_BN.sum(1, keepdim=True)
        return super().residuals(x_BTC + read_BC[:, None], pending, attend, segment_length, rows_BSR, context)


class TextTrunk(Trunk):
    embed, finish, fixed = DiTTrunk.embed, DiTTrunk.finish, DiTTrunk.fixed

    def __init__(self, config: TextConfig):
        super().__init__(config)
        self.x_embedder, self.t_embedder = PatchEmbed(config), TimestepEmbedder(config)
        self.pos_embed = torch.nn.Parameter(torch.empty(1, config.tokens, config.hidden_size), requires_grad=False)
        self.blocks = torch.nn.ModuleList(TextBlock(config) for _ in range(config.depth))

    def condition(self, t_BS, *conditions):
        return self.t_embedder(t_BS).expand(len(conditions[0]), -1, -1)

    def context(self, *conditions):
        return conditions

    def null_conditions(self, text, mask):
        return torch.zeros_like(text), torch.ones_like(mask)

    def initialize_weights(self):
        self.initialize_linears()
        with torch.no_grad():
            self.pos_embed.copy_(sincos_position_embedding(self.config.hidden_size, self.config.grid_hw)[None])


class TextTeacher(Teacher, TextTrunk):
    pass


def test_a_family_steered_by_text(monkeypatch, tmp_path):
    """Several conditions, none of them labels, which blocks read themselves: model, guidance, store and objective."""
    monkeypatch.setitem(FAMILIES, "text", Family(TextConfig, TextTrunk, TextTeacher))
    config = TextConfig(input_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2)
    teacher = randomized(make_teacher(config))
    generator = torch.Generator().manual_seed(3)
    text, mask = (
        torch.randn(9, 6, 10, generator=generator),
        torch.arange(6).expand(9, 6) < torch.arange(9)[:, None] % 6 + 1,
    )
    noise = torch.randn(9, 3, 4, 4, generator=generator)
    unguided, guided = (trajectory(teacher, noise, text, mask, times=4, cfg_scale=scale) for scale in (1.0, 2.0))
    assert not torch.allclose(unguided[:, -1], guided[:, -1])
    hidden = text.masked_fill(~mask[..., None], 7.0)  # what the mask hides is not read
    assert torch.equal(
        trajectory(teacher, noise, hidden, mask, times=4), trajectory(teacher, noise, text, mask, times=4)
    )

    student = ARDStudent.from_teacher(teacher, steps=3, history_layers=1)
    samples = student.sample(noise, text, mask)
    states = torch.cat([noise[:, None], samples[:, :-1]], dim=1)
    torch.testing.assert_close(student(states, text, mask), samples, rtol=1e-4, atol=1e-4)
    for block in student.blocks:
        block.recompute = True
    student(states, text, mask).sum().backward()
    assert student.blocks[0].read.weight.grad.abs().sum() > 0

    kept = {"sampling_steps": 4, "keep": (2, 1, 0), "cfg_scale": 2.0}

    class Numbered:
        """A source of conditions: sample i takes text i, of which the number is stored."""

        stored, fingerprint = (Condition("number", classes=9),), "nine texts"

        def drawn(self, seed, indices):
            return (torch.tensor(list(indices)),)

        def tensors(self, numbers):
            return text[numbers], mask[numbers]

    spec = StoreSpec(9, 4, 0, config.image_shape, Numbered.stored, cfg_channels=3, family="text", **kept)
    spec, how = replace(spec, prompts=Numbered.fingerprint), {"batch_size": 4, "source": Numbered()}
    store = generate_store(tmp_path / "store", spec, lambda *inputs: generate(teacher, *inputs, **kept), **how)
    with pytest.raises(ValueError, match="numbers of prompts; expected their store"):
        TrajectoryStore(tmp_path / "store").pairs(torch.tensor([8]))
    _, targets, conditions = store.pairs(torch.tensor([8, 2, 5]))
    assert torch.equal(conditions[0], text[[8, 2, 5]]) and torch.equal(conditions[1], mask[[8, 2, 5]])
    losses = StudentObjective(store, state="x0", seed=0).sample_losses(
        student, MicroBatch(0, torch.arange(9), slice(9))
    )
    assert losses.shape == (9,) and losses.isfinite().all() and targets.dtype == torch.float32
    with pytest.raises(ValueError, match=r"text_mask: got \(9, 6\) torch\.float32; expected \(9, 6\) of torch\.bool"):
        teacher(noise, torch.zeros(9), text, mask.float())


def test_a_config_is_of_its_own_family():
    with pytest.raises(ValueError, match=r"SiTConfig: family is 'dit'; expected 'sit'"):
        SiTConfig(family="dit")
    with pytest.raises(ValueError, match=r"model\.family is 'dot'; expected one of dit, sit, repa, lightningdit"):
        read_recipe("digits", ["model.family=dot"])
    assert isinstance(read_recipe("digits", ["model.family=sit", "gan.feature_timestep=null"]).model, SiTConfig)
    with pytest.raises(TypeError, match=r"ARDStudent: config is a dict"):
        ARDStudent({})
    assert isinstance(ARDStudent(SIT, steps=1, history_layers=0), DiTTrunk) and not isinstance(
        ARDStudent(SIT, steps=1, history_layers=0), DiT
    )
