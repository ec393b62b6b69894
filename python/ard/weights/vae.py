"""Images <-> latents with a `diffusers.AutoencoderKL` from a local folder.

Shape suffixes: N images, c channels (3 of an image, 4 of the published latents), h and w height and width.
"""

from __future__ import annotations

import hashlib
import math
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ard.storage.files import file_sha256, shown, whole_tensors
from ard.weights.diffusers_format import model_folder, read_json, weight_files

UNREAD = ("shift_factor", "latents_mean", "latents_std")  # of an autoencoder whose latents are more than scaled
_MOST_LAYERS = 100  # of an autoencoder; the published one has 8


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
        for name in UNREAD:
            if content.get(name) is not None:
                raise ValueError(f"LatentCodec: {name} is {shown(content[name])}; expected none, a scale only")
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


def _fingerprint(files: list[Path]) -> str:
    lines = [f"{path.name} {file_sha256(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()
