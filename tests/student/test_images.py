"""uint8 and back, .npz files written and read in streams, grids, previews."""

from __future__ import annotations

import os
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from ard.storage.files import file_sha256
from ard.storage.images import (
    from_uint8,
    iterate_npz,
    latent_preview,
    npz_names,
    quantize,
    read_header,
    read_labels,
    to_uint8,
    write_grid,
    write_npz,
)
from hostile_files import npy, npz


def read_npz(path):
    """(images, labels), whole."""
    return np.concatenate(list(iterate_npz(path, 4))), read_labels(path)


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_every_level_survives_the_way_to_float_and_back():
    levels = np.arange(256, dtype=np.uint8).reshape(2, 8, 16, 1)
    images = from_uint8(levels)
    assert images.shape == (2, 1, 8, 16) and images.dtype == torch.float32 and images.is_contiguous()
    assert np.array_equal(to_uint8(images), levels)
    assert images.min() >= -1 and images.max() == 1
    exact = torch.from_numpy(levels.astype(np.float64) / 127.5 - 1).permute(0, 3, 1, 2)
    assert (images.double() - exact).abs().max() < 2**-22


def test_to_uint8_cuts_off_and_clips():
    values = torch.tensor([-9.0, -1.0, -1 + 1.9 / 127.5, 0.0, 0.999, 1.0, 9.0])
    images = values.view(1, 1, 1, 7)
    assert to_uint8(images).ravel().tolist() == [0, 0, 1, 127, 254, 255, 255]
    assert quantize(images.bfloat16()).dtype == torch.uint8


def test_layouts_are_transposed():
    array = random_images(2, 3, 5, 4)
    assert from_uint8(array).shape == (2, 4, 3, 5)
    assert from_uint8(array)[1, 3, 2, 4] == from_uint8(array[1:, 2:, 4:, 3:]).item()
    assert np.array_equal(to_uint8(from_uint8(array)), array) and to_uint8(from_uint8(array)).flags.c_contiguous


def test_conversions_refuse_other_inputs():
    with pytest.raises(ValueError, match=r"to_uint8: images hold NaN"):
        to_uint8(torch.full((1, 1, 1, 1), torch.nan))
    with pytest.raises(ValueError, match=r"to_uint8: images are torch.uint8 \(1, 1, 1, 1\); expected floating point"):
        to_uint8(torch.zeros(1, 1, 1, 1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"from_uint8: images are float32 \(2, 3\); expected uint8 \(n, h, w, c\)"):
        from_uint8(np.zeros((2, 3), np.float32))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sizes", [(7,), (3, 3, 1), (1, 0, 6)])
def test_npz_is_what_numpy_reads(tmp_path, channels, sizes):
    images, labels = random_images(7, 4, 6, channels), np.arange(7, dtype=np.int32)
    path = tmp_path / "samples.npz"
    write_npz(path, np.split(images, np.cumsum(sizes)[:-1]), 7, labels)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].dtype == np.uint8 and np.array_equal(arrays["arr_0"], images)
        assert arrays["arr_1"].dtype == np.int64 and np.array_equal(arrays["arr_1"], labels)
    assert zipfile.ZipFile(path).testzip() is None
    assert read_header(path).shape == (7, 4, 6, channels) and read_header(path).names == ("arr_0", "arr_1")
    for batch_size in (1, 3, 100):
        batches = list(iterate_npz(path, batch_size))
        assert max(map(len, batches)) <= batch_size and np.array_equal(np.concatenate(batches), images)
    whole, read = read_npz(path)
    assert np.array_equal(whole, images) and np.array_equal(read, labels)


def test_npz_without_labels_and_equal_bytes(tmp_path):
    images = random_images(4, 2, 2, 3)
    for name, split in (("a.npz", [1]), ("b.npz", [2, 3])):
        write_npz(tmp_path / name, np.split(images[:, ::-1], split), 4)
    assert npz_names(tmp_path / "a.npz") == ("arr_0",) and read_labels(tmp_path / "a.npz") is None
    assert np.array_equal(read_npz(tmp_path / "a.npz")[0], images[:, ::-1])
    assert file_sha256(tmp_path / "a.npz") == file_sha256(tmp_path / "b.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_of_numpy_is_read(tmp_path, save):
    images, labels = random_images(5, 2, 3, 1), np.arange(5)
    save(tmp_path / "numpy.npz", images, labels)
    whole, read = read_npz(tmp_path / "numpy.npz")
    assert np.array_equal(whole, images) and np.array_equal(read, labels)


def test_memory_is_one_batch(tmp_path):
    path, batch = tmp_path / "samples.npz", random_images(8, 64, 64, 3)
    tracemalloc.start()
    write_npz(path, (batch for _ in range(64)), 512)
    total = sum(int(images[0, 0, 0, 0]) for images in iterate_npz(path, 8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total == 64 * int(batch[0, 0, 0, 0]) and os.path.getsize(path) > 64 * batch.nbytes
    assert peak < 8 * batch.nbytes


@pytest.mark.parametrize(
    "batches, count, labels, message",
    [
        ([(3, 2, 2, 1)], 4, None, r"the batches hold 3 images; expected count=4"),
        ([(3, 2, 2, 1), (3, 2, 2, 1)], 4, None, r"shape \(3, 2, 2, 1\) after 3 images; .*4 in all"),
        ([(2, 2, 2, 1), (2, 2, 2, 3)], 4, None, r"shape \(2, 2, 2, 3\) after 2 images; expected images \(2, 2, 1\)"),
        ([], 4, None, r"the batches hold 0 images; expected count=4"),
        ([], 0, None, r"count=0; expected at least 1"),
        ([(4, 2, 2)], 4, None, r"images are uint8 \(4, 2, 2\); expected uint8 \(n, h, w, c\)"),
        ([(4, 2, 2, 1)], 4, np.zeros(3, int), r"labels are int64 \(3,\); expected integers \(4,\)"),
        ([(4, 2, 2, 1)], 4, np.zeros(4), r"labels are float64 \(4,\); expected integers"),
    ],
)
def test_wrong_batches_leave_the_old_file(tmp_path, batches, count, labels, message):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message):
        write_npz(path, [np.zeros(shape, np.uint8) for shape in batches], count, labels)
    assert path.read_bytes() == b"old" and [entry.name for entry in tmp_path.iterdir()] == ["samples.npz"]


def test_float_batches_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"write_npz: images are float32"):
        write_npz(tmp_path / "samples.npz", [np.zeros((1, 2, 2, 1), np.float32)], 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"images": np.zeros((2, 2, 2, 3), np.uint8)}, r"bad.npz: holds images; expected arr_0"),
        ({"arr_0": np.zeros((2, 2, 2, 3), np.float32)}, r"arr_0 is float32 \(2, 2, 2, 3\) in C order; expected uint8"),
        ({"arr_0": np.zeros((2, 2, 3), np.uint8)}, r"arr_0 is uint8 \(2, 2, 3\)"),
        ({"arr_0": np.zeros((0, 2, 2, 3), np.uint8)}, r"arr_0 is uint8 \(0, 2, 2, 3\)"),
        ({"arr_0": np.asfortranarray(random_images(2, 2, 2, 3))}, r"in Fortran order"),
        ({"arr_0": np.array([{}], dtype=object)}, r"arr_0 is object"),
    ],
)
def test_other_npz_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    for read in (read_header, read_npz, lambda path: next(iterate_npz(path, 4))):
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "bad.npz")


def test_bad_labels_and_bad_files_are_refused(tmp_path):
    path = tmp_path / "bad.npz"
    for labels, message in (
        (np.zeros(3, int), r"arr_1 is int64 \(3,\); expected integer labels \(2,\)"),
        (np.zeros(2), r"arr_1 is float64 \(2,\)"),
        (np.array([None, None]), r"arr_1 is object \(2,\), a pickle"),
    ):
        np.savez(path, random_images(2, 2, 2, 3), labels)
        with pytest.raises(ValueError, match=message):
            read_labels(path)
    path.write_bytes(b"no zip")
    with pytest.raises(ValueError, match=r"bad.npz: not an .npz file"):
        read_npz(path)
    with pytest.raises(ValueError, match=r"batch_size=0"):
        next(iterate_npz(path, 0))


def test_an_array_shorter_than_its_header_is_refused(tmp_path):
    path = tmp_path / "short.npz"
    write_npz(path, [random_images(3, 4, 4, 3)], 3)
    with zipfile.ZipFile(path) as archive:
        content = archive.read("arr_0.npy")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", content[:-60])
    with pytest.raises(ValueError, match=r"short.npz: arr_0 says uint8 \(3, 4, 4, 3\), 144 bytes; expected the 84"):
        list(iterate_npz(path, 2))


@pytest.mark.parametrize("channels", [1, 3])
def test_grid(tmp_path, channels):
    Image = pytest.importorskip("PIL.Image")
    images = random_images(5, 4, 6, channels) // 2
    write_grid(tmp_path / "grid.png", images, columns=3)
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == ("L" if channels == 1 else "RGB")
        pixels = np.array(grid).reshape(4 + 2 + 4, 6 + 2 + 6 + 2 + 6, channels)
    for index, image in enumerate(images):
        top, left = (index // 3) * 6, (index % 3) * 8
        assert np.array_equal(pixels[top : top + 4, left : left + 6], image)
        pixels[top : top + 4, left : left + 6] = 255
    assert (pixels == 255).all() and len(list(tmp_path.iterdir())) == 1


def test_grid_refuses_other_images(tmp_path):
    pytest.importorskip("PIL")
    for images, columns in (
        (random_images(2, 2, 2, 4), 1),
        (random_images(2, 2, 2, 3), 0),
        (random_images(0, 2, 2, 3), 1),
    ):
        with pytest.raises(ValueError, match=r"write_grid: images have shape .* expected 1 or 3 channels"):
            write_grid(tmp_path / "grid.png", images, columns)
    with pytest.raises(ValueError, match=r"write_grid: images are float64"):
        write_grid(tmp_path / "grid.png", np.zeros((1, 2, 2, 3)), 1)
    assert not list(tmp_path.iterdir())


def test_latent_preview():
    latents = 3 * torch.randn(2, 4, 5, 6)
    preview = latent_preview(latents.bfloat16())
    torch.testing.assert_close(preview, (latents.bfloat16().float()[:, :3] / 2).clamp(-1, 1), rtol=0, atol=0)
    assert preview.dtype == torch.float32 and preview.abs().max() == 1
    grey = torch.tensor([-0.5, 1.0, 1.5]).view(1, 1, 1, 3)
    assert latent_preview(grey).ravel().tolist() == [-0.5, 1.0, 1.0]
    with pytest.raises(ValueError, match=r"shape \(1, 2, 4, 4\); expected .* one channel, or three and more"):
        latent_preview(torch.zeros(1, 2, 4, 4))


@pytest.mark.parametrize(
    "arrays, zeros, message",
    [
        ({"arr_0": npy("|u1", (1 << 40, 8, 8, 1), bytes(64))}, 0, r"arr_0 says uint8 .*; expected the 64 that it has"),
        ({"arr_0": npy("|u1", (-2, -8, 8, 1), bytes(128))}, 0, r"arr_0 says uint8 \(-2, -8, 8, 1\)"),
        ({"arr_0": npy("|u1", (1 << 18, 32, 32, 1))}, 1 << 28, r"arr_0 has 2684\d+ bytes, deflated to \d+; expected"),
        (
            {"arr_0": npy("|u1", (1, 6000, 6000, 1))},
            36_000_000,
            r"arr_0 is .*; expected at most 33554432 values an image",
        ),
        ({"arr_0": npy("", "", header="(" * 9000)}, 0, r"arr_0 has no header of NumPy's version 1.0"),
        ({"arr_0": b"\x93NUMPY\x02\x00\xff\xff\xff\x7f"}, 0, r"arr_0 has no header of NumPy's version 1.0"),
    ],
)
def test_arrays_that_are_not_what_they_say_are_refused_before_they_are_read(tmp_path, arrays, zeros, message):
    npz(tmp_path / "bad.npz", zeros, **arrays)
    tracemalloc.start()
    for read in (read_header, read_labels, read_npz, lambda path: next(iterate_npz(path, 4))):
        with pytest.raises(ValueError, match=r"bad.npz: " + message):
            read(tmp_path / "bad.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 23


def test_every_changed_byte_of_an_npz_is_one_clear_error_or_none(tmp_path):
    path = tmp_path / "bad.npz"
    np.savez_compressed(path, random_images(3, 4, 4, 1), np.arange(3))
    content, refused = path.read_bytes(), 0
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        try:
            read_npz(path)
        except ValueError as error:
            assert "bad.npz" in str(error)
            refused += 1
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"bad.npz"):
            read_npz(path)
    assert refused > len(content) / 3


def test_a_batch_of_large_images_is_small(tmp_path, monkeypatch):
    monkeypatch.setattr("ard.storage.images.LARGEST_BATCH", 50)
    write_npz(tmp_path / "a.npz", [random_images(5, 4, 4, 1)], 5)
    assert [len(batch) for batch in iterate_npz(tmp_path / "a.npz", 100)] == [3, 2]
