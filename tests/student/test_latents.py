"""An image folder through a VAE into a store of latents; real latents by name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ard.cli import app
from ard.latents import encode_folder, open_real
from ard.model import DiTConfig
from ard.store import LatentStore
from ard.streams import noise_at
from ard.vae import LatentCodec, image_files, load_image
from PIL import Image
from typer.testing import CliRunner

diffusers = pytest.importorskip("diffusers")
CONFIG = DiTConfig(input_size=8, in_channels=4, num_classes=3)


@pytest.fixture(scope="module")
def vae(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vae")
    sizes = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    diffusers.AutoencoderKL(**sizes, **blocks).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    folder, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in ("a", "b", "c"):
        (folder / name).mkdir()
        for number in range(3):
            pixels = random.integers(0, 256, (20 + number, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def encode(images, vae, folder, **options) -> LatentStore:
    settings = {"size": 16, "num_classes": 3, "dtype": "float32", "shard_size": 4, "batch_size": 2, **options}
    return encode_folder(images, LatentCodec(vae), folder, **settings)


def test_store_holds_each_image_encoded_with_its_own_noise(images, vae, tmp_path):
    store = encode(images, vae, tmp_path)
    codec, files = LatentCodec(vae), image_files(images)
    for index in (0, 4, 8):
        path, label = files[index]
        noise = noise_at(0, [index], (4, 8, 8), "posterior")
        latent, stored = open_real(str(tmp_path), CONFIG).rows(torch.tensor([index]))
        expected = codec.encode(load_image(path, 16)[None], noise)
        torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)  # encoded in a batch of two
        assert stored.tolist() == [label] == [index // 3]
    store.verify()


def test_encoding_continues_and_other_images_are_refused(images, vae, tmp_path):
    encode(images, vae, tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    encode(images, vae, tmp_path).verify()
    with pytest.raises(ValueError, match=r"holds latents with image_shape=\[4, 8, 8\]; expected \[4, 16, 16\]"):
        encode(images, vae, tmp_path, size=32)
    Image.new("RGB", (20, 20)).save(images / "a" / "3.png")
    with pytest.raises(ValueError, match=r"holds latents with count=9; expected 10"):
        encode(images, vae, tmp_path)
    (images / "a" / "3.png").rename(images / "a" / "0.png")
    with pytest.raises(ValueError, match=r"holds latents with source="):
        encode(images, vae, tmp_path)
    with pytest.raises(ValueError, match=r"has 3 class folders; expected at most 2"):
        encode(images, vae, tmp_path / "other", num_classes=2)


def test_command_encodes(images, vae, tmp_path):
    arguments = [
        "latents",
        str(images),
        "--vae",
        str(vae),
        "--out",
        str(tmp_path),
        "--size",
        "16",
        "--num-classes",
        "3",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0 and "9 latents of shape (4, 8, 8)" in result.output
    assert LatentStore(tmp_path).read("latents", torch.arange(9)).dtype == torch.float16


def test_real_latents_must_fit_the_model(images, vae, tmp_path):
    encode(images, vae, tmp_path)
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\); expected the model's \(4, 32, 32\)"):
        open_real(str(tmp_path), DiTConfig())
    digits = DiTConfig(input_size=8, in_channels=1, num_classes=10)
    assert len(open_real("digits", digits)) == 1438
    with pytest.raises(ValueError, match=r"digits holds latents of shape \(1, 8, 8\)"):
        open_real("digits", CONFIG)
    with pytest.raises(ValueError, match=r"has 3 classes; expected the model's 2"):
        open_real(str(tmp_path), replace(CONFIG, num_classes=2))
