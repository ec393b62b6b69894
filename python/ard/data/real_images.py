"""Image files -> images. Shape suffixes: N images, c channels, h and w height and width."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ard.storage.files import shown

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content, whatever the name ends in
LARGEST_IMAGE = 1 << 26  # pixels, of a file and of what is made of it: 256 MiB each
LARGEST_ASPECT = 100  # long side over short side
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


def image_files(folder: str | os.PathLike) -> list[tuple[Path, int]]:
    """(path, label) of every image, sorted: ImageNet's layout, label = index of the class folder in sorted order.

    A folder without subfolders is one class, label 0. Class folders are searched to any depth; an empty one keeps its
    label; names that begin with a dot do not count. Images are known by suffix: png, jpg, jpeg, webp, bmp, in any case.
    Raises ValueError if there are none, or if images stand beside class folders.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"image_files: {folder} is not a folder; expected a folder of images or of class folders")
    classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    flat = [(path, 0) for path in sorted(folder.iterdir()) if _is_image(path)]
    if classes and flat:
        raise ValueError(
            f"image_files: {folder} has both images ({flat[0][0].name}, ...) and folders ({classes[0].name}, ...); "
            "expected either"
        )
    files = flat or [
        (path, label) for label, name in enumerate(classes) for path in sorted(name.rglob("*")) if _is_image(path)
    ]
    if not files:
        raise ValueError(f"image_files: {folder} holds no images; expected files ending in {', '.join(IMAGE_SUFFIXES)}")
    return files


def load_image(path: str | os.PathLike, size: int) -> Tensor:
    """An image file as float32 (3, size, size) in [-1, 1], any alpha dropped.

    Resized and cropped as ADM and DiT prepare ImageNet (Dhariwal and Nichol, 2021): halved by box means while the short
    side is at least 2 * size, then bicubic to short side = size, then the centre.
    Only what PNG, JPEG, WEBP or BMP is by its content is read; of an animation, the first picture.
    Raises ValueError for a file that is no such image or not whole, one of more than 8 bits per channel, and, before
    its pixels are read, one of more than LARGEST_IMAGE pixels, as it is or with short side = size, or longer than
    LARGEST_ASPECT times its width, or the other way round.
    """
    from PIL import Image  # what reads no images does without Pillow

    if size < 1:
        raise ValueError(f"load_image: size is {size}; expected at least 1")
    with open(path, "rb") as file:
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
            fits = _fits(image.size, size)
            if fits:
                image.load()
        except Exception as error:  # of many kinds, according to the format and the byte that is wrong
            formats = ", ".join(IMAGE_FORMATS)
            raise ValueError(f"load_image: {path} is not a whole image, {formats} ({shown(str(error))})") from error
    if not fits:
        raise ValueError(
            f"load_image: {path} has {image.width} x {image.height} pixels; expected at most {LARGEST_IMAGE}, as it is "
            f"and with short side {size}, and sides of at most {LARGEST_ASPECT} : 1"
        )
    if image.mode not in _EIGHT_BIT_MODES:
        raise ValueError(f"load_image: {path} has mode {image.mode}; expected 8 bits per channel")
    picture = image.convert("RGB")
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels_hwc = np.array(picture.crop((left, top, left + size, top + size)), dtype=np.float32)
    return torch.from_numpy(pixels_hwc / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def _fits(sides: tuple[int, int], size: int) -> bool:
    short, long = sorted(sides)
    return long <= LARGEST_ASPECT * short and max(short, size * size / short) * long <= LARGEST_IMAGE


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()
