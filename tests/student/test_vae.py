"""Latents against diffusers used directly, and images from files of many kinds."""

import json
import os
import socket
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ard.data.real_images import image_files, load_image
from ard.weights.vae import LatentCodec
from hostile_files import png
from safetensors.torch import load_file, save_file

Image = pytest.importorskip("PIL.Image")
diffusers = pytest.importorskip("diffusers")
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*arguments, **_):
        raise AssertionError(f"network asked for {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def vae():
    """A random autoencoder: 4 image pixels per latent pixel along a side."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        scaling_factor=0.3,
    ).eval()


@pytest.fixture
def folder(vae, tmp_path) -> Path:
    vae.save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def rewrite(folder, edit):
    save_file(edit(load_file(folder / WEIGHTS_NAME)), folder / WEIGHTS_NAME, {"format": "pt"})


@torch.no_grad()
def test_latents_and_images_are_those_of_diffusers(vae, folder):
    codec = LatentCodec(str(folder))
    assert (codec.scaling_factor, codec.latent_channels, codec.downsampling) == (0.3, 4, 4)
    images = torch.rand(2, 3, 16, 24) * 2 - 1
    posterior = vae.encode(images).latent_dist
    mean = codec.encode(images)
    assert mean.shape == codec.latent_shape(images) == (2, 4, 4, 6)
    assert torch.equal(mean, posterior.mean * 0.3)
    noise = torch.randn(mean.shape)
    sample = codec.encode(images, noise=noise)
    assert torch.equal(sample, (posterior.mean + posterior.std * noise) * 0.3)
    assert not torch.equal(sample, mean)
    torch.manual_seed(5)
    expected = posterior.sample() * 0.3
    torch.manual_seed(5)
    assert torch.equal(codec.encode(images, noise=torch.randn(mean.shape)), expected)
    decoded = vae.decode(sample / 0.3).sample
    assert torch.equal(codec.decode(sample), decoded.clamp(-1, 1))


@torch.no_grad()
def test_images_are_clamped(vae, folder):
    latents = torch.randn(1, 4, 4, 4)
    rewrite(folder, lambda t: {**t, "decoder.conv_out.bias": torch.tensor([50.0, 0.0, -50.0])})
    images = LatentCodec(folder).decode(latents)
    assert (images[:, 0] == 1).all() and (images[:, 2] == -1).all()
    assert images.abs().max() == 1 and images[:, 1].unique().numel() > 2


def test_dtype_eval_and_frozen_weights(folder):
    codec = LatentCodec(folder, dtype=torch.float64)
    assert not codec.model.training
    assert all(p.dtype == torch.float64 and not p.requires_grad for p in codec.model.parameters())
    latents = codec.encode(torch.zeros(1, 3, 8, 8), noise=torch.zeros(1, 4, 2, 2))
    assert latents.dtype == codec.decode(latents.float()).dtype == torch.float64 and not latents.requires_grad


def test_a_pipeline_folder_and_the_older_attention_names(folder):
    def older(name):
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            name = name.replace(f".{new}.", f".{old}.")
        return name

    images = torch.rand(1, 3, 8, 8)
    expected = LatentCodec(folder.parent).encode(images)
    rewrite(folder, lambda t: {older(name): tensor for name, tensor in t.items()})
    assert any(".proj_attn." in name for name in load_file(folder / WEIGHTS_NAME))
    assert torch.equal(LatentCodec(folder).encode(images), expected)


def test_the_fingerprint_is_that_of_the_files(vae, folder):
    fingerprint = LatentCodec(folder).fingerprint
    assert len(fingerprint) == 64 and LatentCodec(folder.parent).fingerprint == fingerprint
    (folder / "README.md").write_text("not part of it")
    assert LatentCodec(folder).fingerprint == fingerprint

    weights = bytearray((folder / WEIGHTS_NAME).read_bytes())
    weights[-4] ^= 1  # lowest bit of the last tensor's last element
    (folder / WEIGHTS_NAME).write_bytes(weights)
    other_weights = LatentCodec(folder).fingerprint
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | {"scaling_factor": 0.5}))
    other_config = LatentCodec(folder).fingerprint
    assert len({fingerprint, other_weights, other_config}) == 3


def test_sharded_weights_load_and_every_shard_counts(vae, folder, tmp_path):
    vae.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    shards = sorted((tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 1
    images = torch.rand(1, 3, 8, 8)
    codec = LatentCodec(tmp_path / "sharded")
    assert torch.equal(codec.encode(images), LatentCodec(folder).encode(images))
    seen = {codec.fingerprint}
    for shard in shards:
        content = bytearray(shard.read_bytes())
        content[-4] ^= 1
        shard.write_bytes(content)
        seen.add(LatentCodec(tmp_path / "sharded").fingerprint)
    assert len(seen) == 1 + len(shards)


@pytest.mark.parametrize(
    "edit, message",
    [
        (
            lambda t: {k: v for k, v in t.items() if k != "encoder.conv_in.bias"},
            r"missing_keys.*encoder\.conv_in\.bias",
        ),
        (lambda t: {**t, "extra": torch.zeros(1)}, r"unexpected_keys.*extra"),
        (lambda t: {**t, "encoder.conv_in.bias": torch.zeros(3)}, r"do not load .*encoder\.conv_in\.bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder, edit, message):
    rewrite(folder, edit)
    with pytest.raises(ValueError, match=r"(?s)LatentCodec: the weights in .*" + message):
        LatentCodec(folder)


def test_a_cut_file_is_refused(folder):
    (folder / WEIGHTS_NAME).write_bytes((folder / WEIGHTS_NAME).read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"is not a whole safetensors file"):
        LatentCodec(folder)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "AutoencoderTiny"}, r"holds a AutoencoderTiny; expected an AutoencoderKL"),
        ({"shift_factor": 0.1}, r"shift_factor is 0\.1; expected none"),
        ({"latents_mean": [0.0] * 4}, r"latents_mean is .*; expected none"),
    ],
)
def test_other_autoencoders_are_refused(folder, changes, message):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    with pytest.raises(ValueError, match=message):
        LatentCodec(folder)


def test_names_of_the_hub_and_pickles_are_refused(folder):
    with pytest.raises(ValueError, match=r"some/vae has no config\.json and no vae/config\.json"):
        LatentCodec("some/vae")
    os.replace(folder / WEIGHTS_NAME, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"a \.bin file is a pickle and is not read"):
        LatentCodec(folder)


def test_without_diffusers_the_extra_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"pip install 'ard-kernels\[diffusers\]'"):
        LatentCodec(folder)


@pytest.mark.parametrize(
    "images, noise, message",
    [
        (torch.zeros(3, 8, 8), None, r"images have shape \(3, 8, 8\); expected \(N, 3, h, w\) .* multiples of 4"),
        (torch.zeros(1, 1, 8, 8), None, r"images have shape \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 8, 10), None, r"images have shape \(1, 3, 8, 10\)"),
        (torch.zeros(0, 3, 8, 8), None, r"images have shape \(0, 3, 8, 8\)"),
        (torch.full((1, 3, 8, 8), 255.0), None, r"from 255\.0 to 255\.0; expected floating point within"),
        (torch.full((1, 3, 8, 8), torch.nan), None, r"from nan to nan"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), None, r"images are torch\.uint8"),
        (torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 8, 8), r"noise has shape \(1, 4, 8, 8\); expected \(1, 4, 2, 2\)"),
    ],
)
def test_bad_images_are_refused(folder, images, noise, message):
    with pytest.raises(ValueError, match=message):
        LatentCodec(folder).encode(images, noise)


def test_bad_latents_are_refused(folder):
    with pytest.raises(ValueError, match=r"latents have shape \(1, 3, 2, 2\); expected \(N, 4, h, w\)"):
        LatentCodec(folder).decode(torch.zeros(1, 3, 2, 2))


def write_images(folder, names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)


def test_labels_are_the_order_of_the_class_folders(tmp_path):
    write_images(tmp_path, ["n02/b.JPEG", "n02/a.png", "n10/deep/x.webp", "n01/z.bmp", "n01/._z.jpg", ".cache/a.png"])
    (tmp_path / "n05").mkdir()  # empty: keeps its label, 2
    (tmp_path / "n02" / "notes.txt").write_text("")
    found = [(str(path.relative_to(tmp_path)), label) for path, label in image_files(tmp_path)]
    assert found == [("n01/z.bmp", 0), ("n02/a.png", 1), ("n02/b.JPEG", 1), ("n10/deep/x.webp", 3)]


def test_a_flat_folder_has_label_zero(tmp_path):
    write_images(tmp_path, ["b.jpg", "a.jpeg"])
    assert image_files(str(tmp_path)) == [(tmp_path / "a.jpeg", 0), (tmp_path / "b.jpg", 0)]


def test_folders_without_images_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no images; expected files ending in \.png, \.jpg"):
        image_files(tmp_path)
    with pytest.raises(ValueError, match=r"absent is not a folder"):
        image_files(tmp_path / "absent")
    write_images(tmp_path, ["a.png", "n01/b.png"])
    with pytest.raises(ValueError, match=r"has both images \(a\.png, \.\.\.\) and folders \(n01, \.\.\.\)"):
        image_files(tmp_path)


def picture(width, height):
    """Two linear ramps and a constant, uint8 (h, w, 3): what box means and bicubic interpolation keep."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / (width - 1), 255 * y / (height - 1), np.full((height, width), 100)], -1).astype(np.uint8)


def test_an_image_of_the_right_size_is_kept_exactly(tmp_path):
    pixels = picture(16, 16)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 16)
    assert image.dtype == torch.float32 and image.shape == (3, 16, 16) and image.is_contiguous()
    assert image.min() == -1 and image.max() == 1
    assert torch.equal(((image + 1) * 127.5).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1))


@pytest.mark.parametrize("size", [(16, 23), (41, 17), (33, 100), (131, 64), (5, 7), (1, 3)])
def test_any_size_is_resized_and_cropped_to_the_centre(tmp_path, size):
    width, height = size
    Image.fromarray(picture(max(width, 2), max(height, 2))[:height, :width]).save(tmp_path / "a.png")
    image = load_image(str(tmp_path / "a.png"), 16)
    assert image.shape == (3, 16, 16) and image.abs().max() <= 1
    assert (((image[2] + 1) * 127.5).round() == 100).all()
    # The ramps' middle stays in the middle: one pixel of the long side is 255 / (16 long / short) grey levels.
    if min(size) > 1:
        levels = (image + 1) * 127.5
        assert abs(float(levels[0, 8, 7:9].mean()) - 127.5) <= 255 / 16
        assert abs(float(levels[1, 7:9, 8].mean()) - 127.5) <= 255 / 16


def test_halving_by_box_means_comes_before_bicubic(tmp_path):
    """A checkerboard of single pixels is grey after one halving; bicubic to the size alone would also blur edges."""
    y, x = np.mgrid[0:64, 0:64]
    board = (255 * ((x + y) % 2)).astype(np.uint8)
    board[:, :32] = 0
    Image.fromarray(board).save(tmp_path / "a.png")
    levels = ((load_image(tmp_path / "a.png", 16) + 1) * 127.5).round()
    assert (levels[:, :, :8] == 0).all() and (levels[:, :, 8:] == 128).all()


def test_modes_become_rgb(tmp_path):
    grey = Image.fromarray(picture(16, 16)[..., 0])
    rgb = Image.fromarray(picture(16, 16))
    palette = Image.new("P", (16, 16), 3)
    palette.putpalette([0, 0, 0] * 3 + [255, 0, 51])
    palette.info["transparency"] = 0
    images = {"grey.png": grey, "alpha.png": rgb.copy(), "palette.png": palette, "bits.png": grey.convert("1")}
    images["alpha.png"].putalpha(7)
    images["grey-alpha.png"] = images["alpha.png"].convert("LA")
    images["four.jpg"] = rgb.convert("CMYK")
    for name, image in images.items():
        image.save(tmp_path / name)
    loaded = {name: ((load_image(tmp_path / name, 16) + 1) * 127.5).round().byte() for name in images}
    assert all(image.shape == (3, 16, 16) for image in loaded.values())
    assert torch.equal(loaded["grey.png"], torch.from_numpy(np.array(grey)).expand(3, 16, 16))
    assert torch.equal(loaded["alpha.png"], torch.from_numpy(np.array(rgb)).permute(2, 0, 1))
    assert torch.equal(loaded["palette.png"], torch.tensor([255, 0, 51]).byte().view(3, 1, 1).expand(3, 16, 16))
    assert set(loaded["bits.png"].unique().tolist()) == {0, 255}
    assert torch.equal(loaded["grey-alpha.png"][0], loaded["grey-alpha.png"][2])


def test_what_is_no_image_is_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(picture(64, 64)).save(path)
    whole = path.read_bytes()
    for content in (b"", b"not an image", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.png is not a whole image"):
            load_image(path, 16)
    Image.fromarray(np.full((16, 16), 40000, dtype=np.uint16)).save(path)
    with pytest.raises(ValueError, match=r"a\.png has mode I;16; expected 8 bits per channel"):
        load_image(path, 16)
    with pytest.raises(ValueError, match=r"size is 0; expected at least 1"):
        load_image(path, 0)


@pytest.mark.parametrize("format", ["GIF", "TIFF", "PPM", "ICO", "EPS"])
def test_a_format_that_was_not_asked_for_is_refused_whatever_the_name(tmp_path, format, monkeypatch):
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    path = tmp_path / "a.png"
    Image.fromarray(picture(32, 32)).save(path, format=format)
    with pytest.raises(ValueError, match=r"a\.png is not a whole image, PNG, JPEG, WEBP, BMP"):
        load_image(path, 16)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.bmp"])
def test_the_content_and_not_the_name_tells_the_format(tmp_path, name):
    for format in ("PNG", "JPEG", "WEBP", "BMP"):
        Image.fromarray(picture(32, 32)).save(tmp_path / name, format=format)
        assert load_image(tmp_path / name, 16).shape == (3, 16, 16)


@pytest.mark.parametrize(
    "width, height, size", [(1, 60000, 256), (60000, 1, 8), (8200, 8200, 8), (30000, 30000, 8), (9, 800, 1024)]
)
def test_more_pixels_than_are_sensible_are_refused_before_they_are_read(tmp_path, width, height, size, monkeypatch):
    (tmp_path / "a.png").write_bytes(png(width, height))
    monkeypatch.setattr(Image.Image, "resize", lambda *_: pytest.fail("was resized"))
    with pytest.raises(ValueError, match=rf"a\.png (has {width} x {height} pixels; expected at most|is not a whole)"):
        load_image(tmp_path / "a.png", size)


@pytest.mark.parametrize(
    "changes, message",
    [
        *(({"scaling_factor": value}, r"scaling_factor is .*; expected a finite number above 0")
          for value in (float("nan"), float("inf"), 0.0, -0.2, "0.2", True, None)),
        ({"layers_per_block": 10**7}, r"layers_per_block 10000000; expected at most 100 layers"),
        ({"block_out_channels": "8"}, r"block_out_channels is '8'"),
        ({"block_out_channels": [4096, 4096, 4096]}, r"asks for \d+ weights; expected the \d+ of the files"),
        ({"latent_channels": 10**8}, r"asks for \d+ weights; expected the \d+ of the files"),
        ({"norm_num_groups": 3}, r"makes no AutoencoderKL"),
    ],
)  # fmt: skip
def test_numbers_of_the_config_are_checked_before_anything_is_allocated(folder, changes, message, monkeypatch):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))
    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", lambda *_, **__: pytest.fail("was allocated"))
    with pytest.raises(ValueError, match=message):
        LatentCodec(folder)
