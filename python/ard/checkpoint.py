"""Weights in and out: strict loading with sizes read from the tensors, atomic safetensors writing.

A file is .safetensors, or a .pt/.pth that `torch.load(weights_only=True)` accepts; no pickle is executed or written.
"""

from __future__ import annotations

import math
import os
import pickle
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from ard.files import DamagedFile, read_tensors, shown, write_tensors
from ard.model import DiT
from ard.model_config import DiTConfig
from ard.student import ARDStudent

StateSource = str | os.PathLike | Mapping[str, Tensor]
Model = TypeVar("Model", bound=nn.Module)

_NESTING_KEYS = ("ema", "model")  # training checkpoints of the DiT release; the averaged weights come first
_NAMES_SHOWN = 8
_MOST_PARTS = 1000  # blocks, and final layers: a teacher has no more steps
_ZIP = b"PK\x03\x04"


def load_teacher(path_or_state: StateSource, *, num_heads: int, input_size: int | tuple[int, int] | None = None) -> DiT:
    """A DiT with exactly these weights, in their dtype, on their device (CPU for a file), in eval mode.

    path_or_state: a file, or a state dict with the public checkpoints' names (its tensors are copied).
    num_heads: the one size that no tensor shows.
    input_size: latent size; only needed for a grid that is not square.
    Raises ValueError naming missing and unexpected keys and shape mismatches.
    """
    state = read_state(path_or_state)
    config = infer_config(state, num_heads=num_heads, input_size=input_size)
    with torch.device("meta"):
        teacher = DiT(config)
    return _assign(teacher, state, "load_teacher")


def load_student(
    path_or_state: StateSource,
    *,
    num_heads: int,
    history_layers: int,
    window: int | None = None,
    sink: int = 0,
    input_size: int | tuple[int, int] | None = None,
) -> ARDStudent:
    """An ARDStudent with exactly these weights; the published names final_layer, final_layer2, ... give its steps.

    Arguments as in `load_teacher` and `ARDStudent`.
    """
    state = read_state(path_or_state)
    config = infer_config(state, num_heads=num_heads, input_size=input_size)
    steps = max(_numbers(r"final_layer(\d*)\.", state, default=1), default=1)
    with torch.device("meta"):
        student = ARDStudent(config, steps=steps, history_layers=history_layers, window=window, sink=sink)
    return _assign(student, state, "load_student")


def read_state(path_or_state: StateSource) -> dict[str, Tensor]:
    """Flat state dict of a file or mapping; unwraps {"ema": ...} and {"model": ...}. No tensor aliases the source."""
    if isinstance(path_or_state, Mapping):
        return _flat_copy(path_or_state, "state dict")
    path = Path(path_or_state)
    if path.suffix == ".safetensors":
        return _flat_copy(read_tensors(path), path.name)  # aligned memory, independent of the mapped file
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
    return _flat_copy(loaded, path.name, largest=size)


def infer_config(
    state: Mapping[str, Tensor], *, num_heads: int, input_size: int | tuple[int, int] | None = None
) -> DiTConfig:
    """The DiTConfig whose tensors have the sizes found in `state`."""
    ranks = {
        "pos_embed": 3,
        "x_embedder.proj.weight": 4,
        "t_embedder.mlp.0.weight": 2,
        "y_embedder.embedding_table.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    if missing := [name for name in ranks if name not in state]:
        raise ValueError(f"checkpoint: missing keys {_listing(missing)}; expected the public DiT parameter names")
    for name, rank in ranks.items():
        if state[name].ndim != rank:
            raise ValueError(f"checkpoint: {name} has shape {tuple(state[name].shape)}; expected {rank} dimensions")
        if 0 in state[name].shape:
            raise ValueError(f"checkpoint: {name} has shape {tuple(state[name].shape)}; expected elements")
    hidden_size, in_channels, patch_size = state["x_embedder.proj.weight"].shape[:3]
    tokens, width = state["pos_embed"].shape[1:]
    if width != hidden_size:
        raise ValueError(f"checkpoint: pos_embed has {width} channels; expected {hidden_size}, as x_embedder.proj")
    side = math.isqrt(tokens)
    if input_size is None and side * side != tokens:
        raise ValueError(
            f"checkpoint: pos_embed has {tokens} tokens, not a square grid; give input_size=(height, width)"
        )
    mlp_hidden_size = state["blocks.0.mlp.fc1.weight"].shape[0]
    mlp_ratio = mlp_hidden_size / hidden_size
    if int(hidden_size * mlp_ratio) != mlp_hidden_size:  # the quotient was rounded down
        mlp_ratio = math.nextafter(mlp_ratio, math.inf)
    out_features = state["final_layer.linear.weight"].shape[0]
    plain = in_channels * patch_size**2
    if out_features not in (plain, 2 * plain):
        raise ValueError(
            f"checkpoint: final_layer.linear.weight has {out_features} rows; expected {plain} (epsilon) or "
            f"{2 * plain} (epsilon and sigma) for {in_channels} channels and patch {patch_size}"
        )
    config = DiTConfig(
        input_size=side * patch_size if input_size is None else input_size,
        patch_size=patch_size,
        in_channels=in_channels,
        hidden_size=hidden_size,
        depth=1 + max(_numbers(r"blocks\.(\d+)\.", state)),
        num_heads=num_heads,
        mlp_ratio=mlp_ratio,
        num_classes=state["y_embedder.embedding_table.weight"].shape[0] - 1,
        learn_sigma=out_features == 2 * plain,
        frequency_embedding_size=state["t_embedder.mlp.0.weight"].shape[1],
    )
    if config.tokens != tokens:
        raise ValueError(
            f"checkpoint: pos_embed: expected {(1, config.tokens, width)} for input_size={input_size}, "
            f"got {tuple(state['pos_embed'].shape)}"
        )
    return config


def save_safetensors(module: nn.Module, path: str | os.PathLike) -> None:
    """Write the module's state dict so that `path` always holds a whole file."""
    write_tensors(Path(path), module.state_dict())


def _flat_copy(state: Mapping, source: str, largest: int | None = None) -> dict[str, Tensor]:
    """largest: bytes of all tensors, which those of a file that repeats some of its bytes exceed."""
    for key in _NESTING_KEYS:
        if isinstance(state.get(key), Mapping):
            state = state[key]
            break
    if others := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"checkpoint: {source} has entries that are not tensors: {_listing(others)}")
    if odd := [name for name, value in state.items() if not _is_plain(name, value)]:
        raise ValueError(f"checkpoint: {source} has names or tensors of an odd kind: {_listing(odd)}")
    total = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    if largest is not None and total > largest:
        raise ValueError(f"checkpoint: {source} has tensors of {total} bytes; expected at most the file's {largest}")
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _assign(model: Model, state: Mapping[str, Tensor], caller: str) -> Model:
    """Give a meta-device model the tensors of `state`; strict in names, shapes and floating point."""
    expected = model.state_dict()
    problems = []
    if missing := [name for name in expected if name not in state]:
        problems.append(f"missing keys {_listing(missing)}")
    if unexpected := [name for name in state if name not in expected]:
        problems.append(f"unexpected keys {_listing(unexpected)}")
    if wrong := [
        f"{name}: expected {tuple(tensor.shape)} floating point, got {tuple(state[name].shape)} {state[name].dtype}"
        for name, tensor in expected.items()
        if name in state and (state[name].shape != tensor.shape or not state[name].is_floating_point())
    ]:
        problems.append(f"wrong tensors [{_listing(wrong)}]")
    if problems:
        raise ValueError(f"{caller}: " + "; ".join(problems))
    model.load_state_dict(state, assign=True)
    return model.eval()


def _is_plain(name: object, tensor: Tensor) -> bool:
    return isinstance(name, str) and tensor.layout == torch.strided and not tensor.is_meta


def _numbers(pattern: str, names: Iterable[str], default: int = 0) -> list[int]:
    """Numbers in the names, ``default`` where there is none. Raises ValueError for one that no model has."""
    matches = [match for name in names if (match := re.match(pattern, name))]
    for match in matches:
        if len(match[1]) > 4 or int(match[1] or 0) > _MOST_PARTS:
            raise ValueError(f"checkpoint: a tensor is named {shown(match[0])}...; expected at most {_MOST_PARTS}")
    return [int(match[1] or default) for match in matches]


def _listing(names: list[str]) -> str:
    listed = ", ".join(str(name)[:100] for name in names[:_NAMES_SHOWN])
    return listed if len(names) <= _NAMES_SHOWN else f"{listed} and {len(names) - _NAMES_SHOWN} more"
