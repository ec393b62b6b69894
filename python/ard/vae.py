"""Image files -> images, and images <-> latents with a `diffusers.AutoencoderKL` from a local folder.

Shape suffixes: N images, c channels (3 of an image, 4 of the published latents), h and w height and width.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from ard.exchange import model_folder, read_json, weight_files
from ard.files import file_sha256, shown, whole_tensors

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # by content, whatever the name ends in
_MOST_LAYERS = 100  # of an autoencoder; the published one has 8
LARGEST_IMAGE = 1 << 26  # pixels, of a file and of what is made of it: 256 MiB each
LARGEST_ASPECT = 100  # long side over short side
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
_EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr")


class LatentCodec:
    """The autoencoder of latent diffusion: latents are scaling_factor * z, z ~ N(mean(image), std(image)^2).

    path: a saved `AutoencoderKL` (config.json and safetensors), or a saved pipeline, whose `vae` is taken. Nothing is
        fetched: a name that is not a local folder is refused.
    device, dtype: where the weights stand, and in what the results come.
    Attributes: scaling_factor, latent_channels, downsampling (image pixels per latent pixel along a side), and
    fingerprint, the sha256 hex digest over config.json and the weight files, to store beside latents made with it.
    Raises ImportError without diffusers; ValueError for another model, for a config whose numbers are none or ask for
    more weights than the files hold, and for files that do not give all its weights.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError("LatentCodec needs diffusers: pip install 'ard-kernels[diffusers]'") from error
        folder = model_folder(path, "vae")
        content = read_json(folder / "config.json")
        if content.get("_class_name") != "AutoencoderKL":
            found = str(content.get("_class_name"))[:80]
            raise ValueError(f"LatentCodec: {folder} holds a {found}; expected an AutoencoderKL")
        if content.get("shift_factor") is not None:
            raise ValueError(
                f"LatentCodec: shift_factor is {shown(content['shift_factor'])}; expected none, a scale only"
            )
        _require_bounded(AutoencoderKL, content, folder)
        self.fingerprint = _fingerprint([folder / "config.json", *weight_files(folder)])
        try:
            model, loading = AutoencoderKL.from_pretrained(
                folder,
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
        except Exception as error:  # of many kinds, from diffusers and safetensors
            reason = " ".join(str(error).split())[:500]
            raise ValueError(f"LatentCodec: the weights in {folder} do not load ({reason})") from error
        # diffusers leaves weights that the file lacks at random values, with a warning only.
        if wrong := {kind: names for kind, names in loading.items() if names}:
            raise ValueError(f"LatentCodec: the weights in {folder} do not fit its config: {wrong}")
        self.model = model.to(device).requires_grad_(False)  # diffusers gives it in eval mode
        self.device, self.dtype = torch.device(device), dtype
        self.scaling_factor: float = model.config.scaling_factor
        self.latent_channels: int = model.config.latent_channels
        self.downsampling: int = 2 ** (len(model.config.block_out_channels) - 1)

    def latent_shape(self, images_Nchw: Tensor) -> tuple[int, int, int, int]:
        """Shape of `encode(images)`, and of its noise."""
        N, _, h, w = images_Nchw.shape
        return N, self.latent_channels, h // self.downsampling, w // self.downsampling

    @torch.no_grad()
    def encode(self, images_Nchw: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents (N, latent_channels, h / downsampling, w / downsampling), scaled.

        images_Nchw: floating point in [-1, 1], sides multiples of `downsampling`.
        noise: standard normal of the latents' shape, for the posterior's sample mean + std * noise; None for its mean.
        """
        channels, factor = self.model.config.in_channels, self.downsampling
        shape = tuple(images_Nchw.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] % factor or shape[3] % factor or 0 in shape:
            raise ValueError(
                f"LatentCodec.encode: images have shape {shape}; expected (N, {channels}, h, w) with sides that are "
                f"multiples of {factor}"
            )
        if not images_Nchw.is_floating_point() or not images_Nchw.abs().max() <= 1:
            raise ValueError(
                f"LatentCodec.encode: images are {images_Nchw.dtype} from {images_Nchw.min()} to {images_Nchw.max()}; "
                "expected floating point within [-1, 1]"
            )
        if noise is not None and tuple(noise.shape) != self.latent_shape(images_Nchw):
            raise ValueError(
                f"LatentCodec.encode: noise has shape {tuple(noise.shape)}; expected {self.latent_shape(images_Nchw)}"
            )
        posterior = self.model.encode(images_Nchw.to(self.device, self.dtype)).latent_dist
        z = posterior.mean
        if noise is not None:
            z = z + posterior.std * noise.to(self.device, self.dtype)
        return z * self.scaling_factor

    @torch.no_grad()
    def decode(self, latents_Nchw: Tensor) -> Tensor:
        """Images (N, c, h * downsampling, w * downsampling), clamped to [-1, 1], of scaled latents (N, c, h, w)."""
        shape = tuple(latents_Nchw.shape)
        if len(shape) != 4 or shape[1] != self.latent_channels or 0 in shape:
            raise ValueError(
                f"LatentCodec.decode: latents have shape {shape}; expected (N, {self.latent_channels}, h, w)"
            )
        z = latents_Nchw.to(self.device, self.dtype) / self.scaling_factor
        return self.model.decode(z).sample.clamp(-1, 1)


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


def _require_bounded(model: type[Any], content: dict, folder: Path) -> None:
    """Checks the config's numbers, the last of them by a model on shapes alone: what it allocates, the files hold."""
    scale = content.get("scaling_factor", 1.0)
    if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 < scale < math.inf:
        raise ValueError(f"LatentCodec: scaling_factor is {shown(scale)}; expected a finite number above 0")
    widths, layers = content.get("block_out_channels", [64]), content.get("layers_per_block", 1)
    if not isinstance(widths, list) or type(layers) is not int or not 1 <= len(widths) * layers <= _MOST_LAYERS:
        raise ValueError(
            f"LatentCodec: block_out_channels is {shown(widths)}, layers_per_block {shown(layers)}; expected at most "
            f"{_MOST_LAYERS} layers"
        )
    held = 0
    for path in weight_files(folder):
        with whole_tensors(path), safe_open(path, framework="pt") as file:
            held += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 (no mapping)
    try:
        with torch.device("meta"):
            needed = sum(tensor.numel() for tensor in model.from_config(content).state_dict().values())
    except Exception as error:  # of many kinds, according to the entry that is wrong
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"LatentCodec: {folder / 'config.json'} makes no AutoencoderKL ({reason})") from error
    if needed > 2 * held:  # a few that are missing are named later
        raise ValueError(
            f"LatentCodec: {folder / 'config.json'} asks for {needed} weights; expected the {held} of the files"
        )


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".") and path.is_file()


def _fingerprint(files: list[Path]) -> str:
    lines = [f"{path.name} {file_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
