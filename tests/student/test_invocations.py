"""Wrong invocations of the `ard` command: one line that says what was expected, nothing written, never a traceback."""

from __future__ import annotations

import os
import random
import re
import tempfile
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ard.config.recipe import read_recipe
from ard.storage.files import readable_size
from ard.storage.shards import _require_space
from command_line import Exit, ard, refusals
from invocation_runs import SECONDS, Answer, Ard


def refused(*arguments: str) -> str:
    """The line that `ard` answers with."""
    result = ard(*arguments)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), (arguments, result.output, result)
    *progress, line = result.stderr.splitlines()
    assert line.startswith("ard: ") and not any(other.startswith(("ard:", "Traceback")) for other in progress)
    return line


def test_demo_whose_out_is_a_file_is_refused(tmp_path):
    (tmp_path / "report").write_text("mine")
    assert "report" in refused("demo", "--quick", "--out", str(tmp_path / "report"))
    assert (tmp_path / "report").read_text() == "mine"


@pytest.mark.parametrize(
    "changes, message",
    [
        (["model.num_classes=5"], "model.num_classes is 5; expected 10, those of digits"),
        (["model.num_classes=20"], "model.num_classes is 20; expected 10, those of digits"),
        (["model.input_size=16"], "model is of (1, 16, 16); expected (1, 8, 8), the images of digits"),
        (["model.in_channels=3"], "model is of (3, 8, 8); expected (1, 8, 8), the images of digits"),
    ],
)
def test_a_teacher_of_other_sizes_than_its_data_is_refused(tmp_path, changes, message):
    out = tmp_path / "teacher"
    assert message in refused("teacher", "-c", "digits", "--out", str(out), "teacher.train.steps=1", *changes)
    assert not out.exists()


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64, 2**128, 10**40])
def test_seeds_that_no_generator_takes_are_refused(tmp_path, seed):
    for arguments in (["sample", "run"], ["latents", "images", "--vae", "vae"]):
        result = ard(*arguments, "--out", str(tmp_path / "out"), "--seed", str(seed))
        assert result.exit_code == 2 and "--seed" in result.output and not (tmp_path / "out").exists()
    assert "distill.seed" in refused("distill", "-c", "digits", "--out", str(tmp_path / "out"), f"distill.seed={seed}")


def test_largest_seed_is_taken_by_both_generators():
    from ard.common.streams import noise_at

    seed = read_recipe("digits", [f"distill.seed={2**63 - 1}"]).distill.seed
    torch.manual_seed(seed)
    assert noise_at(seed + 1, [0], (2,)).isfinite().all()  # previews take the next one


def tensors_without_end() -> None:
    torch.empty(2**58, device="cpu").fill_(0)


def bytes_without_end() -> None:
    bytearray(2**60)


@pytest.mark.parametrize("work", [tensors_without_end, bytes_without_end])
def test_out_of_memory_is_one_line(capsys, work):
    with pytest.raises(Exit) as end, refusals():
        work()
    assert end.value.exit_code == 1
    error = capsys.readouterr().err
    assert error.startswith("ard: out of memory") and error.count("\n") == 1


def test_other_errors_stay_errors():
    with pytest.raises(RuntimeError, match="of ours"), refusals():
        raise RuntimeError("a mistake of ours")


def test_an_error_of_several_lines_is_one(capsys):
    with pytest.raises(Exit), refusals():
        raise ValueError("one\n  two\nthree")
    assert capsys.readouterr().err == "ard: one two three\n"


def test_sizes_have_a_unit_that_fits(tmp_path, monkeypatch):
    sizes = {0: "0 bytes", 1023: "1023 bytes", 1024: "1.00 KiB", 12_345_678: "11.77 MiB", 5 * 2**40: "5.00 TiB"}
    assert {size: readable_size(size) for size in sizes} == sizes
    assert readable_size(2**70) == "1,073,741,824.00 TiB"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 3000}))
    with pytest.raises(OSError, match=r": 3.91 KiB are still to be written; .* the 2.93 KiB that are free"):
        _require_space(tmp_path, 4000)


def test_plan_shows_small_sizes():
    result = ard("distill", "-c", "digits", "--dry-run", "--processes", "1")
    assert result.exit_code == 0 and "MiB" in result.output and "0.00 GiB" not in result.output


# --- the battery

TINY = """
extends: digits
model: {hidden_size: 16, depth: 1, num_heads: 2, patch_size: 4}
teacher: {checkpoint: teacher, train: {steps: 2, batch_size: 4}}
trajectories: {folder: trajectories, count: 12, shard_size: 8, batch_size: 4, sampling_steps: 4, keep: [2, 0]}
student: {history_layers: 1}
distill: {steps: 2, batch_size: 4}
preview: {every: 0}
gan: {student: student, start: 0, virtual_batch: 2, train: {steps: 1, batch_size: 4}}
"""
RIGHT = {  # in this order; what they make, the wrong ones work on
    "teacher": "teacher -c tiny.yaml --out {teacher}",
    "trajectories": "trajectories -c tiny.yaml trajectories.folder={trajectories}",
    "verify": "trajectories verify trajectories",
    "distill": "distill -c tiny.yaml --out {student}",
    "finetune-gan": "finetune-gan -c tiny.yaml --out {gan}",
    "sample": "sample student --out {samples} --count 4",
    "evaluate": "evaluate samples --reference samples/samples.npz --out {scores.json}",
    "export": "export student {weights.safetensors} --to public",
    "flops": "flops --model DiT-S/8 --input-size 8",
    "doctor": "doctor",
}
RECIPES = ("teacher", "trajectories", "distill", "finetune-gan")
NUMBERS = ("-1", "nan", "1.5", "1e3", "", "x", "9" * 40, "-inf", "0x10", "1,2")
OPTIONS = {  # command -> option -> wrong values
    "teacher": {"--device": ("cuda", "tpu", "cpu:9", "")},
    "trajectories": {"--device": ("cuda", "tpu")},
    "distill": {"--device": ("cuda", "tpu"), "--processes": ("0", *NUMBERS)},
    "finetune-gan": {"--device": ("cuda", "tpu"), "--processes": ("0", *NUMBERS)},
    "sample": {
        "--count": ("0", *NUMBERS),
        "--batch-size": ("0", *NUMBERS),
        "--seed": NUMBERS,
        "--classes": ("-1", "10", "0-9999999999", "3-1", "a", "0;1", "1.5", "9" * 5000, "0-999999", "²", "--"),
        "--weights": ("best", "", "EMA"),
        "--precision": ("fp16", "", "FP32"),
        "--device": ("cuda", "tpu"),
        "--vae": ("nowhere", "file.txt", "folder", "hub/name", ""),
        "-c": ("nowhere", "nowhere.yaml", "binary.yaml", "folder", "digits", "imagenet256", "broken.yaml", "bomb.yaml"),
    },
    "evaluate": {
        "--reference": ("nowhere.npz", "file.txt", "folder", "empty.npz", "teacher", ""),
        "--features": ("poled", "", "no.such:module", "os:no_such", "os.path:sep", "inception:"),
        "--feature-weights": ("nowhere", "file.txt"),
        "--batch-size": ("0", *NUMBERS),
        "--neighbours": ("0", *NUMBERS),
        "--device": ("cuda", "tpu"),
    },
    "export": {
        "--to": ("torch", "", "PUBLIC"),
        "--weights": ("best", ""),
        "--segment": ("0", "9", *NUMBERS),
        "-c": ("nowhere", "nowhere.yaml", "binary.yaml", "folder", "imagenet256", "broken.yaml"),
    },
    "flops": {
        "--model": ("DiT-XXL/2", "", "DiT-S/3", "S/2", "DiT-S/8/8"),
        "--input-size": ("0", "7", "800000", *NUMBERS),
        "--steps": ("0", "1000000000", *NUMBERS),
        "--history-layers": ("13", *NUMBERS),
        "--window": ("0", *NUMBERS),
        "--sink": NUMBERS,
    },
}
# Instead of a file or folder that a command reads, or of one that it would make.
# No devices among them: a command that goes wrong would harm the machine.
NOT_INPUTS = ("nowhere", "file.txt", "folder", "", "x" * 5000, "ü/ß", "two\nlines", "broken.yaml", "~/x")
NOT_OUTPUTS = ("file.txt", "file.txt/below", "locked/x", "x" * 5000)
FILE_OUTPUTS = ("evaluate",)  # whose file may be there already
INPUTS = {
    "teacher": ("tiny.yaml",),
    "trajectories": ("tiny.yaml", "teacher.checkpoint="),
    "verify": ("trajectories",),
    "distill": ("tiny.yaml", "teacher.checkpoint=", "trajectories.folder="),
    "finetune-gan": ("tiny.yaml", "teacher.checkpoint=", "trajectories.folder=", "gan.student=", "gan.real="),
    "sample": ("student",),
    "evaluate": ("samples",),
    "export": ("student",),
}
ODD = """
/ --
/ nothing
/ Teacher
/ --no-such-option
/ teacher
/ teacher -c tiny.yaml
/ teacher --out new
/ teacher -c tiny.yaml --out
/ teacher -c
/ teacher -c tiny.yaml --out new --out file.txt
/ teacher -c tiny.yaml -c nowhere.yaml --out new
/ teacher -c tiny.yaml --out new notanoverride
/ teacher -c tiny.yaml --out new =
/ teacher -c tiny.yaml --out new =1
/ teacher -c tiny.yaml --out new .=1
/ teacher -c tiny.yaml --out new teacher.=1
/ teacher -c tiny.yaml --out new .train=1
/ teacher -c tiny.yaml --out new teacher..train=1
/ teacher -c tiny.yaml --out new teacher.train=null
/ teacher -c tiny.yaml --out new teacher=null
/ teacher -c tiny.yaml --out new demo.seeds=[1]
/ teacher -c tiny.yaml --out new extends=digits
/ teacher -c tiny.yaml --out new model.num_classes=5
/ teacher -c tiny.yaml --out new model.input_size=16
/ teacher -c tiny.yaml --out new model.in_channels=4
/ teacher -c tiny.yaml --out new execution.accumulation=3
/ teacher -c imagenet256 --out new
/ teacher -c broken.yaml --out new
/ teacher -c bomb.yaml --out new
/ teacher -c deep.yaml --out new
/ teacher -c twice.yaml --out new
/ teacher -c binary.yaml --out new
/ teacher -c loop.yaml --out new
/ teacher -c extends-list.yaml --out new
/ teacher -c extends-nothing.yaml --out new
/ teacher -c link.yaml --out new
/ teacher -c imagenet --out new
/ teacher -c file.txt --out new
/ teacher -c tiny.yaml --out teacher teacher.train.learning_rate=1
/ teacher -c tiny.yaml --out student
/ trajectories
/ trajectories verify
/ trajectories verify a b
/ trajectories verify student
/ trajectories verify -c tiny.yaml
/ trajectories tiny.yaml
/ trajectories -c tiny.yaml verify
/ trajectories -c tiny.yaml trajectories.seed=9
/ trajectories -c tiny.yaml trajectories.folder=null
/ trajectories -c tiny.yaml trajectories.folder=new teacher.checkpoint=null
/ trajectories -c tiny.yaml trajectories.folder=new teacher.checkpoint=student
/ trajectories -c tiny.yaml trajectories.folder=new trajectories.count=999999999 trajectories.shard_size=1000000
/ trajectories -c tiny.yaml trajectories.folder=new trajectories.count=999999999 trajectories.shard_size=1
/ trajectories -c tiny.yaml trajectories.folder=new model.num_classes=1000
/ trajectories -c tiny.yaml trajectories.folder=new model.hidden_size=32
/ trajectories -c tiny.yaml trajectories.folder=new model.num_heads=3
/ distill
/ distill -c tiny.yaml
/ distill -c tiny.yaml --out new distill.batch_size=7 execution.accumulation=2
/ distill -c tiny.yaml --out new student.history_layers=2
/ distill -c tiny.yaml --out new student.state=ode
/ distill -c tiny.yaml --out new trajectories.keep=[3,0]
/ distill -c tiny.yaml --out new trajectories.store=[x0,ode]
/ distill -c tiny.yaml --out new preview.features=inceptoin preview.every=1
/ distill -c tiny.yaml --out new preview.vae=nowhere preview.every=1
/ distill -c tiny.yaml --out student distill.seed=5
/ distill -c tiny.yaml --out new execution.strategy=zero
/ distill -c tiny.yaml --dry-run distill.batch_size=3
/ finetune-gan -c tiny.yaml --out new gan=null
/ finetune-gan -c imagenet256 --out new
/ finetune-gan -c tiny.yaml --out new gan.real=null
/ finetune-gan -c tiny.yaml --out new gan.student=null
/ finetune-gan -c tiny.yaml --out new gan.student=teacher
/ finetune-gan -c tiny.yaml --out new gan.virtual_batch=3
/ finetune-gan -c tiny.yaml --out new gan.kernel_size=11
/ finetune-gan -c tiny.yaml --out new execution.accumulation=2
/ finetune-gan -c tiny.yaml --out student
/ latents
/ latents images
/ latents images --out new
/ latents images --vae nowhere --out new
/ latents images --vae file.txt --out new
/ latents images --vae folder --out new
/ latents images --vae stabilityai/sd-vae-ft-ema --out new
/ latents nowhere --vae nowhere --out new
/ latents images --vae nowhere --out new --size 7
/ latents images --vae nowhere --out new --size nan
/ latents images --vae nowhere --out new --seed -1
/ latents images --vae nowhere --out new --num-classes 0
/ latents images --vae nowhere --out new --batch-size 0
/ latents images --vae nowhere --out new --dtype int8
/ latents images --vae nowhere --out new --device tpu
/ sample
/ sample student
/ sample teacher --out new
/ sample trajectories --out new
/ sample samples --out new
/ sample weights.safetensors --out new
/ sample weights.safetensors --out new -c imagenet256
/ sample student student --out new
/ sample student --out new --cuda-graph yes
/ sample student --out new --classes 0 --classes 99
/ evaluate
/ evaluate samples
/ evaluate student --reference samples/samples.npz
/ evaluate samples --reference samples/samples.npz --features digits --neighbours 999
/ evaluate samples --reference samples/samples.npz --out folder
/ evaluate samples --reference samples/samples.npz --out nowhere/scores.json
/ export student
/ export student new.safetensors
/ export student new.txt --to public
/ export student weights.safetensors.d/x --to public
/ export student folder --to diffusers
/ export student student --to diffusers
/ export student folder --to public
/ export samples new.safetensors --to public
/ flops extra
/ flops --json=1
/ demo --quick --out file.txt
/ demo --quick --out file.txt/below
/ demo --quick --out locked/x
/ evaluate samples --reference samples/samples.npz --out locked/x.json
/ demo extra
/ demo --out
/ doctor extra
/ doctor --device cpu
"""


@pytest.fixture(scope="module")
def place() -> Iterator[tuple[Ard, Path]]:
    """`ard` in a folder of good and of bad inputs."""
    with tempfile.TemporaryDirectory() as folder:
        yield from furnished(Path(folder).resolve())


def furnished(folder: Path) -> Iterator[tuple[Ard, Path]]:
    texts = {
        "tiny.yaml": TINY,
        "file.txt": "mine",
        "broken.yaml": "model: [1, 2\nteacher: 3\n",
        "bomb.yaml": "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60)),
        "deep.yaml": "a: " + "[" * 20_000,
        "twice.yaml": TINY + TINY,
        "loop.yaml": "extends: loop.yaml\n",
        "extends-list.yaml": "extends: [1]\n",
        "extends-nothing.yaml": "extends: nowhere.yaml\n",
        "folder/mine": "mine",
    }
    (folder / "folder").mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "binary.yaml").write_bytes(b"\x89PNG\x00\xff")
    (folder / "link.yaml").symlink_to("link.yaml")
    np.savez(folder / "empty.npz")
    (folder / "images" / "a").mkdir(parents=True)
    (folder / "locked").mkdir()
    ard = Ard(folder)
    (folder / "locked").chmod(0o500)
    for command, text in RIGHT.items():
        answer = ard(*text.replace("{", "").replace("}", "").split())
        assert answer.code == 0, (command, answer)
    yield ard, folder
    ard.close()


def numbers_of(config: Any, where: str = "") -> Iterator[tuple[str, bool]]:
    """Dotted names of the settings that are numbers, and whether of whole ones."""
    for field in fields(config):
        value, name = getattr(config, field.name), f"{where}{field.name}"
        if is_dataclass(value):
            yield from numbers_of(value, f"{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield name, isinstance(value, int)


def wrong() -> Iterator[list[str]]:
    """Arguments of every wrong invocation: of the table, and drawn."""
    draw = random.Random(0)
    yield from (line[2:].split() for line in ODD.strip().splitlines())
    new = {command: text.replace("{", "new-").replace("}", "").split() for command, text in RIGHT.items()}
    for command, options in OPTIONS.items():
        yield from ([*new[command], option, value] for option, values in options.items() for value in values)
    for command, inputs in INPUTS.items():
        for given in inputs:
            for bad in NOT_INPUTS:
                if given.endswith("="):
                    yield [*new[command], given + bad]
                else:
                    yield [bad if argument == given else argument for argument in new[command]]
    for command, right in RIGHT.items():
        if "{" in right and command not in FILE_OUTPUTS:
            for bad in NOT_OUTPUTS:
                yield [re.sub(r"\{.*\}", lambda _, bad=bad: bad, argument) for argument in right.split()]
    for name, is_whole in numbers_of(read_recipe("digits")):
        values = [
            "-1",
            ".nan",
            "-.inf",
            "x",
            "[]",
            "{a: 1}",
            "true",
            "",
            "1:30",
            "*a",
            *(["9" * 40] if is_whole else []),
        ]
        for value in draw.sample(values, 2):
            command = draw.choice(RECIPES)
            dry = ["--dry-run"] if command != "teacher" and draw.random() < 0.5 else []
            yield [*new[command], f"{name}={value}", *dry]


def state(folder: Path) -> dict[str, tuple]:
    """Everything in a folder, by path."""
    found = {path: path.lstat() for path in folder.rglob("*")}
    return {str(path): (status.st_size, status.st_mtime_ns, status.st_ino) for path, status in found.items()}


def complaint(answer: Answer) -> str | None:
    """What is wrong with the answer to a wrong invocation."""
    lines = answer.stderr.rstrip().splitlines()
    if answer.code not in (1, 2) or "Traceback" in answer.stderr:
        return f"status {answer.code}"
    if answer.code == 1 and not (lines and lines[-1].startswith("ard: ") and len(lines[-1]) < 1000):
        return "no line that begins with ard:"
    if sum(line.startswith("ard: ") for line in lines) != (answer.code == 1):
        return "more than one line"
    if answer.resident > 1e9 or answer.seconds > SECONDS:
        return f"{answer.resident / 1e6:.0f} MB, {answer.seconds:.1f} s"
    return None


@pytest.mark.exhaustive
def test_wrong_invocations_are_refused_and_write_nothing(place):
    ard, folder = place
    before, findings = state(folder), []
    # Root may write to locked folders.
    invocations = [each for each in wrong() if os.geteuid() or not any("locked/" in argument for argument in each)]
    assert len(invocations) >= 300 and len({tuple(each) for each in invocations}) > 0.9 * len(invocations)
    for arguments in invocations:
        answer = ard(*arguments)
        after = state(folder)
        problem = complaint(answer)
        if after != before:
            problem = f"{problem or ''} wrote {sorted(set(after.items()) ^ set(before.items()))[:2]}"
            before = after
        if problem:
            findings.append(f"{' '.join(arguments)[:150]!r}: {problem}: {answer.stderr[-300:]!r}")
    assert not findings, f"{len(findings)} of {len(invocations)}:\n" + "\n".join(findings)
