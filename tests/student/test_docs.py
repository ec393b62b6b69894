"""The commands of docs/training.md work as they stand there: the digits' as written, the others with tiny stand-ins."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from ard.config.recipe import read_recipe, recipe_text
from ard.weights.opened import random_teacher
from command_line import app, ard
from PIL import Image
from text_models import save_clip, save_t5

DOCUMENT = Path(__file__).parents[2] / "docs" / "training.md"
SMALLER = [
    "model.hidden_size=16", "model.depth=2", "model.num_heads=2", "student.history_layers=1", "trajectories.count=12",
    "trajectories.shard_size=8", "trajectories.batch_size=4", "distill.steps=3", "distill.log_every=1",
    "execution.save_every=2", "preview.every=2", "preview.count=8",
]  # fmt: skip
DIGITS = [*SMALLER, "teacher.train.steps=4", "distill.batch_size=4", "gan.train.steps=3", "gan.start=1",
          "gan.train.batch_size=4", "gan.virtual_batch=2"]  # fmt: skip
IMAGENET = [*SMALLER, "model.input_size=8", "model.num_classes=3", "distill.batch_size=4"]
TEXT = [*SMALLER, "model.input_size=8", "model.hidden_size=24", "model.num_heads=1", "model.caption_channels=16",
        "model.caption_tokens=8", "distill.batch_size=4", "execution.strategy=ddp"]  # fmt: skip
# What the commands without a recipe need to be small.
OPTIONS = {
    "latents": ["--size", "16", "--num-classes", "3"],
    "sample": ["--count", "12", "--batch-size", "4"],
    "prompts": ["--tokens", "8"],
}


def commands(block: int) -> list[list[str]]:
    """Arguments of the `ard` commands of one shell block."""
    text = re.findall(r"```sh\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)[block]
    lines = [shlex.split(line) for line in text.splitlines()]
    assert lines and all(line[0] == "ard" for line in lines)
    return [line[1:] for line in lines]


def run(arguments: list[str], overrides: list[str]) -> None:
    if arguments[:2] == ["prompts", "verify"]:
        overrides, options = [], []
    else:
        options = OPTIONS.get(arguments[0], [])
    if "--captions" in arguments:  # which takes the classes' place
        options = options[:2]
    takes_recipe = "-c" in arguments and arguments[0] not in ("export", "sample")
    if {"imagenet256_gan", "pixart1024_gan"} & set(arguments):
        overrides = [*overrides, "gan.train.steps=3", "gan.start=1", "gan.train.batch_size=4", "gan.virtual_batch=2"]
    extra = overrides if takes_recipe and "--dry-run" not in arguments else options
    result = ard(*arguments, *extra)
    assert result.exit_code == 0, (arguments, result.output, result.exception)


@pytest.mark.parametrize("arguments", [*commands(0), *commands(1), *commands(2)], ids=" ".join)
def test_every_command_is_one_of_ard_with_its_options(arguments):
    from typer.main import get_command

    command, name, rest = get_command(app), "ard", arguments
    while hasattr(command, "resolve_command"):
        context = command.make_context(name, list(rest), resilient_parsing=True)
        name, command, rest = command.resolve_command(context, rest)
    parsed = command.make_context(name, rest).params
    if parsed.get("config"):
        read_recipe(parsed["config"], parsed.get("overrides") or [])


@pytest.mark.slow
def test_digits_commands_at_a_small_size(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in commands(0):
        run(arguments, DIGITS)


@pytest.mark.exhaustive
def test_digits_commands_as_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in commands(0):
        result = ard(*arguments)
        assert result.exit_code == 0, (arguments, result.output, result.exception)


def make_stand_ins() -> None:
    """Teacher, VAE, images and reference of the names in the document."""
    teacher, _ = random_teacher(read_recipe("imagenet256", IMAGENET).model)
    torch.save(teacher.state_dict(), "DiT-XL-2-256x256.pt")
    make_vae()
    pixels = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        folder = Path(f"imagenet/train/n{index % 3:08d}")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    np.savez("VIRTUAL_imagenet256_labeled.npz", arr_0=pixels)


def make_vae() -> None:
    diffusers = pytest.importorskip("diffusers")
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**sizes, **blocks).save_pretrained("vae")


def make_text_stand_ins() -> None:
    """Teacher, text encoder, CLIP, prompts and photos with captions, of the names in the document."""
    teacher, _ = random_teacher(read_recipe("pixart1024", TEXT).model)
    torch.save({"state_dict": teacher.state_dict()}, "PixArt-XL-2-1024-MS.pth")
    make_vae()
    save_t5(Path("t5"), channels=16)
    save_clip(Path("clip"))
    Path("prompts.txt").write_text("one above two\nthree left\nfour below five\n")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    Path("photos").mkdir()
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(f"photos/{index}.png")
        Path(f"photos/{index}.txt").write_text("six above seven\n" if index % 2 else "one on the left\n")
    np.savez("photos.npz", arr_0=pixels)


def fake_fidelity(monkeypatch) -> None:
    """torch-fidelity with random features for Inception's."""

    class FeatureExtractorInceptionV3(torch.nn.Module):
        def __init__(self, name, features_list, feature_extractor_weights_path=None, **options):
            super().__init__()
            self.project = torch.nn.Linear(3 * 16 * 16, 8)

        def forward(self, images):
            return (self.project(images.float().flatten(1)),)

    module = ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FeatureExtractorInceptionV3
    package = ModuleType("torch_fidelity")
    package.feature_extractor_inceptionv3 = module
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


@pytest.mark.slow
def test_imagenet_commands_with_stand_ins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_fidelity(monkeypatch)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # for the digits only
    make_stand_ins()
    Path("tiny.yaml").write_text(recipe_text(read_recipe("imagenet256", IMAGENET)))
    for arguments in commands(1):
        if arguments[0] == "export" and "-c" in arguments:  # takes no overrides
            arguments = [*arguments[: arguments.index("-c")], "-c", "tiny.yaml"]
        run(arguments, IMAGENET)
    assert Path("dit-diffusers/config.json").exists() and Path("student.safetensors").exists()


@pytest.mark.slow
def test_text_to_image_commands_with_stand_ins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("transformers")
    make_text_stand_ins()
    for arguments in commands(2):
        run(arguments, TEXT)
    assert len(list(Path("runs/pixart1024/one/images").iterdir())) == 12
    assert "clip_score" in Path("runs/pixart1024/samples/evaluate.json").read_text()
    from ard.pipeline import ARDPipeline

    images = ARDPipeline.from_pretrained("pixart-4-steps")("one above two", num_images_per_prompt=2).images
    assert [image.size for image in images] == [(16, 16)] * 2
