"""Recipes: YAML laid over YAML, overrides over both, mistakes answered with what was expected."""

from __future__ import annotations

import re
from dataclasses import FrozenInstanceError, dataclass, replace
from importlib.resources import files

import pytest
import yaml
from ard.config import build, merge
from ard.model import DiTConfig
from ard.recipe import ExecutionConfig, Recipe, TrainConfig, plain, read_recipe, read_values, write_recipe

SHIPPED = sorted(path.name.removesuffix(".yaml") for path in (files("ard") / "configs").iterdir())


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_read_and_written_back_equal(tmp_path, name):
    recipe = read_recipe(name)
    assert recipe.steps == len(recipe.trajectories.keep) and recipe.trajectories.keep[-1] == 0
    write_recipe(tmp_path / "recipe.yaml", recipe)
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_values_of_the_file_and_the_defaults_stand():
    recipe = read_recipe("digits")
    assert recipe.model.input_hw == (8, 8) and recipe.trajectories.keep == (15, 10, 5, 0)
    assert recipe.trajectories.store == ("x0",) and recipe.distill.betas == (0.9, 0.99)
    assert recipe.distill.weight_decay == 0.0 and recipe.execution.strategy == "ddp"
    with pytest.raises(FrozenInstanceError):
        recipe.distill.steps = 1


@pytest.mark.parametrize(
    "override, section, name, value",
    [
        ("distill.steps=7", "distill", "steps", 7),
        ("distill.learning_rate=1e-3", "distill", "learning_rate", 1e-3),
        ("distill.learning_rate=1", "distill", "learning_rate", 1.0),
        ("distill.cosine_decay=false", "distill", "cosine_decay", False),
        ("trajectories.keep=[20, 0]", "trajectories", "keep", (20, 0)),
        ("trajectories.store=[x0, ode]", "trajectories", "store", ("x0", "ode")),
        ("trajectories.folder=/a=b", "trajectories", "folder", "/a=b"),
        ("trajectories.folder=null", "trajectories", "folder", None),
        ("student.window=3", "student", "window", 3),
        ("model.input_size=16", "model", "input_size", 16),
        ("model.input_size=[8, 4]", "model", "input_size", (8, 4)),
        ("execution.strategy=fsdp", "execution", "strategy", "fsdp"),
    ],
)
def test_overrides_replace_one_value(tmp_path, override, section, name, value):
    before, recipe = read_recipe("digits"), read_recipe("digits", [override])
    found = getattr(getattr(recipe, section), name)
    assert found == value and type(found) is type(value)
    assert recipe == replace(before, **{section: replace(getattr(before, section), **{name: value})})
    write_recipe(tmp_path / "recipe.yaml", recipe)
    assert read_recipe(tmp_path / "recipe.yaml") == recipe


def test_later_overrides_win_and_nested_sections_are_reached():
    recipe = read_recipe("digits", ["teacher.train.steps=5", "distill.steps=1", "distill.steps=2"])
    assert recipe.teacher.train.steps == 5 and recipe.distill.steps == 2
    assert recipe.teacher.train.batch_size == read_recipe("digits").teacher.train.batch_size


@pytest.mark.parametrize(
    "override, message",
    [
        ("distill.learning_rat=1", r"unknown key 'distill.learning_rat'; did you mean 'distill.learning_rate'\?"),
        ("distil.steps=1", r"unknown key 'distil'; did you mean 'distill'\?"),
        ("teacher.train.step=1", r"unknown key 'teacher.train.step'; did you mean 'teacher.train.steps'\?"),
        ("distill.steps=many", r"distill.steps is 'many'; expected int"),
        ("distill.steps=1.5", r"distill.steps is 1.5; expected int"),
        ("distill.steps=true", r"distill.steps is True; expected int"),
        ("distill.steps=", r"distill.steps is None; expected int"),
        ("distill.learning_rate=fast", r"distill.learning_rate is 'fast'; expected float"),
        ("distill.learning_rate=true", r"distill.learning_rate is True; expected float"),
        ("distill.cosine_decay=1", r"distill.cosine_decay is 1; expected bool"),
        ("distill.betas=[0.9]", r"distill.betas has 1 entries; expected 2"),
        ("distill.betas=0.9", r"distill.betas is 0.9; expected a list"),
        ("trajectories.keep=[1, x]", r"trajectories.keep\[1\] is 'x'; expected int"),
        ("model.input_size=[8]", r"model.input_size has 1 entries; expected 2"),
        ("model.input_size=large", r"model.input_size is 'large'; expected int"),
        ("model=5", r"model is 5; expected a mapping"),
        ("model.depth.x=5", r"model.depth is \{'x': 5\}; expected int"),
        ("distill.steps=0", r"train.steps is 0; expected at least 1"),
        ("execution.save_every=0", r"execution.save_every is 0; expected at least 1"),
        ("execution.strategy=dp", r"execution.strategy is 'dp'; expected one of 'ddp', 'fsdp'"),
        ("trajectories.dtype=int8", r"trajectories.dtype is 'int8'; expected one of"),
        ("student.state=x1", r"student.state is 'x1'; expected one of"),
        ("distill.steps", r"override: got 'distill.steps'; expected key.sub=value"),
        ("=1", r"override: got '=1'; expected key.sub=value"),
        ("distill.betas=[0.9", r"override: got 'distill.betas=\[0.9'; expected key.sub=value, the value YAML"),
    ],
)
def test_mistakes_are_answered(override, message):
    with pytest.raises(ValueError, match=message):
        read_recipe("digits", [override])


def test_missing_keys_and_unknown_recipes_are_named(tmp_path):
    path = tmp_path / "recipe.yaml"
    values = read_values("digits")
    del values["trajectories"]["count"]
    path.write_text(yaml.safe_dump(values))
    with pytest.raises(ValueError, match=r"missing key 'trajectories.count'"):
        read_recipe(path)
    with pytest.raises(ValueError, match=r"no shipped recipe 'digit'; expected a YAML file or one of .*digits"):
        read_recipe("digit")
    path.write_text("- a\n- b\n")
    with pytest.raises(ValueError, match=r"holds a list; expected a mapping"):
        read_recipe(path)


def test_extends_lays_a_file_over_another_beside_it(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    write_recipe(base / "first.yaml", read_recipe("digits"))
    (base / "second.yaml").write_text(
        "extends: first.yaml\ndistill: {steps: 9, seed: 4}\ntrajectories: {keep: [3, 0]}\n"
    )
    (tmp_path / "third.yaml").write_text("extends: base/second.yaml\ndistill: {steps: 11}\n")
    recipe, digits = read_recipe(tmp_path / "third.yaml", ["distill.batch_size=2"]), read_recipe("digits")
    assert recipe.distill == replace(digits.distill, steps=11, seed=4, batch_size=2)
    assert recipe.trajectories.keep == (3, 0) and recipe.model == digits.model


def test_sections_of_other_commands_are_no_part_of_a_recipe():
    assert "demo" in read_values("digits") and not hasattr(read_recipe("digits"), "demo")


def test_plain_is_mappings_lists_and_scalars():
    values = plain(read_recipe("digits", ["model.input_size=[8, 4]"]))
    assert values["model"]["input_size"] == [8, 4] and values["gan"]["train"]["betas"] == [0.0, 0.99]
    assert yaml.safe_load(yaml.safe_dump(values)) == values


@dataclass(frozen=True)
class Odd:
    """A tuple before the number, tuples of tuples, and a union with neither."""

    size: tuple[int, int] | int = 1
    pairs: tuple[tuple[int, float], ...] = ()
    name: str | None = "a"
    model: DiTConfig | None = None


def test_types_of_fields_decide():
    assert build(Odd, {"size": 3}).size == 3 and build(Odd, {"size": [3, 4]}).size == (3, 4)
    assert build(Odd, {"pairs": [[1, 2], [3, 0.5]]}).pairs == ((1, 2.0), (3, 0.5))
    assert build(Odd, {"name": None}).name is None
    assert build(Odd, {"model": {"depth": 3}}).model == DiTConfig(depth=3)
    with pytest.raises(ValueError, match=r"pairs\[1\] has 1 entries; expected 2"):
        build(Odd, {"pairs": [[1, 2], [3]]})
    with pytest.raises(ValueError, match=r"unknown key 'model.dept'; did you mean 'model.depth'"):
        build(Odd, {"model": {"dept": 3}})


def test_train_config_answers_mistakes():
    with pytest.raises(ValueError, match=r"unknown key 'train.learning_rat'; did you mean 'train.learning_rate'\?"):
        build(TrainConfig, {"steps": 1, "learning_rat": 1e-3}, where="train")
    with pytest.raises(ValueError, match=r"missing key 'steps'"):
        build(TrainConfig, {})
    assert build(TrainConfig, {"steps": 1, "ema_decay": 0, "betas": [0.9, 0.99]}).betas == (0.9, 0.99)


def test_merge_replaces_leaves_only():
    base = {"a": {"x": 1, "y": [1, 2]}, "b": 3}
    assert merge(base, {"a": {"y": [5]}, "c": 4}) == {"a": {"x": 1, "y": [5]}, "b": 3, "c": 4}
    assert base == {"a": {"x": 1, "y": [1, 2]}, "b": 3}


def test_identity_leaves_out_what_may_change():
    short, long = TrainConfig(steps=5, log_every=1), TrainConfig(steps=50)
    assert short.identity() == long.identity()
    assert replace(short, cosine_decay=True).identity() != replace(long, cosine_decay=True).identity()
    assert replace(short, seed=1).identity() != short.identity()


def test_recipe_defaults_need_no_section():
    values = read_values("digits")
    required = {key: values[key] for key in ("model", "teacher", "trajectories", "student", "distill")}
    recipe = build(Recipe, required)
    assert recipe.gan is None and recipe.preview.every == 0 and recipe.execution == ExecutionConfig()


def test_recipes_that_extend_each_other_are_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(ValueError, match=r"a.yaml extends itself, by way of a.yaml, b.yaml"):
        read_recipe(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    "override, message",
    [
        ("distill.grad_clip=0", "train.grad_clip is 0.0; expected above 0, and .inf for no limit"),
        ("distill.warmup_steps=-1", "train.warmup_steps is -1; expected at least 0"),
        ("preview.every=-1", "preview.every is -1; expected at least 0"),
        ("preview.grid=0", "preview.grid is 0; expected at least 1"),
        ("gan.kernel_size=8", "gan.kernel_size is 8; expected an odd number"),
        ("gan.virtual_batch=0", "gan.virtual_batch is 0; expected at least 1"),
        ("execution.precision=fp16", "execution.precision is 'fp16'; expected one of 'fp32', 'bf16'"),
        ("trajectories.dtype=bf16", "trajectories.dtype is 'bf16'; expected one of 'float32', 'float16'"),
    ],
)
def test_values_that_would_train_wrongly_are_refused(override, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        read_recipe("digits", [override])
