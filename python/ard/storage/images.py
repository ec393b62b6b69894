"""Images in files: the .npz format of ADM's evaluation suite (Dhariwal and Nichol 2021), PNG grids, uint8 and back.

An ADM .npz holds ``arr_0``, uint8 images (N, h, w, c), and may hold ``arr_1``, int64 labels (N,).
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from ard.storage.files import atomic_path, json_text, parse_json, shown

SAMPLE_NAME = "sample.json"  # what says of a folder of samples what they are, written last
SAMPLE_PARTS = ".ard-parts"  # its folder of shards, while samples are made
GRID_GAP = 2  # pixels
LARGEST_BATCH = 1 << 25  # values; 170 images of 256 x 256 in colour
_LARGEST_INFLATED, _MOST_INFLATION = 1 << 28, 100  # bytes; of an array beyond them, over its bytes in the .npz

Shape = tuple[int, int, int, int]  # (N, h, w, c)


def quantize(images_Nchw: Tensor) -> Tensor:
    """Images in [-1, 1], any float dtype -> uint8 of the same shape, as ADM does: (x + 1) * 127.5, clipped to
    [0, 255], its fraction cut off (not rounded). Computed in float32; NaN and infinity are refused."""
    if images_Nchw.ndim != 4 or not images_Nchw.is_floating_point():
        raise ValueError(
            f"to_uint8: images are {images_Nchw.dtype} {tuple(images_Nchw.shape)}; expected floating point (n, c, h, w)"
        )
    if not torch.isfinite(images_Nchw).all():
        raise ValueError("to_uint8: images hold NaN or infinity; expected finite values")
    return ((images_Nchw.float() + 1.0) * 127.5).clamp(0.0, 255.0).to(torch.uint8)


def to_uint8(images_Nchw: Tensor) -> np.ndarray:
    """`quantize` into a contiguous array (n, h, w, c), what `write_npz` and `write_grid` take."""
    return quantize(images_Nchw.detach()).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def from_uint8(images_Nhwc: np.ndarray) -> Tensor:
    """uint8 (n, h, w, c) -> float32 (n, c, h, w) in [-1, 1]; `to_uint8` gives the array back exactly.

    The value is u / 127.5 - 1 plus 2^-23 (at most 1): the sum outweighs the float32 rounding of ``x`` and ``x + 1``,
    2^-25 + 2^-24, after which `to_uint8` would cut some u down to u - 1.
    """
    _require_images("from_uint8", images_Nhwc)
    levels = np.minimum(np.arange(256) / 127.5 - 1.0 + 2.0**-23, 1.0).astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(levels[np.moveaxis(images_Nhwc, -1, 1)]))


@dataclass(frozen=True)
class NpzHeader:
    """What a .npz says of itself, without reading its images."""

    shape: Shape  # of arr_0
    names: tuple[str, ...]  # of its arrays


def write_npz(path: Path, batches: Iterable[np.ndarray], count: int, labels: np.ndarray | None = None) -> None:
    """Writes an ADM-format .npz atomically, one batch in memory at a time. Equal arguments give equal bytes.

    batches: uint8 (n, h, w, c) each, of one image shape; c stays, also where it is 1.
    count: sum of the batches' n, at least 1; ValueError, and no file, if they differ.
    labels: integers (count,) or None.
    """
    path = Path(path)
    if count < 1:
        raise ValueError(f"write_npz: count={count}; expected at least 1")
    if labels is not None:
        labels = np.asarray(labels)
        if labels.shape != (count,) or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"write_npz: labels are {labels.dtype} {labels.shape}; expected integers ({count},)")
    with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
            _write_batches(file, batches, count)
        if labels is not None:
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w", force_zip64=True) as file:
                npy.write_array(file, np.ascontiguousarray(labels, dtype=np.int64), allow_pickle=False)


def _write_batches(file: IO[bytes], batches: Iterable[np.ndarray], count: int) -> None:
    written, image_shape = 0, None
    for batch in batches:
        _require_images("write_npz", batch)
        if image_shape is None:
            image_shape = batch.shape[1:]
            header = {"descr": "|u1", "fortran_order": False, "shape": (count, *image_shape)}
            npy.write_array_header_1_0(file, header)
        written += len(batch)
        if batch.shape[1:] != image_shape or written > count:
            raise ValueError(
                f"write_npz: a batch has shape {batch.shape} after {written - len(batch)} images; "
                f"expected images {image_shape}, {count} in all"
            )
        file.write(np.ascontiguousarray(batch).data)
    if written != count:
        raise ValueError(f"write_npz: the batches hold {written} images; expected count={count}")


def read_header(path: Path) -> NpzHeader:
    """Shape of arr_0 and the names of all arrays; ValueError if this is not an .npz of uint8 images (N, h, w, c)."""
    with _open_npz(path) as archive, _open_images(archive, path) as (_, shape):
        return NpzHeader(shape, _array_names(archive))


def npz_names(path: Path) -> tuple[str, ...]:
    """Names of the arrays in an .npz, of images or not."""
    with _open_npz(path) as archive:
        return _array_names(archive)


def iterate_npz(path: Path, batch_size: int) -> Iterator[np.ndarray]:
    """The images, uint8 (n, h, w, c) with n <= batch_size, in file order; only one batch is in memory.

    A batch has at most LARGEST_BATCH values, so n is smaller for large images.
    """
    if batch_size < 1:
        raise ValueError(f"iterate_npz: batch_size={batch_size}; expected at least 1")
    with _open_npz(path) as archive, _open_images(archive, path) as (file, shape):
        image_bytes = math.prod(shape[1:])
        batch_size = min(batch_size, LARGEST_BATCH // image_bytes)
        for first in range(0, shape[0], batch_size):
            rows = min(batch_size, shape[0] - first)
            content = file.read(rows * image_bytes)
            if len(content) != rows * image_bytes:
                raise ValueError(
                    f"{Path(path).name}: arr_0 ends in image {first + len(content) // image_bytes}; "
                    f"expected {shape[0]} images"
                )
            yield np.frombuffer(bytearray(content), np.uint8).reshape(rows, *shape[1:])


def read_labels(path: Path) -> np.ndarray | None:
    """arr_1, int64 (N,), or None where the file has none."""
    header = read_header(path)
    if "arr_1" not in header.names:
        return None
    labels = read_array(path, "arr_1")
    if labels.shape != header.shape[:1] or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(
            f"{Path(path).name}: arr_1 is {labels.dtype} {labels.shape}; expected integer labels {header.shape[:1]}"
        )
    return labels.astype(np.int64)


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an .npz, of any dtype but object, in memory; no more is allocated than the file holds of it."""
    with _open_npz(path) as archive, _open_array(archive, path, name) as (file, shape, fortran_order, dtype):
        content = bytearray()
        while chunk := file.read(1 << 20):
            content += chunk
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{Path(path).name}: {name} ends after {len(content)} bytes; expected {dtype} {shape}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if fortran_order else "C")


@contextmanager
def _open_npz(path: Path) -> Iterator[zipfile.ZipFile]:
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; expected an .npz")
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError) as error:
        raise ValueError(f"{Path(path).name}: not an .npz file, or not a whole one ({error})") from error
    except OSError as error:  # a place beyond the file is sought; an error of the disk names no file either
        raise ValueError(f"{Path(path).name}: cannot be read ({error})") from error


def _array_names(archive: zipfile.ZipFile) -> tuple[str, ...]:
    return tuple(name.removesuffix(".npy") for name in archive.namelist() if name.endswith(".npy"))


@contextmanager
def _open_array(
    archive: zipfile.ZipFile, path: Path, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], bool, np.dtype]]:
    """Yields (file, shape, fortran_order, dtype): an array that the archive has, open at its first byte of data.

    Raises ValueError where the header and the size in the archive disagree, and for bombs.
    """
    info, where = archive.getinfo(f"{name}.npy"), f"{Path(path).name}: {name}"
    if info.flag_bits & 1 or info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{where} is encrypted or compressed in another way; expected stored or deflated")
    if info.file_size > max(_LARGEST_INFLATED, _MOST_INFLATION * info.compress_size):
        raise ValueError(
            f"{where} has {info.file_size} bytes, deflated to {info.compress_size}; expected at most "
            f"{_LARGEST_INFLATED} or {_MOST_INFLATION} times as many"
        )
    with archive.open(info) as file:
        try:
            version = npy.read_magic(file)
            if version != (1, 0):  # others allow headers of 4 GiB
                raise ValueError(f"version {version}")
            shape, fortran_order, dtype = npy.read_array_header_1_0(file)
        except Exception as error:  # of many kinds: NumPy has Python parse the header
            raise ValueError(f"{where} has no header of NumPy's version 1.0 ({shown(str(error))})") from error
        if dtype.hasobject:
            raise ValueError(f"{where} is {dtype} {shown(shape)}, a pickle; expected numbers or text")
        size, held = math.prod(shape) * dtype.itemsize, info.file_size - file.tell()
        if size != held or any(side < 0 for side in shape):
            raise ValueError(f"{where} says {dtype} {shown(shape)}, {size} bytes; expected the {held} that it has")
        yield file, shape, fortran_order, dtype


@contextmanager
def _open_images(archive: zipfile.ZipFile, path: Path) -> Iterator[tuple[IO[bytes], Shape]]:
    """Yields (file, shape): arr_0, open at its first byte of data."""
    names = _array_names(archive)
    if "arr_0" not in names:
        raise ValueError(
            f"{Path(path).name}: holds {', '.join(names) or 'nothing'}; expected arr_0, uint8 images (N, h, w, c)"
        )
    with _open_array(archive, path, "arr_0") as (file, shape, fortran_order, dtype):
        if dtype != np.uint8 or len(shape) != 4 or 0 in shape or fortran_order:
            order = "Fortran" if fortran_order else "C"
            raise ValueError(
                f"{Path(path).name}: arr_0 is {dtype} {shape} in {order} order; "
                "expected uint8 images (N, h, w, c), N >= 1, in C order"
            )
        if math.prod(shape[1:]) > LARGEST_BATCH:
            raise ValueError(f"{Path(path).name}: arr_0 is {shape}; expected at most {LARGEST_BATCH} values an image")
        count, height, width, channels = shape
        yield file, (count, height, width, channels)


def write_grid(path: Path, images_Nhwc: np.ndarray, columns: int) -> None:
    """Writes a PNG of the images in rows of ``columns``, two white pixels between them, atomically.

    images_Nhwc: uint8 with 1 (grey) or 3 (RGB) channels, N >= 1; the last row is filled with white.
    """
    _require_images("write_grid", images_Nhwc)
    count, height, width, channels = images_Nhwc.shape
    if channels not in (1, 3) or count < 1 or columns < 1:
        raise ValueError(
            f"write_grid: images have shape {images_Nhwc.shape}, columns={columns}; "
            "expected 1 or 3 channels, at least one image, at least one column"
        )
    rows = -(-count // columns)
    size = (rows * (height + GRID_GAP) - GRID_GAP, columns * (width + GRID_GAP) - GRID_GAP, channels)
    canvas = np.full(size, 255, np.uint8)
    for index, image in enumerate(images_Nhwc):
        top, left = index // columns * (height + GRID_GAP), index % columns * (width + GRID_GAP)
        canvas[top : top + height, left : left + width] = image
    write_png(path, canvas)


def write_png(path: Path, image_hwc: np.ndarray) -> None:
    """Writes one uint8 image (h, w, 1 or 3), atomically."""
    from PIL import Image  # samples and previews alone need Pillow

    with atomic_path(Path(path)) as temporary:
        Image.fromarray(image_hwc[..., 0] if image_hwc.shape[-1] == 1 else image_hwc).save(temporary, format="PNG")


def latent_preview(latents_Nchw: Tensor) -> Tensor:
    """Latents as viewable images in [-1, 1], float32: (n, 3, h, w), the first three channels over 2, clipped; or, of
    one channel, (n, 1, h, w), clipped only. The scale is fixed, so previews of different steps compare."""
    if latents_Nchw.ndim != 4 or (latents_Nchw.shape[1] != 1 and latents_Nchw.shape[1] < 3):
        raise ValueError(
            f"latent_preview: latents have shape {tuple(latents_Nchw.shape)}; "
            "expected (n, c, h, w) with one channel, or three and more"
        )
    images = latents_Nchw.detach().float()
    return (images if images.shape[1] == 1 else images[:, :3] / 2.0).clamp(-1.0, 1.0)


def _require_images(caller: str, images_Nhwc: np.ndarray) -> None:
    if images_Nhwc.dtype != np.uint8 or images_Nhwc.ndim != 4 or 0 in images_Nhwc.shape[1:]:
        raise ValueError(f"{caller}: images are {images_Nhwc.dtype} {images_Nhwc.shape}; expected uint8 (n, h, w, c)")


def read_sample_json(path: Path) -> dict[str, Any]:
    """What a sample.json says; nothing, if it is no object. ValueError where it is not JSON."""
    try:
        content = parse_json(json_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({str(error)[:200]})") from error
    return content if isinstance(content, dict) else {}
