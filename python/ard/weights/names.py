"""The names of public checkpoints, by family, and the sizes that their tensors show."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from ard.models.config import ModelConfig
from ard.models.dit import PatchTrunk
from ard.models.families import FAMILIES
from ard.storage.files import shown
from ard_kernels.common.arguments import described

_NAMES_SHOWN = 8
_MOST_PARTS = 1000  # blocks, and final layers: a teacher has no more steps

Sizes = dict[str, Any]
InputSize = int | tuple[int, int] | None

# Fields of a config that no tensor shows, beside its heads and the latent of a grid that is not square.
UNSEEN: dict[str, tuple[str, ...]] = {"pixart": ("position_scale", "position_base", "caption_tokens")}


def public_state(state: Mapping[str, Tensor], family: str) -> dict[str, Tensor]:
    """The tensors of the model itself: REPA's files hold the projectors of its training loss beside it.

    Raises ValueError for such a file as a "sit", which would be walked the wrong way.
    """
    projectors = {name for name in state if name.startswith("projectors.")}
    if projectors and family == "sit":
        raise ValueError("checkpoint: has projectors.*, as REPA's; expected family='repa', whose time runs down")
    return {name: tensor for name, tensor in state.items() if family != "repa" or name not in projectors}


def unseen_of(config: ModelConfig) -> dict[str, Any]:
    """What `infer_config` takes as ``unseen``, of this config."""
    return {name: getattr(config, name) for name in UNSEEN.get(config.family, ())}


def infer_config(
    state: Mapping[str, Tensor],
    *,
    num_heads: int,
    family: str = "dit",
    input_size: InputSize = None,
    **unseen: Any,
) -> ModelConfig:
    """The family's config whose tensors have the sizes found in `state`. unseen: fields of `UNSEEN`, by name."""
    if family not in SIZES:
        raise ValueError(f"family: got {described(family)}; expected one of {', '.join(SIZES)}, whose names are known")
    known = UNSEEN.get(family, ())
    for name in unseen:
        if name not in known:
            nearest = difflib.get_close_matches(name[:80], known, n=1, cutoff=0.0)
            expected = f"did you mean {nearest[0]!r}?" if nearest else "expected no more settings"
            raise ValueError(f"settings: got {described(name)} for family={family!r}; {expected}")
    return FAMILIES[family].config(**SIZES[family](state, num_heads, input_size, **unseen))


def positions_of(config: ModelConfig) -> Tensor:
    """The table (L, C) in float64 of a family with fixed positions, without its model."""
    with torch.device("meta"):
        trunk = cast("PatchTrunk", FAMILIES[config.family].trunk(replace(config, depth=1)))
    return trunk.positions()


def with_positions(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """`state` with pos_embed computed in float32, then in the state's dtype, where PixArt's files have none that fits.

    (Their models for several sizes compute it, and keep what smaller ones had.)
    """
    fits = "pos_embed" in state and state["pos_embed"].shape[1] == config.tokens
    if config.family != "pixart" or fits:
        return dict(state)
    like = state["x_embedder.proj.weight"]
    return {**state, "pos_embed": positions_of(config)[None].float().to(like.device, like.dtype)}


def _require_ranks(state: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
    """Raise unless these tensors are there, with so many dimensions and none of them empty."""
    if missing := [name for name in ranks if name not in state]:
        raise ValueError(f"checkpoint: missing keys {listing(missing)}; expected the public parameter names")
    for name, rank in ranks.items():
        if state[name].ndim != rank:
            raise ValueError(f"checkpoint: {name} has shape {tuple(state[name].shape)}; expected {rank} dimensions")
        if 0 in state[name].shape:
            raise ValueError(f"checkpoint: {name} has shape {tuple(state[name].shape)}; expected elements")


def _shared_sizes(state: Mapping[str, Tensor], num_heads: int) -> Sizes:
    """What every family shows alike."""
    hidden_size, in_channels, patch_size = state["x_embedder.proj.weight"].shape[:3]
    return {
        "patch_size": patch_size,
        "in_channels": in_channels,
        "hidden_size": hidden_size,
        "depth": 1 + max(numbers(r"blocks\.(\d+)\.", state)),
        "num_heads": num_heads,
        "frequency_embedding_size": state["t_embedder.mlp.0.weight"].shape[1],
    }


def _input_size(pos_embed: Tensor, sizes: Sizes, input_size: InputSize) -> int | tuple[int, int]:
    """``input_size``, or else that of the square grid of ``pos_embed``."""
    tokens, channels = pos_embed.shape[1:]
    if channels != sizes["hidden_size"]:
        raise ValueError(
            f"checkpoint: pos_embed has {channels} channels; expected {sizes['hidden_size']}, as x_embedder.proj"
        )
    side = math.isqrt(tokens)
    if input_size is None and side * side != tokens:
        raise ValueError(
            f"checkpoint: pos_embed has {tokens} tokens, not a square grid; give input_size=(height, width)"
        )
    return side * sizes["patch_size"] if input_size is None else input_size


def _tokens(input_size: int | tuple[int, int], patch_size: int) -> int:
    height, width = (input_size,) * 2 if isinstance(input_size, int) else input_size
    return (height // patch_size) * (width // patch_size)


def _class_conditional(state: Mapping[str, Tensor], num_heads: int, input_size: InputSize, mlp: str) -> Sizes:
    """What DiT, SiT and LightningDiT share; ``mlp``: the first linear of a block's MLP."""
    ranks = {
        "pos_embed": 3,
        "x_embedder.proj.weight": 4,
        "t_embedder.mlp.0.weight": 2,
        "y_embedder.embedding_table.weight": 2,
        f"blocks.0.mlp.{mlp}.weight": 2,
        "final_layer.linear.weight": 2,
    }
    _require_ranks(state, ranks)
    sizes, pos_embed = _shared_sizes(state, num_heads), state["pos_embed"]
    sizes["input_size"] = _input_size(pos_embed, sizes, input_size)
    sizes["num_classes"] = state["y_embedder.embedding_table.weight"].shape[0] - 1
    if (tokens := _tokens(sizes["input_size"], sizes["patch_size"])) != pos_embed.shape[1]:
        raise ValueError(
            f"checkpoint: pos_embed: expected {(1, tokens, sizes['hidden_size'])} for input_size={input_size}, "
            f"got {tuple(pos_embed.shape)}"
        )
    return sizes


def _plain_mlp_and_sigma(state: Mapping[str, Tensor], sizes: Sizes) -> Sizes:
    """mlp_ratio and learn_sigma of DiT, and of what took its MLP and final linear."""
    mlp_hidden_size = state["blocks.0.mlp.fc1.weight"].shape[0]
    out_features = state["final_layer.linear.weight"].shape[0]
    plain = sizes["in_channels"] * sizes["patch_size"] ** 2
    if out_features not in (plain, 2 * plain):
        raise ValueError(
            f"checkpoint: final_layer.linear.weight has {out_features} rows; expected {plain} (epsilon) or "
            f"{2 * plain} (epsilon and sigma) for {sizes['in_channels']} channels and patch {sizes['patch_size']}"
        )
    return {"mlp_ratio": _ratio(mlp_hidden_size, sizes["hidden_size"]), "learn_sigma": out_features == 2 * plain}


def _dit(state: Mapping[str, Tensor], num_heads: int, input_size: InputSize) -> Sizes:
    sizes = _class_conditional(state, num_heads, input_size, "fc1")
    return {**sizes, **_plain_mlp_and_sigma(state, sizes)}


def _pixart(state: Mapping[str, Tensor], num_heads: int, input_size: InputSize, **unseen: Any) -> Sizes:
    null = "y_embedder.y_embedding"
    ranks = {
        "x_embedder.proj.weight": 4,
        "t_embedder.mlp.0.weight": 2,
        "y_embedder.y_proj.fc1.weight": 2,
        "blocks.0.mlp.fc1.weight": 2,
        "final_layer.linear.weight": 2,
    }
    _require_ranks(state, ranks | {name: rank for name, rank in (("pos_embed", 3), (null, 2)) if name in state})
    sizes = {**_shared_sizes(state, num_heads), **unseen}
    if "pos_embed" in state:
        sizes["input_size"] = _input_size(state["pos_embed"], sizes, input_size)
        fits = _tokens(sizes["input_size"], sizes["patch_size"]) == state["pos_embed"].shape[1]
    elif input_size is None:
        raise ValueError("checkpoint: has no pos_embed, which would show the grid; give input_size")
    else:
        sizes["input_size"], fits = input_size, False
    if not fits and "position_scale" not in unseen:
        raise ValueError("checkpoint: has no pos_embed of this grid, to compare positions with; give position_scale")
    if null in state:
        shown = state[null].shape[0]
        if unseen.get("caption_tokens", shown) != shown:
            raise ValueError(
                f"checkpoint: {null} has {shown} tokens; expected caption_tokens={unseen['caption_tokens']}"
            )
        sizes["caption_tokens"] = shown
    elif "caption_tokens" not in unseen:
        raise ValueError(f"checkpoint: has no {null}, which would show the length of a text; give caption_tokens")
    sizes["caption_channels"] = state["y_embedder.y_proj.fc1.weight"].shape[1]
    sizes["learned_null"] = null in state
    sizes["size_conditions"] = any(name.startswith("csize_embedder.") for name in state)
    return {**sizes, **_plain_mlp_and_sigma(state, sizes)}


def _lightningdit(state: Mapping[str, Tensor], num_heads: int, input_size: InputSize) -> Sizes:
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


SIZES: dict[str, Callable[..., Sizes]] = {
    "dit": _dit,
    "sit": _dit,
    "repa": _dit,
    "lightningdit": _lightningdit,
    "pixart": _pixart,
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
