"""History pooled 2 x 2 over the token grid: against a plain statement, sampling against training, what is stored."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from ard import ARDStudent
from ard.checkpoint import load_student
from ard.common.settings import fingerprint
from ard.config.recipe import read_recipe
from ard.demo.settings import load_config
from ard.diffusion.sampling import SampleSpec
from ard.models import student as student_module
from ard.models.families import make_teacher
from ard.models.flops import flop_table
from ard.models.pooled import pooled_attention, pooled_mask
from ard.training.plan import plan
from ard.weights.opened import open_student
from student.test_families import LIGHTNING, SIT, double, drawn
from student.test_model import MASKS, SMALL

from ard_kernels import flops

CONFIGS = {"dit": SMALL, "sit": SIT, "lightningdit": LIGHTNING}
TINY = ["model.hidden_size=16", "model.depth=2", "model.num_heads=2", "student.history_layers=1", "preview.every=0",
        "trajectories.count=12", "trajectories.shard_size=12", "trajectories.batch_size=6", "distill.batch_size=4",
        "trajectories.sampling_steps=6", "trajectories.keep=[3,0]", "distill.steps=2", "execution.save_every=2",
        "teacher.train.steps=2", "teacher.train.batch_size=4"]  # fmt: skip


def plain(qkv, window, sink, grid_hw, p):
    """(B, T, 3, H, D) -> (B, T, H, D): query by query, from the definition."""
    q, k, v = qkv.unbind(2)
    L = grid_hw[0] * grid_hw[1]
    segments = [(k[:, i : i + L], v[:, i : i + L]) for i in range(0, qkv.shape[1], L)]

    def pooled(x):
        channels = x.unflatten(1, grid_hw).flatten(3).permute(0, 3, 1, 2)  # (B, HD, rows, columns)
        return F.avg_pool2d(channels, p).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:])

    outs = []
    for token in range(qkv.shape[1]):
        s = token // L
        past = [j for j in range(s) if window is None or s - j < window or j < sink]
        keys, values = (torch.cat([*(pooled(segments[j][i]) for j in past), segments[s][i]], 1) for i in (0, 1))
        weights = (torch.einsum("bhd,bkhd->bhk", q[:, token], keys) / q.shape[-1] ** 0.5).softmax(-1)
        outs.append(torch.einsum("bhk,bkhd->bhd", weights, values))
    return torch.stack(outs, 1)


def student_of(config, mask="M4", **settings):
    return double(ARDStudent(config, **{"steps": 4, "history_layers": 2, "history_pool": 2, **MASKS[mask], **settings}))


def own_states(student, noise, conditions):
    predictions = student.sample(noise, *conditions)
    return torch.cat([noise[:, None], predictions[:, :-1]], 1), predictions


@pytest.mark.parametrize("mask", [*MASKS.values(), {"window": 9, "sink": 7}, {"window": 2, "sink": 1}])
@pytest.mark.parametrize("grid_hw, p", [((4, 4), 2), ((2, 6), 2), ((6, 3), 3)])
def test_attention_and_its_gradient_are_the_plain_statement(mask, grid_hw, p):
    S, L = 4, grid_hw[0] * grid_hw[1]
    qkv = torch.randn(2, S * L, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    out = pooled_attention(qkv, mask=pooled_mask(S, **mask), grid_hw=grid_hw, pool=p)
    expected = plain(qkv, **mask, grid_hw=grid_hw, p=p)
    assert (out - expected).abs().max() < 1e-13
    weights = torch.randn_like(out)
    (grad,), (wanted,) = (torch.autograd.grad((x * weights).sum(), qkv) for x in (out, expected))
    assert (grad - wanted).abs().max() < 1e-12


@pytest.mark.parametrize("mask", MASKS)
def test_only_history_layers_pool_in_training(mask, monkeypatch):
    """The student with the plain statement in its place: which layers take it, and with which mask."""
    student, states, labels = student_of(SMALL, mask), *drawn(SMALL, 2, 4)[::2]
    expected, layers = student(states, labels), []

    def plainly(qkv, *, mask, grid_hw, pool):
        layers.append((mask, grid_hw, pool))
        return plain(qkv, **MASKS[name], grid_hw=grid_hw, p=pool)

    name = mask
    monkeypatch.setattr(student_module, "pooled_attention", plainly)
    assert (student(states, labels) - expected).abs().max() < 1e-12
    assert layers == [(pooled_mask(4, **MASKS[mask]), (4, 4), 2)] * 2
    whole = student_of(SMALL, mask, history_pool=1)
    assert ((whole(states, labels) - expected).abs().max() < 1e-12) == (mask == "M1")  # which reads no history
    none = {"history_layers": 0}
    assert torch.equal(
        student_of(SMALL, mask, **none)(states, labels), student_of(SMALL, history_pool=1, **none)(states, labels)
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("family", CONFIGS)
def test_sampling_equals_forward_on_its_own_predictions(family, mask):
    config = replace(CONFIGS[family], input_size=(8, 4)) if family == "lightningdit" else CONFIGS[family]
    student, (states, _, labels) = student_of(config, mask), drawn(config, 3, 4)
    cache = student.new_cache(3)
    for _ in range(2):  # a cache is used again
        read, predictions = own_states(student, states[:, 0], [labels])
        assert (student(read, labels) - predictions).abs().max() < 1e-12
        assert torch.equal(student.sample(states[:, 0], labels, cache=cache), predictions)
    for segments in (1, 2):  # of a forward of fewer segments
        assert (student(read[:, :segments], labels) - predictions[:, :segments]).abs().max() < 1e-12


def test_the_cache_holds_a_quarter_and_room_for_one_segment():
    student = student_of(SMALL)
    assert student.new_cache(3).memory.shape == (2, 3, 3 * 4 + 16, 2, 2, 16)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_autocast(precision):
    student, (states, _, labels) = student_of(SMALL).float(), drawn(SMALL, 2, 4)
    exact = student.sample(states[:, 0].float(), labels)
    with torch.autocast("cpu", precision):
        rounded = student.sample(states[:, 0].float(), labels)
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("history_layers, window, sink", [(0, None, 0), (2, None, 0), (3, 1, 1), (1, 2, 0)])
@pytest.mark.parametrize("family", ["dit", "sit"])
def test_flops_by_formula_are_those_counted(family, history_layers, window, sink):
    settings = {"history_layers": history_layers, "window": window, "sink": sink}
    table = flop_table(CONFIGS[family], steps=4, **settings, pool=2)
    assert all(row["analytic"] == row["counted"] for row in table.values())
    whole = flop_table(CONFIGS[family], steps=4, **settings)
    added, of_whole = (t["student_sampling"]["counted"] - t["baseline_sampling"]["counted"] for t in (table, whole))
    assert 4 * added == of_whole and (added > 0) == (history_layers > 0)


def test_the_plan_counts_the_pool():
    pooled, whole = (plan(read_recipe("digits", [*TINY, f"student.history_pool={p}"])) for p in (2, 1))
    assert pooled["flops"]["overhead of the history"] == pytest.approx(whole["flops"]["overhead of the history"] / 4)
    step = "student, forward and backward of one sample"
    assert pooled["flops"][step] < whole["flops"][step]
    names = [f"{name}, N = {n} of 2" for n in (1, 2) for name in ("M2", "M3", "M4")]
    assert list(whole["history"]) == names and list(pooled["history"]) == [f"{name}, pooled 2 x 2" for name in names]
    assert all(
        4 * p == pytest.approx(w) for p, w in zip(*(x["history"].values() for x in (pooled, whole)), strict=True)
    )


def test_what_is_not_pooled_is_stored_as_before():
    recipe = read_recipe("digits")
    assert recipe.student_facts()["student"] == {
        "history_layers": 2, "window": None, "sink": 0, "state": "x0", "steps": 4, "timesteps": None,
    }  # fmt: skip
    pooled = replace(recipe, student=replace(recipe.student, history_pool=2)).student_facts()["student"]
    assert pooled == {**recipe.student_facts()["student"], "history_pool": 2}
    settings = ARDStudent(SMALL, history_layers=1).settings
    assert set(settings) == {"steps", "history_layers", "window", "sink", "timesteps"}
    assert ARDStudent(SMALL, history_layers=1, history_pool=2).settings == {**settings, "history_pool": 2}
    spec = SampleSpec(
        count=1, shard_size=1, image_shape=(8, 8, 1), pixels=True, conditions=(), seed=0, classes=(), precision="fp32",
        model="m", weights_sha256="w", history_layers=2, window=None, sink=0, timesteps=None, codec="none",
    )  # fmt: skip
    assert {"history_pool": 1}.items() <= asdict(spec).items()
    assert fingerprint(spec) == FINGERPRINT_BEFORE and fingerprint(replace(spec, history_pool=2)) != FINGERPRINT_BEFORE


FINGERPRINT_BEFORE = "570ee1f73900"  # of that spec without the field, by commit 42f187d


def test_a_run_comes_back_as_it_was_and_refuses_the_other_kind(tmp_path, monkeypatch):
    pytest.importorskip("yaml")
    from command_line import ard

    monkeypatch.chdir(tmp_path)
    where = ["teacher.checkpoint=teacher", "trajectories.folder=trajectories"]
    kinds = {"whole": [], "pooled": ["student.history_pool=2"]}
    assert ard("teacher", "-c", "digits", "--out", "teacher", *TINY).exit_code == 0
    assert ard("trajectories", "-c", "digits", *TINY, *where).exit_code == 0
    for name, more in kinds.items():
        assert ard("distill", "-c", "digits", "--out", name, *TINY, *where, *more).exit_code == 0
    recipes = {name: read_recipe("digits", [*TINY, *where, *more]) for name, more in kinds.items()}
    for name, pool in (("whole", 1), ("pooled", 2)):
        student, source = open_student(name, None)
        assert student.history_pool == pool == source.facts["student"].get("history_pool", 1)
        assert open_student(name, recipes[name])[0].history_pool == pool
    for name, other, found in (("whole", "pooled", 1), ("pooled", "whole", 2)):
        with pytest.raises(
            ValueError, match=f"is a student with history_pool={found}; expected the recipe's {3 - found}"
        ):
            open_student(name, recipes[other])
        again = ard("distill", "-c", "digits", "--out", name, *TINY, *where, *kinds[other])
        assert again.exit_code == 1 and "history_pool" in again.output


def test_from_a_teacher_and_from_a_file():
    teacher = make_teacher(SMALL)
    student = ARDStudent.from_teacher(teacher, steps=3, history_layers=1, history_pool=2)
    how = {"num_heads": 2, "history_layers": 1}
    loaded = load_student(student.state_dict(), **how, history_pool=2)
    assert loaded.settings == student.settings and loaded.history_pool == 2
    assert load_student(student.state_dict(), **how).history_pool == 1  # the tensors do not say


def test_pipelines_of_both_kinds_are_taken():
    pytest.importorskip("diffusers")
    from ard.weights.pipeline import ARDTransformer

    for pool in (1, 2):
        student = ARDStudent(SMALL, steps=2, history_layers=1, history_pool=pool)
        transformer = ARDTransformer.of(student)
        with torch.device("meta"):
            again = ARDTransformer(**{name: transformer.config[name] for name in ("model", "settings")})
        assert again.student.settings == student.settings and again.student.history_pool == pool
    with pytest.raises(ValueError, match="settings are"):
        ARDTransformer(model={}, settings={"steps": 2, "history_pool": 2})


def test_refusals():
    odd = replace(SMALL, input_size=6)
    with pytest.raises(ValueError, match=r"history_pool is 2; expected an int that divides .*\(3, 3\)"):
        ARDStudent(odd, history_layers=1, history_pool=2)
    for pool in (0, True, 2.0, None):
        with pytest.raises(ValueError, match="history_pool is"):
            ARDStudent(SMALL, history_layers=1, history_pool=pool)
    with pytest.raises(ValueError, match=r"student.history_pool is 2; expected .*\(1, 1\)"):
        read_recipe("digits", ["model.patch_size=8", "student.history_pool=2", "gan.kernel_size=1"])
    with pytest.raises(ValueError, match=r"student.history_pool is 3; expected within \[1, 2\]"):
        read_recipe("digits", ["student.history_pool=3"])
    with pytest.raises(ValueError, match="pool is 3; expected one whose square divides the 16 tokens"):
        flops.history(SMALL, 4, 1, pool=3)
    pooled, whole, (states, _, labels) = student_of(SMALL), student_of(SMALL, history_pool=1), drawn(SMALL, 2, 4)
    for student, other in ((pooled, whole), (whole, pooled)):
        with pytest.raises(ValueError, match="expected one of this student's new_cache"):
            student.sample(states[:, 0], labels, cache=other.new_cache(2))
    cache = pooled.new_cache(2)
    for wrong in (torch.zeros(3, 16, 3, 2, 16).double(), torch.zeros(2, 16, 3, 2, 16)):
        with pytest.raises(ValueError, match="PooledCache: qkv is"):
            cache.attend(0, wrong, window=None, sink=0)
    assert cache.segments == [0, 0]
    pooled.sample(states[:, 0], labels, cache=cache)
    with pytest.raises(ValueError, match="layer 1 holds 4 segments; expected a reset"):
        cache.attend(1, torch.zeros(2, 16, 3, 2, 16).double(), window=None, sink=0)


def test_the_demo_compares_one_kind_more():
    assert load_config().demo.kinds == ((0, 1), (2, 1))
    assert load_config(changes={"demo": {"history_pool": 2}}).demo.kinds == ((0, 1), (2, 1), (2, 2))
    odd = {"model": {"patch_size": 8}, "gan": {"kernel_size": 1}, "demo": {"history_pool": 2}}
    with pytest.raises(ValueError, match=r"demo.history_pool is 2; expected .*\(1, 1\)"):
        load_config(changes=odd)
