"""The names of public checkpoints, by family, and the sizes that their tensors show."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from ard.models.config import ModelConfig
from ard.models.families import FAMILIES
from ard.storage.files import shown
from ard_kernels.common.arguments import described

_NAMES_SHOWN = 8
_MOST_PARTS = 1000  # blocks, and final layers: a teacher has no more steps

Sizes = dict[str, Any]


def public_state(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The tensors of the model itself: REPA's files hold the projectors of its training loss beside it.

    Raises ValueError for such a file as a "sit", which would be walked the wrong way.
    """
    projectors = {name for name in state if name.startswith("projectors.")}
    if projectors and family == "sit":
        raise ValueError("checkpoint: has projectors.*, as REPA's; expected family='repa', whose time runs down")
    return {name: tensor for name, tensor in state.items() if family != "repa" or name not in projectors}


def infer_config(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    family: str = "dit",
    input_size: int | tuple[int, int] | None = None,
) -> ModelConfig:
    """The family's config whose tensors have the sizes found in `state`."""
    if family not in SIZES:
        raise ValueError(f"family: got {described(family)}; expected one of {', '.join(SIZES)}, whose names are known")
    return FAMILIES[family].config(**SIZES[family](state, num_heads, input_size))


def _class_conditional(
    state: Mapping[str, Tensor], num_heads: int, input_size: int | tuple[int, int] | None, mlp: str
) -> Sizes:
    """What DiT, SiT and LightningDiT share; ``mlp``: the first linear of a block's MLP."""
    ranks = {
        "pos_embed": 3,
        "x_embedder.proj.weight": 4,
        "t_embedder.mlp.0.weight": 2,
        "y_embedder.embedding_table.weight": 2,
        f"blocks.0.mlp.{mlp}.weight": 2,
        "final_layer.linear.weight": 2,
    }
    if missing := [name for name in ranks if name not in state]:
        raise ValueError(f"checkpoint: missing keys {listing(missing)}; expected the public parameter names")
    for name, rank in ranks.items():
        if state[name].ndim != rank:
            raise ValueError(f"checkpoint: {name} has shape {tuple(state[name].shape)}; expected {rank} dimensions")
        if 0 in state[name].shape:
            raise ValueError(f"checkpoint: {name} has shape {tuple(state[name].shape)}; expected elements")
    hidden_size, in_channels, patch_size = state["x_embedder.proj.weight"].shape[:3]
    tokens, channels = state["pos_embed"].shape[1:]
    if channels != hidden_size:
        raise ValueError(f"checkpoint: pos_embed has {channels} channels; expected {hidden_size}, as x_embedder.proj")
    side = math.isqrt(tokens)
    if input_size is None and side * side != tokens:
        raise ValueError(
            f"checkpoint: pos_embed has {tokens} tokens, not a square grid; give input_size=(height, width)"
        )
    sizes = {
        "input_size": side * patch_size if input_size is None else input_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(numbers(r"blocks\.(\d+)\.", state)),
        "num_heads": num_heads,
        "num_classes": state["y_embedder.embedding_table.weight"].shape[0] - 1,
        "frequency_embedding_size": state["t_embedder.mlp.0.weight"].shape[1],
    }
    height, width = (sizes["input_size"],) * 2 if isinstance(sizes["input_size"], int) else sizes["input_size"]
    if (height // patch_size) * (width // patch_size) != tokens:
        expected = (1, (height // patch_size) * (width // patch_size), hidden_size)
        raise ValueError(
            f"checkpoint: pos_embed: expected {expected} for input_size={input_size}, "
            f"got {tuple(state['pos_embed'].shape)}"
        )
    return sizes


def _dit(state: Mapping[str, Tensor], num_heads: int, input_size: int | tuple[int, int] | None) -> Sizes:
    sizes = _class_conditional(state, num_heads, input_size, "fc1")
    mlp_hidden_size = state["blocks.0.mlp.fc1.weight"].shape[0]
    out_features = state["final_layer.linear.weight"].shape[0]
    plain = sizes["in_channels"] * sizes["patch_size"] ** 2
    if out_features not in (plain, 2 * plain):
        raise ValueError(
            f"checkpoint: final_layer.linear.weight has {out_features} rows; expected {plain} (epsilon) or "
            f"{2 * plain} (epsilon and sigma) for {sizes['in_channels']} channels and patch {sizes['patch_size']}"
        )
    ratio = _ratio(mlp_hidden_size, sizes["hidden_size"])
    return {**sizes, "mlp_ratio": ratio, "learn_sigma": out_features == 2 * plain}


def _lightningdit(state: Mapping[str, Tensor], num_heads: int, input_size: int | tuple[int, int] | None) -> Sizes:
    sizes = _class_conditional(state, num_heads, input_size, "w12")
    halves, odd = divmod(state["blocks.0.mlp.w12.weight"].shape[0], 2)
    # The hidden width is 2/3 of a whole number, rounded down: of those that give it, the one nearest to a whole ratio.
    width = sizes["hidden_size"]
    fits = [n for n in range(halves * 3 // 2, halves * 3 // 2 + 3) if int(2 / 3 * n) == halves]
    full = min(fits, key=lambda n: abs(n / width - round(n / width)), default=None)
    if odd or full is None:
        raise ValueError(f"checkpoint: blocks.0.mlp.w12.weight has {2 * halves + odd} rows; expected two halves")
    return {**sizes, "mlp_ratio": _ratio(full, width)}


def _ratio(hidden: int, width: int) -> float:
    """The ratio for which int(width * ratio) is ``hidden``."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)  # the quotient was rounded down


SIZES: dict[str, Callable[[Mapping[str, Tensor], int, int | tuple[int, int] | None], Sizes]] = {
    "dit": _dit,
    "sit": _dit,
    "repa": _dit,
    "lightningdit": _lightningdit,
}


def numbers(pattern: str, names: Iterable[str], default: int = 0) -> list[int]:
    """Numbers in the names, ``default`` where there is none. Raises ValueError for one that no model has."""
    matches = [match for name in names if (match := re.match(pattern, name))]
    for match in matches:
        if len(match[1]) > 4 or int(match[1] or 0) > _MOST_PARTS:
            raise ValueError(f"checkpoint: a tensor is named {shown(match[0])}...; expected at most {_MOST_PARTS}")
    return [int(match[1] or default) for match in matches]


def listing(names: list[str]) -> str:
    """The first names, for a message."""
    listed = ", ".join(str(name)[:100] for name in names[:_NAMES_SHOWN])
    return listed if len(names) <= _NAMES_SHOWN else f"{listed} and {len(names) - _NAMES_SHOWN} more"
