"""Features of images, on which Frechet distance, precision and recall are taken. Chosen by name.

| name | features | images |
|---|---|---|
| pooled | channel means over an 8x8 grid at most; no network | any images or latents |
| digits | hidden layer of `ard.evaluation.digit_classifier.DigitClassifier` | (n, 1, 8, 8) |
| inception | pool-3 layer of the TensorFlow Inception-v3, ported by torch-fidelity; FID's own | (n, 3, h, w) |
| dinov2 | class token of a DINOv2 that you bring (arXiv 2304.07193) | (n, 3, h, w) |
| clip | projected image embedding of a CLIP that you bring (arXiv 2103.00020) | (n, 3, h, w) |
| package.module:function | the user's own | what the function takes |
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ard.storage.files import shown
from ard.storage.images import quantize
from ard.weights.diffusers_format import read_json
from ard.weights.text_encoder import load_tokenizer, load_whole, model_weight_files, require_transformers, token_counts

POOLED_SIDE = 8
MOST_POOLED = 2048  # features: the covariance is (F, F)
INCEPTION, DINOV2, CLIP = "inception", "dinov2", "clip"
DINOV2_SIDE = 224  # pixels, as FD-DINOv2 is taken (arXiv 2306.04675)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_POSITION_IDS = (
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
)  # 0, 1, 2, ...; no weights


@dataclass(frozen=True)
class Features:
    """A feature extractor and the name under which scores report it."""

    name: str
    extract: Callable[[Tensor], Tensor]  # images (n, c, h, w) float in [-1, 1], or latents -> (n, F) float32, no grad
    classify: Callable[[Tensor], Tensor] | None = None  # features (n, F) -> class logits (n, K)
    # texts -> (p, F) float32 to compare images' features with by their cosine, and how many texts were cut
    embed_texts: Callable[[Sequence[str]], tuple[Tensor, int]] | None = None


def load_features(name: str, *, device: torch.device | str = "cpu", weights: Path | None = None) -> Features:
    """The extractor of this name, on ``device``.

    "digits" trains the classifier with the defaults of `ClassifierConfig` (seconds, always the same
    weights). "inception" calls
    ``torch_fidelity.feature_extractor_inceptionv3.FeatureExtractorInceptionV3(name, ["2048"],
    feature_extractor_weights_path=weights)``; without ``weights`` torch-fidelity downloads its own.
    "dinov2" takes ``weights``: a TorchScript file, normalized images (n, 3, 224, 224) -> class tokens (n, F), which may
    hold code, so take it from whom you trust; or a folder for ``transformers.AutoModel.from_pretrained`` (safetensors).
    "clip" takes ``weights``: a folder of transformers' ``CLIPModel`` (safetensors) with its tokenizer.
    "package.module:function" imports the module and takes its function (images -> features (n, F)).

    weights: file for "inception", file or folder for "dinov2", folder for "clip", else None.
    Raises ValueError for an unknown name (the valid ones are listed, nearest first), a weights file that is absent or
    of no use; ImportError where torch-fidelity, transformers or the user's module does not import.
    """
    loaders: dict[str, Callable[[torch.device, Path | None], Features]] = {
        "pooled": _pooled,
        "digits": _digits,
        INCEPTION: _inception,
        DINOV2: _dinov2,
        CLIP: _clip,
    }
    if weights is not None and name not in (INCEPTION, DINOV2, CLIP):
        raise ValueError(
            f"load_features: weights is {str(weights)!r}; expected None for {name!r}, whose file it is not"
        )
    if name in loaders:
        return loaders[name](torch.device(device), weights)
    if ":" in name:
        return _imported(name, torch.device(device))
    forms = [*loaders, "package.module:function"]
    nearest = difflib.get_close_matches(name, forms, n=len(forms), cutoff=0.0)
    raise ValueError(f"load_features: name is {name!r}; expected one of {', '.join(nearest)}")


def _pooled(device: torch.device, weights: Path | None) -> Features:
    def extract(images_Nchw: Tensor) -> Tensor:
        height, width = images_Nchw.shape[-2:]
        grid = (min(height, POOLED_SIDE), min(width, POOLED_SIDE))
        if images_Nchw.shape[1] * grid[0] * grid[1] > MOST_POOLED:
            raise ValueError(
                f"features 'pooled': images have {images_Nchw.shape[1]} channels; expected at most "
                f"{MOST_POOLED // (grid[0] * grid[1])}, for {MOST_POOLED} features"
            )
        return F.adaptive_avg_pool2d(images_Nchw, grid).flatten(1)

    return Features("pooled", _on_device("pooled", extract, device))


def _digits(device: torch.device, weights: Path | None) -> Features:
    from ard.data import digits
    from ard.evaluation.digit_classifier import ClassifierConfig, train_classifier

    classifier, _ = train_classifier(digits.load(), ClassifierConfig())
    classifier.to(device)
    extract = _on_device("digits", classifier.features, device, digits.IMAGE_SHAPE)
    return Features("digits", extract, lambda features_NF: classifier.head(features_NF.to(device)).detach())


def _inception(device: torch.device, weights: Path | None) -> Features:
    if weights is not None and not Path(weights).is_file():
        raise ValueError(f"load_features: weights is {str(weights)!r}; expected a file")
    try:
        module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ImportError(
            f"load_features: 'inception' needs torch-fidelity, which does not import ({error}); "
            "install it with `pip install torch-fidelity`"
        ) from error
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat",
            ["2048"],
            feature_extractor_weights_path=None if weights is None else str(weights),
        )
    except Exception as error:  # of many kinds, according to the byte that is wrong
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"load_features: weights {weights or 'of torch-fidelity'} do not load ({reason})") from error
    network = network.to(device).eval()

    def extract(images_Nchw: Tensor) -> Tensor:
        return network(quantize(images_Nchw))[0]

    return Features(INCEPTION, _on_device(INCEPTION, extract, device, (3, None, None)))


def _dinov2(device: torch.device, weights: Path | None) -> Features:
    if weights is None or not Path(weights).exists():
        raise ValueError(
            f"load_features: weights is {weights and str(weights)!r}; expected a TorchScript file or a folder of "
            "transformers, of a DINOv2"
        )
    tokens = _transformers_tokens(weights, device) if Path(weights).is_dir() else _scripted_tokens(weights, device)
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))

    def extract(images_Nchw: Tensor) -> Tensor:
        pixels = quantize(images_Nchw).float() / 255.0
        scaled = F.interpolate(pixels, (DINOV2_SIDE, DINOV2_SIDE), mode="bicubic", antialias=True).clamp(0.0, 1.0)
        return tokens((scaled - mean) / std)

    return Features(DINOV2, _on_device(DINOV2, extract, device, (3, None, None)))


def _scripted_tokens(weights: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        network = torch.jit.load(str(weights), map_location=device).eval()
    except Exception as error:  # of many kinds, according to the byte that is wrong
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"load_features: weights {weights} are no TorchScript ({reason})") from error
    return network


def _transformers_tokens(weights: Path, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ImportError(
            f"load_features: a folder for 'dinov2' needs transformers, which does not import ({error}); "
            "install it with `pip install transformers`"
        ) from error
    try:
        network = transformers.AutoModel.from_pretrained(str(weights), local_files_only=True, use_safetensors=True)
    except Exception as error:  # of many kinds, according to the file that is wrong
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"load_features: weights {weights} do not load ({reason})") from error
    network = network.to(device).eval()
    return lambda images_Nchw: network(pixel_values=images_Nchw).last_hidden_state[:, 0]


def _clip(device: torch.device, weights: Path | None) -> Features:
    if weights is None or not (Path(weights) / "config.json").is_file():
        raise ValueError(
            f"load_features: weights is {weights and str(weights)!r}; expected a folder of transformers, of a CLIPModel"
        )
    folder, transformers = Path(weights), require_transformers("features 'clip'")
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"load_features: {folder} is of model_type {shown(kind)}; expected 'clip'")
    model_weight_files(folder)  # raises for those that are no safetensors
    network = load_whole(transformers.CLIPModel, folder, torch.float32, ignored=_POSITION_IDS).to(device)
    sizes = network.config.text_config
    tokenizer, side = load_tokenizer(folder, sizes.vocab_size), network.config.vision_config.image_size

    def extract(images_Nchw: Tensor) -> Tensor:
        pixels = clip_pixels(images_Nchw, side)
        return network.visual_projection(network.vision_model(pixel_values=pixels).pooler_output)

    @torch.no_grad()
    def embed_texts(texts: Sequence[str]) -> tuple[Tensor, int]:
        longest = sizes.max_position_embeddings
        made: Any = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        inputs = {name: made[name].to(device) for name in ("input_ids", "attention_mask")}
        text_PF = network.text_projection(network.text_model(**inputs).pooler_output)
        return text_PF.float(), sum(count > longest for count in token_counts(tokenizer, texts))

    return Features(CLIP, _on_device(CLIP, extract, device, (3, None, None)), embed_texts=embed_texts)


def clip_pixels(images_Nchw: Tensor, side: int) -> Tensor:
    """What CLIP sees of images (n, 3, h, w) in [-1, 1]: (n, 3, side, side), normalized.

    They are scaled so that the short side is ``side``, and cut to the square in the centre. transformers' processor
    rounds to 8 bits after each direction of scaling, which is not done here.
    """
    height, width = images_Nchw.shape[-2:]
    short = min(height, width)
    scaled_hw = (side * height // short, side * width // short)
    pixels = quantize(images_Nchw).float() / 255.0
    scaled = F.interpolate(pixels, scaled_hw, mode="bicubic", antialias=True).clamp(0.0, 1.0)
    top, left = ((length - side) // 2 for length in scaled_hw)
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (scaled[..., top : top + side, left : left + side] - mean) / std


def _imported(name: str, device: torch.device) -> Features:
    module_name, _, function_name = name.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"load_features: name is {name!r}; expected package.module:function")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"load_features: the module of {name!r} does not import ({error}); is its folder on PYTHONPATH?"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"load_features: name is {name!r}, but {module_name} has no function {function_name!r}")
    return Features(name, _on_device(name, function, device))


def _on_device(
    name: str,
    extract: Callable[[Tensor], Tensor],
    device: torch.device,
    image_shape: tuple[int | None, ...] = (None, None, None),
) -> Callable[[Tensor], Tensor]:
    """``extract`` without gradients, on float32 images moved to ``device``, its input and output shapes checked."""

    @torch.no_grad()
    def checked(images_Nchw: Tensor) -> Tensor:
        got = tuple(images_Nchw.shape[1:])
        fits = len(got) == 3 and all(want in (None, have) for want, have in zip(image_shape, got, strict=True))
        if not fits or not images_Nchw.is_floating_point():
            expected = ", ".join("any" if size is None else str(size) for size in image_shape)
            raise ValueError(
                f"features {name!r}: images are {images_Nchw.dtype} (n, {', '.join(map(str, got))}); "
                f"expected floating point (n, {expected})"
            )
        features_NF = extract(images_Nchw.to(device, torch.float32))
        if not isinstance(features_NF, Tensor) or features_NF.ndim != 2 or len(features_NF) != len(images_Nchw):
            shape = tuple(features_NF.shape) if isinstance(features_NF, Tensor) else type(features_NF).__name__
            raise ValueError(f"features {name!r}: got {shape} for {len(images_Nchw)} images; expected a tensor (n, F)")
        return features_NF.float()

    return checked
