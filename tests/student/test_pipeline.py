"""The commands of docs/training.md in a row, at a tiny size: from a teacher to a score."""

from __future__ import annotations

import json
import re
from pathlib import Path

import command_line
import numpy as np
import pytest
import torch
from ard.config.recipe import read_recipe, recipe_text
from ard.data.trajectories import TrajectoryStore
from ard.weights.diffusers_format import load_diffusers
from ard.weights.opened import open_source, open_student, open_teacher
from ard.weights.public import load_student, load_teacher
from safetensors.torch import load_file, save_file

TINY = [
    "model.hidden_size=16", "model.depth=2", "model.num_heads=2", "teacher.checkpoint=teacher",
    "teacher.train.steps=20", "teacher.train.batch_size=16", "trajectories.folder=trajectories",
    "trajectories.count=40", "trajectories.shard_size=16", "trajectories.batch_size=8",
    "trajectories.sampling_steps=8", "trajectories.keep=[6,4,2,0]", "student.history_layers=1",
    "distill.steps=6", "distill.batch_size=8", "distill.log_every=2", "execution.save_every=3", "preview.every=3",
    "preview.count=20", "preview.features=pooled", "gan.student=student", "gan.start=2", "gan.train.steps=4",
    "gan.train.batch_size=8", "gan.train.log_every=1",
]  # fmt: skip


def ard(*arguments: str, fails: bool = False) -> str:
    result = command_line.ard(*arguments)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == (1 if fails else 0), result.output
    return result.output


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pipeline"))
        ard("teacher", "-c", "digits", "--out", "teacher", *TINY)
        assert "40 trajectories in 3 shards" in ard("trajectories", "-c", "digits", *TINY)
        assert "6 steps done; loss" in ard("distill", "-c", "digits", "--out", "student", *TINY)
        assert "4 steps done" in ard("finetune-gan", "-c", "digits", "--out", "gan", *TINY)
        ard("sample", "gan", "--out", "samples", "--count", "30", "--batch-size", "16", "--classes", "7,1-2")
        ard("evaluate", "samples", "--reference", "digits", "--features", "pooled")
        yield Path.cwd()


@pytest.fixture(autouse=True)
def _there(folder, monkeypatch):
    monkeypatch.chdir(folder)


def log(run: str) -> list[dict]:
    return [json.loads(line) for line in (Path(run) / "log.jsonl").read_text().splitlines()]


def test_every_run_keeps_its_recipe_checkpoints_and_log():
    for run, steps in (("teacher", [18, 20]), ("student", [3, 6]), ("gan", [3, 4])):
        assert read_recipe(Path(run) / "config.yaml") == read_recipe("digits", TINY)
        kept = sorted(int(path.name.removeprefix("step-")) for path in (Path(run) / "checkpoints").iterdir())
        assert kept == steps
        assert open_source(run).step == steps[-1]
    assert [line["step"] for line in log("student")] == [2, 4, 6]
    assert {path.suffix for path in Path().rglob("*") if path.is_file()} == {
        ".yaml", ".json", ".jsonl", ".safetensors", ".png", ".npz"
    }  # fmt: skip


def test_previews_are_logged_with_their_step():
    assert [("frechet_to_teacher" in line) for line in log("student")] == [False, True, True]
    assert sorted(path.name for path in Path("student/samples").iterdir()) == ["step-00000003.png", "step-00000006.png"]


def test_gan_weight_is_zero_before_its_start():
    assert ["generator_weight" in line for line in log("gan")] == [False, False, True, True]
    assert all("discriminator_loss" in line for line in log("gan"))
    assert {"discriminator", "discriminator_optimizer"} < open_checkpoint("gan").keys()


def open_checkpoint(run: str) -> dict:
    return json.loads((Path(run) / "checkpoints" / "step-00000004" / "checkpoint.json").read_text())["parts"]


def test_trajectories_are_of_this_teacher_and_verify():
    recipe = read_recipe("digits", TINY)
    store = TrajectoryStore(Path("trajectories"))
    teacher, sha256 = open_teacher("teacher", recipe.model)
    assert store.spec.teacher_sha256 == sha256 and store.names == ("labels", "noise", "x0")
    assert "all as written" in ard("trajectories", "verify", "trajectories")
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_damaged_trajectories_fail_verification(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in Path("trajectories").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    content = bytearray((copy / "shard-00001.safetensors").read_bytes())
    content[-5] ^= 4
    (copy / "shard-00001.safetensors").write_bytes(content)
    assert "differs from the manifest for shard-00001" in ard("trajectories", "verify", str(copy), fails=True)


def test_samples_are_adm_npz_with_their_labels_and_facts():
    content = np.load("samples/samples.npz", allow_pickle=False)
    assert content["arr_0"].shape == (30, 8, 8, 1) and content["arr_0"].dtype == np.uint8
    assert content["arr_1"].tolist() == [7, 1, 2] * 10
    facts = json.loads(Path("samples/sample.json").read_text())
    assert facts["count"] == 30 and facts["weights_step"] == 4 and facts["images_per_second"] > 0
    assert Path("samples/grid.png").stat().st_size > 0


def test_evaluation_says_what_was_compared():
    result = json.loads(Path("samples/evaluate.json").read_text())
    assert result["samples"]["count"] == 30 and result["reference"]["count"] == 1797
    assert result["features"] == "pooled" and result["metrics"]["frechet_distance"] > 0
    assert not any("fid" in name for name in result["metrics"])


def test_export_changes_names_only(tmp_path):
    state = open_source("student").state
    ard("export", "student", str(tmp_path / "student.safetensors"), "--to", "public")
    ard("export", "teacher", str(tmp_path / "diffusers"), "--to", "diffusers")
    ard("export", str(tmp_path / "diffusers"), str(tmp_path / "back.safetensors"), "--to", "public")
    for got, expected in (("student", state), ("back", open_source("teacher").state)):
        exported = load_file(tmp_path / f"{got}.safetensors")
        assert exported.keys() == expected.keys()
        assert all(torch.equal(exported[name], expected[name]) for name in expected)
    load_student(tmp_path / "student.safetensors", num_heads=2, history_layers=1)
    load_teacher(tmp_path / "back.safetensors", num_heads=2)
    ard("export", "student", str(tmp_path / "segment"), "--to", "diffusers", "--segment", "2")
    segment, _ = load_diffusers(tmp_path / "segment")
    assert torch.equal(segment["final_layer.linear.weight"], state["final_layer3.linear.weight"])


def test_bare_weights_need_a_recipe(tmp_path):
    save_file(dict(open_source("student").state), tmp_path / "bare.safetensors")
    assert "expected a recipe (--config) beside it" in ard(
        "sample", str(tmp_path / "bare.safetensors"), "--out", str(tmp_path / "out"), fails=True
    )
    student, _ = open_student(tmp_path / "bare.safetensors", read_recipe("digits", TINY))
    assert student.routing.history_layers == 1


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["distill", "-c", "digits", "--out", "x", "distil.steps=3"], "unknown key 'distil'; did you mean 'distill'?"),
        (["distill", "-c", "digits", "--out", "x", *TINY, "model.depth=3"], "has model.depth=2; expected 3"),
        (["distill", "-c", "digits", "--out", "x", *TINY, "teacher.checkpoint=student"], "is a student; expected a te"),
        (
            ["distill", "-c", "digits", "--out", "x", *TINY, "trajectories.keep=[6,5,4,0]"],
            "with keep=(6, 4, 2, 0); expected (6, 5, 4, 0)",
        ),
        (
            ["distill", "-c", "digits", "--out", "x", "--random-teacher", *TINY],
            "holds trajectories with teacher_sha256=",
        ),
        (["distill", "-c", "digits", "--out", "student", *TINY, "distill.learning_rate=1e-5"], "learning_rate=0.004"),
        (["distill", "-c", "imagenet256", "--out", "x"], "teacher.checkpoint is not given; this command needs"),
        (["teacher", "-c", "imagenet256", "--out", "x"], "teacher.train is not given; this command needs it"),
        (["finetune-gan", "-c", "imagenet256", "--out", "x"], "has no gan section"),
        (["finetune-gan", "-c", "digits", "--out", "x", *TINY, "gan.student=teacher"], "is a teacher; expected a stud"),
        (["trajectories", "-c", "digits", *TINY, "trajectories.count=41"], "with count=40; expected 41"),
        (["sample", "nowhere", "--out", "x"], "nowhere does not exist"),
        (["sample", "gan", "--out", "samples"], "samples holds samples of other settings or weights"),
        (
            ["distill", "-c", "digits", "--out", "x", *TINY, "teacher.checkpoint=nowhere"],
            "teacher.checkpoint is nowhere, which does not exist; expected a run",
        ),
        (
            ["distill", "-c", "digits", "--out", "x", *TINY, "trajectories.folder=nowhere"],
            "trajectories.folder is nowhere, which does not exist; expected what `ard trajectories` makes, or",
        ),
        (["sample", "gan", "--out", "x", "--classes", "10"], "expected within [0, 9]"),
        (["sample", "gan", "--out", "x", "--classes", "a"], "expected numbers and ranges"),
        (["sample", "gan", "--out", "x", "--weights", "best"], "expected one of ('ema', 'model')"),
        (
            ["finetune-gan", "-c", "digits", "--out", "x", *TINY, "student.history_layers=2"],
            "with history_layers=1; ex",
        ),
        (
            ["finetune-gan", "-c", "digits", "--out", "x", *TINY, "execution.accumulation=2"],
            "accumulation is 2; expected",
        ),
        (["finetune-gan", "-c", "digits", "--out", "x", *TINY, "gan.train.batch_size=12"], "multiple of gan.virtual_b"),
        (["finetune-gan", "-c", "digits", "--out", "gan", *TINY, "gan.factor=1.0"], "gan.factor=3.0; expected 1.0"),
        (["distill", "-c", "digits", "--out", "x", *TINY, "trajectories.cfg_scale=2.0"], "cfg_scale=1.5; expected 2.0"),
        (
            ["distill", "-c", "digits", "--out", "x", *TINY, "distill.grad_clip=0"],
            "grad_clip is 0.0; expected within (0, inf]",
        ),
        (["distill", "-c", "digits", "--out", "x", *TINY, "distill.batch_size=7", "execution.accumulation=2"], "of 2"),
        (["distill", "-c", "digits", "--fresh", "--out", "student", *TINY, "preview.features=poled"], "pooled"),
        (["distill", "-c", "digits", "--out", "x", "--device", "gpu", *TINY], "device: got 'gpu'"),
        (["sample", "gan", "--out", "x", "--precision", "fp16"], "precision is 'fp16'; expected one of 'fp32', 'bf16'"),
        (["sample", "gan", "--out", "x", "--classes", "5-1"], "got the range '5-1'"),
        (["evaluate", "gan", "--reference", "digits"], "sample.json"),
        (["export", "gan", "x", "--to", "diffusers"], "expected --segment of the student"),
        (["export", "teacher", "y", "--to", "diffusers", "--segment", "1"], "expected none for a teacher"),
        (["export", "teacher", "gan", "--to", "public"], "gan exists; expected a new path"),
        (["evaluate", "samples", "--reference", "digits", "--features", "poled"], "pooled"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_written(arguments, message):
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    assert message in " ".join(ard(*arguments, fails=True).split())
    after = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    changed = {str(path) for path in after.keys() ^ before.keys()} | {p.name for p in before if after[p] != before[p]}
    assert not changed


def test_weights_of_half_precision_are_used_in_full(tmp_path):
    recipe = read_recipe("digits", TINY)
    for run, opened, needs in (("teacher", open_teacher, recipe.model), ("student", open_student, recipe)):
        halves = {name: tensor.half() for name, tensor in open_source(run).state.items()}
        save_file(halves, tmp_path / f"{run}.safetensors")
        model, _ = opened(tmp_path / f"{run}.safetensors", needs)
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_a_teacher_is_known_by_its_weights_not_by_its_file(tmp_path):
    ard("export", "teacher", str(tmp_path / "teacher.safetensors"), "--to", "public")
    torch.save(dict(open_source("teacher").state), tmp_path / "teacher.pt")
    marks = {
        open_source(path).sha256 for path in ("teacher", tmp_path / "teacher.safetensors", tmp_path / "teacher.pt")
    }
    assert len(marks) == 1 and open_source("teacher", "model").sha256 not in marks


def test_a_file_must_have_the_final_layers_of_the_recipe(tmp_path):
    teacher, student = str(tmp_path / "teacher.safetensors"), str(tmp_path / "student.safetensors")
    ard("export", "teacher", teacher, "--to", "public")
    ard("export", "student", student, "--to", "public")
    (tmp_path / "recipe.yaml").write_text(recipe_text(read_recipe("digits", TINY)))
    (tmp_path / "two.yaml").write_text(recipe_text(read_recipe("digits", [*TINY, "trajectories.keep=[4,0]"])))
    for source, recipe, steps in (
        (teacher, "recipe.yaml", "1 steps.*expected 4"),
        (student, "two.yaml", "4 steps.*expected 2"),
    ):
        arguments = ("sample", source, "-c", str(tmp_path / recipe), "--count", "2", "--out", str(tmp_path / "out"))
        assert re.search(
            rf"has final layers for {steps}, as the recipe says", " ".join(ard(*arguments, fails=True).split())
        )
    assert not (tmp_path / "out").exists()
    ard("sample", student, "-c", str(tmp_path / "recipe.yaml"), "--count", "2", "--out", str(tmp_path / "out"))
