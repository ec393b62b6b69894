"""Weights in and out: strict loading with sizes read from the tensors, atomic safetensors writing.

A file is .safetensors, or a .pt/.pth that `torch.load(weights_only=True)` accepts; no pickle is executed or written.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ard.models.config import ModelConfig
from ard.models.families import make_teacher
from ard.models.student import ARDStudent
from ard.models.trunk import Teacher, Trunk
from ard.storage.files import DamagedFile, read_tensors
from ard.weights.names import InputSize, infer_config, listing, numbers, public_state, with_positions

StateSource = str | os.PathLike | Mapping[str, Tensor]
Model = TypeVar("Model", bound=Trunk)

# Training checkpoints of the releases of DiT and PixArt; the averaged weights come first.
_NESTING_KEYS = ("ema", "model", "state_dict_ema", "state_dict")
_ZIP = b"PK\x03\x04"


def load_teacher(
    path_or_state: StateSource,
    *,
    num_heads: int,
    family: str = "dit",
    input_size: InputSize = None,
    **unseen: Any,
) -> Teacher:
    """A teacher with exactly these weights, in their dtype, on their device (CPU for a file), in eval mode.

    path_or_state: a file, or a state dict with the public checkpoints' names (its tensors are copied).
    num_heads: a size that no tensor shows.
    family: "dit", "sit", "repa", "lightningdit" or "pixart". The first three have the same tensors: only you know which
    it is.
    input_size: latent size; only needed for a grid that is not square, and where a PixArt's file has no pos_embed or
    that of another size: it is computed then.
    unseen: what else tensors do not show, of "pixart" only: position_scale (needed where pos_embed is computed, else
    compared with it), position_base, caption_tokens (needed where there is no y_embedder.y_embedding).
    Raises ValueError naming missing and unexpected keys and shape mismatches, and for another name in ``unseen``.
    """
    state = public_state(read_state(path_or_state), family)
    config = infer_config(state, num_heads=num_heads, family=family, input_size=input_size, **unseen)
    return teacher_of(config, with_positions(state, config))


def load_student(
    path_or_state: StateSource,
    *,
    num_heads: int,
    history_layers: int,
    window: int | None = None,
    sink: int = 0,
    timesteps: Sequence[float] | None = None,
    family: str = "dit",
    input_size: InputSize = None,
    **unseen: Any,
) -> ARDStudent:
    """An ARDStudent with exactly these weights; the published names final_layer, final_layer2, ... give its steps.

    Arguments as in `load_teacher` and `ARDStudent`.
    """
    state = public_state(read_state(path_or_state), family)
    config = infer_config(state, num_heads=num_heads, family=family, input_size=input_size, **unseen)
    routing = {"history_layers": history_layers, "window": window, "sink": sink, "timesteps": timesteps}
    return student_of(config, with_positions(state, config), **routing)


def teacher_of(config: ModelConfig, state: Mapping[str, Tensor]) -> Teacher:
    """A teacher of this config with these tensors themselves, in eval mode; strict in names and shapes."""
    with torch.device("meta"):
        teacher = make_teacher(config)
    return _assign(teacher, state, "load_teacher")


def student_of(config: ModelConfig, state: Mapping[str, Tensor], **settings: Any) -> ARDStudent:
    """A student of this config with these tensors themselves, in eval mode. settings: `ARDStudent`'s."""
    with torch.device("meta"):
        student = ARDStudent(config, steps=student_steps(state), **settings)
    return _assign(student, state, "load_student")


def student_steps(state: Mapping[str, Tensor]) -> int:
    """How many final layers there are: a student's steps, 1 for a teacher."""
    return max(numbers(r"final_layer(\d*)\.", state, default=1), default=1)


def read_state(path_or_state: StateSource, weights: str = "ema") -> dict[str, Tensor]:
    """Flat state dict of a file or mapping; unwraps {"ema": ...} and its like. No tensor aliases the source.

    weights: which of several; "ema" takes what there is. ValueError for others that are not there.
    """
    if isinstance(path_or_state, Mapping):
        return _flat_copy(path_or_state, "state dict", weights)
    path = Path(path_or_state)
    if path.suffix == ".safetensors":
        return _flat_copy(read_tensors(path), path.name, weights)  # aligned memory, independent of the mapped file
    if path.suffix not in (".pt", ".pth"):
        raise ValueError(f"checkpoint: got {path.name!r}; expected a .safetensors, .pt or .pth file")
    size = path.stat().st_size
    with open(path, "rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    try:
        # Mapped, tensors cannot reach beyond the file and nothing is inflated. PyTorch before 1.6 wrote no zip.
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"checkpoint: {path.name!r} holds more than tensors and plain containers; expected a file that "
            "torch.load(weights_only=True) accepts. Convert its weights to .safetensors where you trust it, "
            f"or allow the classes with torch.serialization.safe_globals. ({str(error).splitlines()[0]})"
        ) from error
    except Exception as error:  # of many kinds, according to the byte that is wrong
        raise DamagedFile(f"checkpoint: {path} is not a whole file of torch.save ({type(error).__name__})") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"checkpoint: {path.name!r} holds a {type(loaded).__name__}; expected a state dict")
    return _flat_copy(loaded, path.name, weights, largest=size)


def _flat_copy(state: Mapping, source: str, weights: str, largest: int | None = None) -> dict[str, Tensor]:
    """largest: bytes of all tensors, which those of a file that repeats some of its bytes exceed."""
    if weights != "ema" and not isinstance(state.get(weights), Mapping):
        raise ValueError(
            f"checkpoint: {source} has no {weights!r} beside other weights; expected weights='ema', or a run"
        )
    for key in _NESTING_KEYS if weights == "ema" else (weights,):
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"checkpoint: {source} has entries that are not tensors: {listing(others)}")
    if odd := [name for name, value in state.items() if not _is_plain(name, value)]:
        raise ValueError(f"checkpoint: {source} has names or tensors of an odd kind: {listing(odd)}")
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if largest is not None and total > largest:
        raise ValueError(f"checkpoint: {source} has tensors of {total} bytes; expected at most the file's {largest}")
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _assign(model: Model, state: Mapping[str, Tensor], caller: str) -> Model:
    """Give a meta-device model the tensors of `state`; strict in names, shapes and floating point."""
    expected = model.state_dict()
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"missing keys {listing(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"unexpected keys {listing(unexpected)}")
    if wrong := [
        f"{name}: expected {tuple(tensor.shape)} floating point, got {tuple(state[name].shape)} {state[name].dtype}"
        for name, tensor in expected.items()
        if name in state and (state[name].shape != tensor.shape or not state[name].is_floating_point())
    ]:
        problems.append(f"wrong tensors [{listing(wrong)}]")
    if problems:
        raise ValueError(f"{caller}: " + "; ".join(problems))
    model.load_state_dict(state, assign=True)
    try:
        model.check_buffers()
    except ValueError as error:
        raise ValueError(f"{caller}: {error}") from error
    return model.eval()


def _is_plain(name: object, tensor: Tensor) -> bool:
    return isinstance(name, str) and tensor.layout == torch.strided and not tensor.is_meta
