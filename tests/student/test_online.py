"""Trajectories made on the fly equal stored ones; students of flow-matching teachers train, die, resume and sample."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ard.config.recipe import Recipe, read_recipe, recipe_text
from ard.data.trajectories import OnlineTrajectories
from ard.models.lightningdit import LightningDiTConfig
from ard.models.sit import SiTConfig
from ard.storage.checkpoints import newest
from ard.training import stages
from ard.training.plan import plan, sample_forwards
from ard.weights.opened import open_student, random_teacher
from command_line import ard
from fault_runs import Child, Report, in_memory, snapshot

tmp_path = in_memory
SIZES = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2, "num_classes": 3}
MODELS = {
    "sit": SiTConfig(**SIZES, in_channels=1),
    "lightningdit": LightningDiTConfig(**SIZES, patch_size=2, in_channels=3),
}


def recipe_of(family: str, **changes) -> Recipe:
    """Twenty steps on 40 trajectories of a tiny model."""
    overrides = ["trajectories.count=40", "trajectories.shard_size=16", "trajectories.batch_size=8", "distill.steps=20"]
    overrides += ["distill.batch_size=12", "trajectories.sampling_steps=5", "trajectories.keep=[3,2,1,0]"]
    overrides += ["trajectories.dtype=float16", "execution.save_every=1", "gan=null"]
    recipe = read_recipe("digits_sit", overrides)
    trajectories = replace(recipe.trajectories, cfg_channels=1, **changes)
    preview = replace(recipe.preview, every=0)
    return replace(recipe, model=MODELS[family], trajectories=trajectories, preview=preview)


def distill(folder: Path, family: str, online: bool, report: Report = bool) -> None:
    torch.manual_seed(0)  # checkpoints hold the state of a generator that nothing draws from
    recipe = recipe_of(family, online=online)
    teacher, sha256 = random_teacher(recipe.model)
    if online:
        trajectories = stages.online_trajectories(recipe, teacher, sha256, torch.device("cpu"))
    else:
        trajectories = stages.make_trajectories(recipe, teacher, sha256, folder.with_suffix(".store"))
    stages.distill(recipe, teacher, sha256, trajectories, folder, on_step=report)


@pytest.mark.parametrize("family", MODELS)
def test_online_equals_stored_bit_for_bit(tmp_path, family):
    distill(tmp_path / "stored", family, online=False)
    distill(tmp_path / "online", family, online=True)
    stored, online = (snapshot(tmp_path / name) for name in ("stored", "online"))
    assert len(stored) > 5 and stored.keys() == online.keys()
    differing = {path for path in stored if stored[path] != online[path]}
    assert differing == {"config.yaml"}  # which says online
    assert newest(tmp_path / "online" / "checkpoints").step == 20


def test_kept_states_are_rounded_as_stored_and_refused_alike():
    recipe = recipe_of("sit", online=True)
    teacher, sha256 = random_teacher(recipe.model)
    made = stages.online_trajectories(recipe, teacher, sha256, torch.device("cpu"))
    states, targets, (labels,) = made.pairs(torch.tensor([5, 0, 39]))
    assert states.dtype == targets.dtype == torch.float16 and labels.tolist() == [2, 0, 0]
    assert torch.equal(states[:, 1:], targets[:, :-1])
    assert torch.equal(states[:, 0], made.spec.noise([5, 0, 39]).half())
    with pytest.raises(ValueError, match=r"state is 'ode'; expected one of \('x0',\), as stored"):
        made.pairs(torch.tensor([0]), "ode")
    broken = OnlineTrajectories(made.spec, lambda *inputs: replace(good, x0=good.x0 * 1e9), 4, torch.device("cpu"))
    good = stages.sampler(teacher, recipe.trajectories, recipe.trajectories.keep, torch.device("cpu"))(
        made.spec.noise(range(4)), *made.conditions(torch.arange(4))
    )
    with pytest.raises(ValueError, match=r"x0 of the trajectories 0 to 3 are not finite as float16"):
        broken.pairs(torch.arange(4))


def test_a_float32_teacher_stays_one_inside_the_students_autocast(tmp_path):
    recipe = recipe_of("sit", online=True)
    teacher, sha256 = random_teacher(recipe.model)
    made = stages.online_trajectories(recipe, teacher, sha256, torch.device("cpu"))
    alone = made.pairs(torch.arange(8))
    with torch.autocast("cpu", torch.bfloat16):
        inside = made.pairs(torch.arange(8))
    assert torch.equal(alone[1], inside[1])


def test_a_teacher_of_another_family_or_size_is_refused(tmp_path):
    recipe = recipe_of("sit")
    for other in (MODELS["lightningdit"], replace(MODELS["sit"], num_heads=1)):
        teacher, sha256 = random_teacher(other)
        with pytest.raises(ValueError, match=r"teacher is a \w+Config\(.*; expected the recipe's SiTConfig\("):
            stages.make_trajectories(recipe, teacher, sha256, tmp_path / "store")
    heads = replace(recipe, model=replace(recipe.model, num_heads=1))
    source = stages.source_of(recipe)
    assert stages.store_spec(recipe, "", source) != stages.store_spec(heads, "", source)


def test_other_trajectories_than_the_recipes_are_refused(tmp_path):
    recipe = recipe_of("sit", online=True)
    teacher, sha256 = random_teacher(recipe.model)
    other = stages.online_trajectories(recipe_of("sit", shift=0.5), teacher, sha256, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"online generation holds trajectories with shift=0\.5; expected 0\.0"):
        stages.distill(recipe, teacher, sha256, other, tmp_path / "run")


@pytest.mark.parametrize(
    "kills", [pytest.param(4, marks=pytest.mark.slow), pytest.param(40, marks=pytest.mark.exhaustive)]
)
def test_an_online_student_killed_at_random_continues_and_ends_the_same(tmp_path, kills):
    """LightningDiT, whose rotary tables are buffers."""
    distill(tmp_path / "whole", "lightningdit", online=True)
    draw, killed = random.Random(0), 0
    for number in range(10 * kills):
        folder = tmp_path / f"parts{number}"
        finished = False
        while not finished:
            _, finished = Child(partial(distill, folder, "lightningdit", True)).kill_after(draw.uniform(0.0, 2.0))
            killed += not finished
        assert snapshot(folder) == snapshot(tmp_path / "whole")
        if killed >= kills:
            break
    assert killed >= kills


@pytest.mark.parametrize("family", MODELS)
def test_a_student_is_opened_as_it_was_trained(tmp_path, family):
    distill(tmp_path / "run", family, online=True)
    student, source = open_student(tmp_path / "run", recipe_of(family))
    assert student.segment_times == (0.0, 0.4, pytest.approx(0.6), 0.8) and source.step == 20
    assert student.config == MODELS[family]
    noise = torch.randn(3, *student.config.image_shape)
    samples = student.sample(noise, torch.tensor([0, 1, 2]))
    states = torch.cat([noise[:, None], samples[:, :-1]], dim=1)
    torch.testing.assert_close(student(states, torch.tensor([0, 1, 2])), samples, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"has model\.family='\w+'; expected 'dit'"):
        open_student(tmp_path / "run", read_recipe("digits"))


def test_the_command_distils_online_and_says_how_fast(tmp_path):
    (tmp_path / "tiny.yaml").write_text(recipe_text(recipe_of("sit", online=True)))
    arguments = ["-c", str(tmp_path / "tiny.yaml"), "--random-teacher", "distill.steps=2"]
    result = ard("distill", "--out", str(tmp_path / "run"), *arguments)
    assert result.exit_code == 0, result.output
    assert "2 steps done; loss " in result.stdout and "samples_per_second " in result.stdout
    assert not list(tmp_path.rglob("shard-*"))
    refused = ard("trajectories", *arguments)
    assert refused.exit_code == 1 and "trajectories.online is set" in refused.output


def test_the_plan_prices_both_ways():
    stored, online = (plan(recipe_of("sit", online=online)) for online in (False, True))
    assert stored["trajectories"]["teacher forwards of one"] == 10  # 5 Euler steps, guided
    assert stored["trajectories"]["teacher forwards per step, online"] == 120
    assert stored["trajectories"]["cheaper in FLOPs"] == "stored"  # 40 trajectories, of which 240 rows are drawn
    assert stored["disk"]["trajectories"] > 0 == online["disk"]["trajectories"]
    beside = "teacher; discriminator, its gradients and moments"
    assert online["memory"][beside] == 4 * online["parameters"]["teacher"] and stored["memory"][beside] == 0
    flops = online["flops"]
    assert flops["all trajectories, made online"] == 6 * flops["all trajectories, stored once"]


@pytest.mark.parametrize(
    "changes, forwards",
    [
        ({"solver": "heun"}, 20),
        ({"solver": "midpoint", "keep": (3, 1)}, 16),
        ({"cfg_scale": 1.0}, 5),
        ({"cfg_interval": (0.5, 1.0)}, 7),
    ],
)
def test_teacher_forwards_are_those_that_run(changes, forwards):
    recipe = recipe_of("sit", **changes)
    teacher, _ = random_teacher(recipe.model)
    rows = []
    teacher.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    sample = stages.sampler(teacher, recipe.trajectories, recipe.trajectories.keep, torch.device("cpu"))
    sample(torch.randn(2, 1, 4, 4), torch.tensor([0, 1]))
    assert sum(rows) / 2 == sample_forwards(recipe) == forwards
