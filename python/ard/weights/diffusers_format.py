"""Weights in the folder format of diffusers' classes in `CLASSES`: config.json + safetensors. Needs no diffusers.

What each class names otherwise, and what it cannot express, is in the file of that class.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ard.models.config import ModelConfig
from ard.models.student import final_layer_name
from ard.storage.files import atomic_folder, json_text, parse_json, read_tensors, shown, write_json, write_tensors
from ard.weights import diffusers_dit, diffusers_pixart
from ard.weights.diffusers_common import DiffusersClass
from ard.weights.diffusers_dit import CLASS_NAME as CLASS_NAME
from ard.weights.diffusers_dit import use_release_arithmetic as use_release_arithmetic
from ard.weights.names import listing

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
CLASSES = (diffusers_dit.FORMAT, diffusers_pixart.FORMAT)
# diffusers before 0.28 had one class for all; the published folders still name it.
_LEGACY_CLASS_NAME = "Transformer2DModel"


def class_of(config: ModelConfig) -> DiffusersClass:
    """Their class for models of this family. Raises ValueError where there is none."""
    for known in CLASSES:
        if known.family == config.family:
            return known
    families = " and ".join(repr(known.family) for known in CLASSES)
    raise ValueError(f"to: diffusers has a class for the families {families}; got a model of {config.family!r}")


def to_diffusers(state: Mapping[str, Tensor], config: ModelConfig) -> tuple[dict[str, Tensor], dict]:
    """(tensors, content of config.json) of their class with the weights of a teacher `state`.

    state: the public names, all in one floating dtype, which is kept; the result shares no memory with it.
    Raises ValueError for a state that does not fit `config` and for what their class cannot express.
    """
    return class_of(config).encode(state, config)


def from_diffusers(tensors: Mapping[str, Tensor], config_json: Mapping) -> tuple[dict[str, Tensor], ModelConfig]:
    """(state with the public names, its config), for `ard.checkpoint.load_teacher(state, num_heads=...)`.

    tensors: state dict of one of their models, all in one floating dtype, which is kept; config_json: its config.json.
    The result shares no memory with `tensors`. `pos_embed` is the sin-cos table in float32, as their classes compute
    it, cast to the dtype.
    Raises ValueError for another class or architecture, and for missing, unexpected and misshapen tensors.
    """
    name, norm_type = config_json.get("_class_name"), config_json.get("norm_type")
    legacy = name == _LEGACY_CLASS_NAME
    for known in CLASSES:
        if name == known.name or (legacy and norm_type == known.norm_type):
            return known.decode(tensors, config_json)
    key, found = ("norm_type", norm_type) if legacy else ("_class_name", name)
    expected = " or ".join(repr(known.norm_type if legacy else known.name) for known in CLASSES)
    raise ValueError(f"from_diffusers: {key} is {shown(found)}; expected {expected}")


def save_diffusers(folder: str | os.PathLike, state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Write a folder that their class reads with `from_pretrained`; it appears whole or not at all.

    Arguments and refusals as in `to_diffusers`; an existing folder must be empty.
    """
    folder = Path(folder).absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"save_diffusers: {folder} exists; expected a new or an empty folder")
    tensors, content = to_diffusers(state, config)
    if folder.exists():
        folder.rmdir()
    with atomic_folder(folder) as temporary:
        write_tensors(temporary / WEIGHTS_NAME, tensors)
        write_json(temporary / "config.json", content)


def load_diffusers(folder: str | os.PathLike) -> tuple[dict[str, Tensor], ModelConfig]:
    """`from_diffusers` of a saved model, or of the `transformer` in a saved pipeline. Safetensors only, on the CPU."""
    folder = model_folder(folder, "transformer")
    content = read_json(folder / "config.json")
    tensors: dict[str, Tensor] = {}
    for path, names in weight_files(folder).items():
        loaded = read_tensors(path)
        if names is not None and (odd := sorted(names ^ loaded.keys())):
            raise ValueError(f"load_diffusers: {path} and {INDEX_NAME} disagree about {listing(odd)}")
        tensors.update(loaded)
    return from_diffusers(tensors, content)


def segment_teacher_state(student_state: Mapping[str, Tensor], segment: int) -> dict[str, Tensor]:
    """A teacher-named state: the student's trunk with the final layer of `segment` (0 is the noise's), not copied.

    student_state: published names final_layer, final_layer2, ... With no history (N = 0), segment s of the student is
    this teacher at t_s = 999 (1 - s / S), less the sigma channels.
    """
    finals = {name.partition(".")[0] for name in student_state if name.startswith("final_layer")}
    steps = len(finals)
    if finals != {final_layer_name(s) for s in range(steps)} or not steps:
        raise ValueError(
            f"segment_teacher_state: final layers are [{listing(sorted(finals))}]; "
            "expected final_layer, final_layer2, ... without a gap"
        )
    if not 0 <= segment < steps:
        raise ValueError(f"segment_teacher_state: segment is {segment}; expected 0 to {steps - 1}")
    trunk = {name: tensor for name, tensor in student_state.items() if not name.startswith("final_layer")}
    own = final_layer_name(segment) + "."
    final = {name: tensor for name, tensor in student_state.items() if name.startswith(own)}
    return trunk | {"final_layer." + name.removeprefix(own): tensor for name, tensor in final.items()}


def model_folder(folder: str | os.PathLike, part: str) -> Path:
    """The folder with config.json: `folder`, or its subfolder `part` when it holds a saved pipeline."""
    folder = Path(folder)
    for candidate in (folder, folder / part):
        if (candidate / "config.json").is_file():
            return candidate
    raise ValueError(f"diffusers folder: {folder} has no config.json and no {part}/config.json; expected a saved model")


def weight_files(folder: Path) -> dict[Path, set[str] | None]:
    """Weight files of a saved model, each with the tensor names its index gives, or None where there is no index."""
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.exists() and index.exists():
        raise ValueError(f"diffusers folder: {folder} has both {WEIGHTS_NAME} and {INDEX_NAME}; expected one of them")
    if single.exists():
        return {single: None}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"diffusers folder: {index} has no weight_map; expected tensor names and their files")
        files: dict[Path, set[str] | None] = {}
        for name in sorted(set(map(str, weight_map.values()))):
            if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file():
                raise ValueError(f"diffusers folder: {index} names {name!r}; expected a .safetensors file beside it")
            files[folder / name] = {tensor for tensor, file in weight_map.items() if file == name}
        return files
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))
    hint = (
        "; a .bin file is a pickle and is not read: where you trust it, load it with diffusers and "
        "save_pretrained(..., safe_serialization=True)"
        if any(name.endswith(".bin") for name in others)
        else ""
    )
    raise ValueError(f"diffusers folder: {folder} holds {others or 'no weights'}; expected {WEIGHTS_NAME}{hint}")


def read_json(path: Path) -> dict:
    """The JSON object in a file."""
    try:
        content = parse_json(json_text(path))
    except ValueError as error:
        raise ValueError(f"diffusers folder: {path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"diffusers folder: {path} holds a {type(content).__name__}; expected an object")
    return content
