"""An image folder through a VAE into a store of latents; real latents by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ard.common.process import Process
from ard.common.streams import noise_at
from ard.conditions.sources import Classes
from ard.data.latents import (
    SKIPPED_NAME,
    LatentSpec,
    LatentStore,
    damaged_images,
    encode_folder,
    open_real,
    write_latents,
)
from ard.data.real_images import image_files, load_image
from ard.models.dit import DiTConfig
from ard.weights.vae import LatentCodec
from command_line import ard
from PIL import Image
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")
CONFIG = DiTConfig(input_size=8, in_channels=4, num_classes=3)
LABELS = Classes(CONFIG.conditions)


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
        latent, (stored,) = open_real(str(tmp_path), CONFIG, LABELS).rows(torch.tensor([index]))
        expected = codec.encode(load_image(path, 16)[None], noise)
        torch.testing.assert_close(latent, expected, rtol=1e-5, atol=1e-5)  # encoded in a batch of two
        assert stored.tolist() == [label] == [index // 3]
    store.verify()


def test_encoding_continues_and_other_images_are_refused(images, vae, tmp_path):
    encode(images, vae, tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    encode(images, vae, tmp_path).verify()
    rewritten = images / "c" / "0.png"
    rewritten.write_bytes(rewritten.read_bytes())
    with pytest.raises(ValueError, match=r"holds latents with source="):
        encode(images, vae, tmp_path)
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
    result = ard(*arguments)
    assert result.exit_code == 0 and "9 latents of shape (4, 8, 8)" in result.output
    assert LatentStore(tmp_path).read("latents", torch.arange(9)).dtype == torch.float16


def test_real_latents_must_fit_the_model(images, vae, tmp_path):
    encode(images, vae, tmp_path)
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\); expected the model's \(4, 32, 32\)"):
        open_real(str(tmp_path), DiTConfig(), LABELS)
    digits = DiTConfig(input_size=8, in_channels=1, num_classes=10)
    assert len(open_real("digits", digits, Classes(digits.conditions))) == 1438
    with pytest.raises(ValueError, match=r"digits holds latents of shape \(1, 8, 8\)"):
        open_real("digits", CONFIG, LABELS)
    with pytest.raises(ValueError, match=r"has labels of 3 classes; expected the model's labels of 2 classes"):
        other = replace(CONFIG, num_classes=2)
        open_real(str(tmp_path), other, Classes(other.conditions))


def with_weights(vae: Path, folder: Path, **changes: torch.Tensor) -> Path:
    path = shutil.copytree(vae, folder) / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(path), **changes}, path, {"format": "pt"})
    return folder


def test_stores_of_other_latents_differ_to_a_fine_tune(tmp_path):
    """Also where all that is written of their making is the same."""
    spec = LatentSpec(2, 2, (4, 8, 8), LABELS.stored, "images", "none", dtype="float32")
    labels = torch.zeros(2, dtype=torch.int64)
    for name, value in (("a", 0.0), ("b", 1.0), ("again", 0.0)):
        write_latents(tmp_path / name, spec, lambda _, v=value: (torch.full((2, 4, 8, 8), v), labels))
    a, b, again = (open_real(str(tmp_path / name), CONFIG, LABELS).fingerprint for name in ("a", "b", "again"))
    assert a == again != b


def test_latents_that_are_not_finite_are_refused(images, vae, tmp_path):
    broken = with_weights(vae, tmp_path / "vae", **{"quant_conv.bias": torch.full((8,), torch.nan)})
    with pytest.raises(ValueError, match=r"latents 0 to 1 are not finite as float32"):
        encode(images, broken, tmp_path / "store")
    large = with_weights(vae, tmp_path / "large", **{"quant_conv.bias": torch.full((8,), 1e8)})
    with pytest.raises(ValueError, match=r"latents 0 to 1 are not finite as float16"):
        encode(images, large, tmp_path / "half", dtype="float16")
    assert not list(tmp_path.glob("*/shard-*"))


def test_damaged_images_are_named_or_skipped_and_listed(images, vae, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    whole = image_files(folder)
    (folder / "a" / "1.png").write_bytes((folder / "a" / "1.png").read_bytes()[:200])
    Image.new("RGB", (32, 32)).save(folder / "c" / "x.png", format="GIF")
    out = tmp_path / "store"
    arguments = ["latents", str(folder), "--vae", str(vae), "--out", str(out), "--size", "16", "--num-classes", "3"]
    refused = ard(*arguments)
    assert refused.exit_code == 1 and "ard: load_image: " in refused.output and "a/1.png is not a" in refused.output
    shutil.rmtree(out)

    result = ard(*arguments, "--skip-damaged")
    assert result.exit_code == 0, result.output
    assert "8 latents of shape (4, 8, 8); 2 images skipped, see" in result.output
    listed = json.loads((out / SKIPPED_NAME).read_text())
    assert listed["count"] == 2 and list(listed["images"]) == ["a/1.png", "c/x.png"]
    assert all("is not a whole image" in reason for reason in listed["images"].values())
    assert LatentStore(out).read("labels", torch.arange(8)).tolist() == [0] * 2 + [1] * 3 + [2] * 3
    latent = LatentStore(out).read("latents", torch.tensor([7])).float()
    codec, noise = LatentCodec(vae), noise_at(0, [7], (4, 8, 8), "posterior")
    expected = codec.encode(load_image(whole[8][0], 16)[None], noise)
    torch.testing.assert_close(latent, expected, rtol=1e-2, atol=1e-2)

    (out / "shard-00000.safetensors").unlink()  # continues, and is another store where another image is damaged
    assert ard(*arguments, "--skip-damaged").exit_code == 0
    LatentStore(out).verify()
    (folder / "b" / "0.png").write_bytes(b"")
    assert "holds latents with count=8; expected 7" in ard(*arguments, "--skip-damaged").output


def test_ranks_agree_on_what_is_damaged(images, tmp_path):
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "b" / "1.png").write_bytes(b"")
    assert list(damaged_images(folder, 16)) == ["b/1.png"]

    class Half(Process):
        """The second of two ranks, which gathers what the first found."""

        def gather(self, rows):
            return torch.cat([torch.tensor([0, 0, 0, 0, 1], dtype=rows.dtype), rows])

    assert list(damaged_images(folder, 16, Half(1, 2))) == ["b/1.png"]


def test_a_folder_of_damaged_images_is_refused(images, vae, tmp_path):
    for path, _ in image_files(shutil.copytree(images, tmp_path / "images")):
        path.write_bytes(b"")
    skip = damaged_images(tmp_path / "images", 16)
    with pytest.raises(ValueError, match=r"holds no image that can be read"):
        encode(tmp_path / "images", vae, tmp_path / "store", skip=skip)
    assert len(skip) == 9 and not (tmp_path / "store").exists()
