"""`evaluate`: scores of a file of samples against a file of reference images or of their statistics.

Files of images: an .npz with arr_0 (uint8, `ard.storage.images`), its values taken to [-1, 1], and arr_1 for labels; or
a .safetensors with "images" (floating point (N, c, h, w): images in [-1, 1], or latents) and "labels" for labels.
Where sample.json beside samples has "prompts", a list of texts, arr_1 (or "prompt" of a .safetensors) holds the number
of each sample's prompt in it, and no class label.
Files of statistics: an .npz with mu (F,), sigma (F, F), and "count" and "features" (the extractor's name) where
`write_statistics` wrote it. An .npz may hold both, as those of the ADM suite do: the Frechet distance then takes the
statistics, precision and recall take the images.

A file is read batch by batch: memory is one batch, (F, F) sums, and the features precision and recall use.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ard.evaluation.features import DINOV2, INCEPTION, Features
from ard.evaluation.metrics import (
    FeatureAccumulator,
    FeatureStatistics,
    class_consistency,
    frechet_distance,
    precision_recall,
)
from ard.storage.files import atomic_path, file_sha256, shown, whole_tensors
from ard.storage.images import (
    LARGEST_BATCH,
    SAMPLE_NAME,
    SAMPLE_PARTS,
    from_uint8,
    iterate_npz,
    npz_names,
    read_array,
    read_header,
    read_labels,
    read_sample_json,
)

FID_50K_COUNT = 50_000
NO_IMAGES = "the reference is a file of statistics; precision and recall need its images"


@dataclass(frozen=True)
class ImageFile:
    """An opened file of images or latents; nothing of it but the labels is in memory."""

    path: Path
    count: int
    image_shape: tuple[int, int, int]  # (c, h, w)
    labels_N: Tensor | None  # int64
    batches: Callable[[int], Iterator[Tensor]]  # batch size -> float (n, c, h, w), in file order
    prompt_N: Tensor | None = None  # int64, numbers of prompts, if the file has them under that name


def evaluate(
    samples: Path,
    reference: Path,
    *,
    features: Features,
    batch_size: int = 256,
    neighbours: int = 3,
    precision_recall_max: int = 10_000,
) -> dict:
    """Scores of ``samples`` against ``reference``, as a dict that `ard.storage.files.write_json` takes.

        metrics     frechet_distance, precision, recall; "fid", the same distance, only for the features "inception",
                    and "fid_50k" only if there are exactly 50000 samples besides; "fd_dinov2", the same again, for
                    "dinov2"; "class_consistency" where the
                    features classify ("digits") and the samples have labels; "clip_score" for "clip" where the samples
                    say their prompts: the mean of max(100 cos(image, its prompt), 0) (arXiv 2104.08718)
        features    name of the extractor
        samples     path (file name), count, sha256, image_shape [c, h, w]
        reference   file (name), count (null: statistics that do not say), sha256
        settings    neighbours; precision_recall_samples and _reference, how many of each were used;
                    precision_recall_reason, null or why there is no precision and recall; clip_truncated, beside a
                    clip_score, how many of the prompts were cut to the tokens that CLIP reads

    samples, reference: files as in the module's docstring; the samples must be images.
    batch_size: images per call of the extractor, at most; LARGEST_BATCH values bound it too.
    neighbours: k of `precision_recall`.
    precision_recall_max: precision and recall take at most so many images of each file, evenly spaced over it.
    Raises ValueError, before any feature is computed, for less than 2 images, no more than ``neighbours`` where
    precision and recall are asked for, image shapes that differ, statistics of other features, prompts that are no
    texts or whose numbers are none; then for NaN or infinity in images or features.
    """
    if batch_size < 1 or precision_recall_max <= neighbours or neighbours < 1:
        raise ValueError(
            f"evaluate: batch_size={batch_size}, neighbours={neighbours}, precision_recall_max={precision_recall_max}; "
            "expected all >= 1 and more samples than neighbours"
        )
    sample_file, reference = open_images(samples), Path(reference)
    statistics, reference_file = _open_reference(reference, features)
    kept_count = 0 if reference_file is None else precision_recall_max
    for file in filter(None, (sample_file, reference_file)):
        _require_fit(file, sample_file.image_shape, neighbours if reference_file else 1)
    width = None if statistics is None else statistics.mean_F.numel()
    sha256 = _sample_sha256(sample_file.path)
    sample_file, prompts = _with_prompts(sample_file, features, batch_size)
    sample = _measure(sample_file, features, batch_size, kept_count, width, prompts)
    real = None if reference_file is None else _measure(reference_file, features, batch_size, kept_count, width)
    if statistics is None:
        assert real is not None  # a reference is images, statistics, or both
        statistics = real.statistics
    return {
        "metrics": _scores(sample, real, statistics, sample_file, features.name, neighbours),
        "features": features.name,
        "samples": {
            "path": sample_file.path.name,
            "count": sample_file.count,
            "sha256": sha256,
            "image_shape": list(sample_file.image_shape),
        },
        "reference": {"file": reference.name, "count": statistics.count, "sha256": file_sha256(reference)},
        "settings": {
            "neighbours": neighbours,
            "precision_recall_samples": len(sample.kept_PF),
            "precision_recall_reference": 0 if real is None else len(real.kept_PF),
            "precision_recall_reason": NO_IMAGES if real is None else None,
            **({} if prompts is None else {"clip_truncated": prompts.cut}),
        },
    }


def _scores(
    sample: _Measured,
    real: _Measured | None,
    statistics: FeatureStatistics,
    sample_file: ImageFile,
    features: str,
    neighbours: int,
) -> dict[str, float | None]:
    distance = frechet_distance(sample.statistics, statistics)
    metrics: dict[str, float | None] = {**distance_names(features, sample_file.count, distance)}
    precision = recall = None
    if real is not None:
        precision, recall = precision_recall(sample.kept_PF, real.kept_PF, neighbours)
    metrics |= {"precision": precision, "recall": recall}
    if sample.logits_NK is not None and sample_file.labels_N is not None:
        metrics["class_consistency"] = class_consistency(sample.logits_NK, sample_file.labels_N)
    if sample.text_scores_N is not None:
        metrics["clip_score"] = float(sample.text_scores_N.mean())
    return metrics


def distance_names(features: str, count: int, distance: float) -> dict[str, float]:
    """The Frechet distance under the names it may have: FID is defined on Inception features, FID-50k besides on
    exactly 50000 samples (Heusel et al. 2017); FD-DINOv2 on DINOv2's (Stein et al. 2023)."""
    names = ["frechet_distance"]
    if features == DINOV2:
        names.append("fd_dinov2")
    if features == INCEPTION:
        names.append("fid")
        if count == FID_50K_COUNT:
            names.append("fid_50k")
    return dict.fromkeys(names, distance)


def write_statistics(path: Path, images: Path, *, features: Features, batch_size: int = 256) -> FeatureStatistics:
    """Writes mu, sigma (float64), count and the features' name of a file of images, so that as a reference it need not
    be measured again. An .npz, written atomically; returns the statistics."""
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"write_statistics: path is {path.name!r}; expected a name that ends in .npz")
    file = open_images(images)
    _require_fit(file, file.image_shape, 1)
    statistics = _measure(file, features, batch_size, 0, None).statistics
    with atomic_path(path) as temporary, open(temporary, "wb") as output:
        np.savez(
            output,
            mu=statistics.mean_F.numpy(),
            sigma=statistics.covariance_FF.numpy(),
            count=np.int64(file.count),
            features=np.str_(features.name),
        )
    return statistics


def samples_file(folder: Path) -> Path:
    """The file that sample.json in a folder of `ard sample` names: one in that folder, by a plain name."""
    if (folder / SAMPLE_PARTS).exists():
        raise ValueError(f"{folder} is unfinished: `ard sample` has begun in it anew; give its command again")
    path = folder / SAMPLE_NAME
    name = read_sample_json(path).get("file")
    if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
        raise ValueError(f"{path}: file is {shown(name)}; expected the name of a file in this folder")
    return folder / name


def _sample_sha256(path: Path) -> str:
    """Of a file of samples. ValueError if a sample.json beside it was written for another one of its name."""
    sha256, beside = file_sha256(path), path.parent / SAMPLE_NAME
    content = read_sample_json(beside) if beside.is_file() else {}
    if content.get("file") == path.name and content.get("sha256", sha256) != sha256:
        said = shown(content["sha256"])
        raise ValueError(f"{beside}: sha256 is {said}; expected {path.name}'s {sha256}. Give `ard sample` again")
    return sha256


@dataclass(frozen=True)
class _Prompts:
    """Features of the samples' prompts."""

    rows_N: Tensor  # of text_PF, for each sample
    text_PF: Tensor
    cut: int


def _with_prompts(file: ImageFile, features: Features, batch_size: int) -> tuple[ImageFile, _Prompts | None]:
    """The file without labels where they are numbers of prompts; and these prompts, for features that embed texts."""
    path = file.path.parent / SAMPLE_NAME
    if (features.embed_texts is None and features.classify is None) or not path.is_file():
        return file, None
    content = read_sample_json(path)
    if "prompts" not in content or content.get("file") != file.path.name:
        return file, None
    texts, numbers_N = content["prompts"], file.prompt_N
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{path}: prompts are {shown(texts)}; expected a list of texts")
    if numbers_N is None and file.path.suffix == ".npz":
        file, numbers_N = replace(file, labels_N=None), file.labels_N
    if features.embed_texts is None:
        return file, None
    if numbers_N is None:
        raise ValueError(f"{file.path.name}: has no numbers of its prompts; expected arr_1, or prompt in .safetensors")
    if not 0 <= int(numbers_N.min()) <= int(numbers_N.max()) < len(texts):
        span = f"{int(numbers_N.min())} to {int(numbers_N.max())}"
        raise ValueError(f"{file.path.name}: numbers of prompts are {span}; expected within [0, {len(texts) - 1}]")
    used, rows_N = numbers_N.unique(return_inverse=True)
    made = [features.embed_texts([texts[int(n)] for n in part]) for part in used.split(batch_size)]
    return file, _Prompts(rows_N, torch.cat([text_PF.cpu() for text_PF, _ in made]), sum(cut for _, cut in made))


def open_images(path: Path) -> ImageFile:
    """Opens a file of images; ValueError for other suffixes, missing or wrong arrays."""
    path = Path(path)
    if path.suffix == ".npz":
        count, height, width, channels = read_header(path).shape
        labels = read_labels(path)
        return ImageFile(
            path,
            count,
            (channels, height, width),
            None if labels is None else torch.from_numpy(labels),
            lambda batch_size: map(from_uint8, iterate_npz(path, batch_size)),
        )
    if path.suffix == ".safetensors":
        return _open_safetensors(path)
    raise ValueError(f"evaluate: got {path.name!r}; expected an .npz or a .safetensors file")


def _open_safetensors(path: Path) -> ImageFile:
    with whole_tensors(path), safe_open(path, framework="pt") as tensors:
        names = set(tensors.keys())
        if "images" not in names:
            raise ValueError(
                f"{path.name}: holds {', '.join(sorted(names))[:200] or 'nothing'}; expected images (N, c, h, w)"
            )
        images = tensors.get_slice("images")
        shape, dtype = tuple(images.get_shape()), images.get_dtype()
        labels_N, prompt_N = (  # mapped, not read
            tensors.get_tensor(name) if name in names else None for name in ("labels", "prompt")
        )
    if len(shape) != 4 or 0 in shape or dtype not in ("F64", "F32", "F16", "BF16"):
        raise ValueError(f"{path.name}: images are {dtype} {shape}; expected floating point (N, c, h, w), N >= 1")
    if math.prod(shape[1:]) > LARGEST_BATCH:
        raise ValueError(f"{path.name}: images are {shape}; expected at most {LARGEST_BATCH} values an image")
    for name, each_N in (("labels", labels_N), ("prompt", prompt_N)):
        if each_N is not None and (each_N.shape != shape[:1] or each_N.dtype not in (torch.int32, torch.int64)):
            verb = f"{name} are" if name == "labels" else f"{name} is"
            raise ValueError(f"{path.name}: {verb} {each_N.dtype} {tuple(each_N.shape)}; expected int64 ({shape[0]},)")

    def batches(batch_size: int) -> Iterator[Tensor]:
        with safe_open(path, framework="pt") as tensors:
            images, rows = tensors.get_slice("images"), min(batch_size, LARGEST_BATCH // math.prod(shape[1:]))
            for first in range(0, shape[0], rows):
                yield images[first : first + rows]

    return ImageFile(path, shape[0], shape[1:], labels_N, batches, prompt_N)


def _open_reference(path: Path, features: Features) -> tuple[FeatureStatistics | None, ImageFile | None]:
    if path.suffix != ".npz":
        return None, open_images(path)
    names = npz_names(path)
    if "mu" not in names and "sigma" not in names:
        return None, open_images(path)
    if missing := {"mu", "sigma"} - set(names):
        raise ValueError(f"{path.name}: has no {missing.pop()}; expected mu and sigma, or arr_0 alone")
    arrays = {name: read_array(path, name) for name in ("mu", "sigma", "count", "features") if name in names}
    kinds = {"mu": "f", "sigma": "f", "count": "iu", "features": "U"}
    for name, array in arrays.items():
        if array.dtype.kind not in kinds[name] or (
            name in ("count", "features") and (array.shape or array.nbytes > 4096)
        ):
            raise ValueError(
                f"{path.name}: {name} is {array.dtype} {array.shape}; expected what `write_statistics` writes"
            )
    mean_F, covariance_FF = (torch.from_numpy(arrays[name].astype(np.float64, copy=False)) for name in ("mu", "sigma"))
    count = int(arrays["count"]) if "count" in arrays else None
    made_by = str(arrays["features"]) if "features" in arrays else features.name
    if count is not None and count < 2:
        raise ValueError(f"{path.name}: count is {count}; expected at least 2")
    if mean_F.ndim != 1 or covariance_FF.shape != (len(mean_F), len(mean_F)):
        raise ValueError(
            f"{path.name}: mu and sigma have shapes {tuple(mean_F.shape)} and {tuple(covariance_FF.shape)}; "
            "expected (F,) and (F, F)"
        )
    if not torch.isfinite(mean_F).all() or not torch.isfinite(covariance_FF).all():
        raise ValueError(f"{path.name}: mu or sigma hold NaN or infinity; expected finite values")
    if made_by != features.name:
        raise ValueError(f"{path.name}: statistics of features {shown(made_by)}; expected {features.name!r}")
    statistics = FeatureStatistics(mean_F, covariance_FF, count)
    return statistics, open_images(path) if "arr_0" in names else None


def _require_fit(file: ImageFile, image_shape: tuple[int, int, int], neighbours: int) -> None:
    if file.image_shape != image_shape:
        raise ValueError(
            f"{file.path.name}: images have shape (c, h, w) = {file.image_shape}; expected {image_shape}, the samples'"
        )
    if file.count <= neighbours:
        raise ValueError(
            f"{file.path.name}: holds {file.count} images; expected at least {neighbours + 1} "
            f"({'more than the neighbours' if neighbours > 1 else 'a covariance needs two'})"
        )


@dataclass(frozen=True)
class _Measured:
    statistics: FeatureStatistics
    kept_PF: Tensor
    logits_NK: Tensor | None
    text_scores_N: Tensor | None


def _measure(
    file: ImageFile,
    features: Features,
    batch_size: int,
    keep: int,
    width: int | None,
    prompts: _Prompts | None = None,
) -> _Measured:
    """Features of a file: their statistics, ``keep`` of them at most, logits where there are labels to compare, and how
    near each is to its prompt."""
    keep = min(keep, file.count)
    kept_rows = torch.arange(keep) * file.count // max(keep, 1)  # evenly spaced: files are often sorted by class
    accumulator, kept, logits, text_scores, first = FeatureAccumulator(), [], [], [], 0
    classify = features.classify if file.labels_N is not None else None
    for images_Nchw in file.batches(batch_size):
        last = first + len(images_Nchw)
        if not torch.isfinite(images_Nchw).all():
            raise ValueError(f"{file.path.name}: images {first} to {last - 1} hold NaN or infinity; expected finite")
        features_NF = features.extract(images_Nchw).cpu()
        if width not in (None, features_NF.shape[1]):
            raise ValueError(
                f"evaluate: the reference's mu has {width} features; expected {features_NF.shape[1]}, "
                f"as {features.name!r} gives"
            )
        accumulator.update(features_NF)
        kept.append(features_NF[kept_rows[(kept_rows >= first) & (kept_rows < last)] - first])
        if classify is not None:
            logits.append(classify(features_NF).cpu())
        if prompts is not None:
            text_NF = prompts.text_PF[prompts.rows_N[first:last]]
            cosines_N = F.cosine_similarity(features_NF.double(), text_NF.double(), dim=1)
            text_scores.append((100.0 * cosines_N).clamp(min=0.0))
        first = last
    logits_NK, text_scores_N = (torch.cat(each) if each else None for each in (logits, text_scores))
    return _Measured(accumulator.statistics(), torch.cat(kept), logits_NK, text_scores_N)
