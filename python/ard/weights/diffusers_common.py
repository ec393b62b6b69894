"""What diffusers' transformer classes have in common: blocks and their names, a config's sizes, what is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ard.models.config import ModelConfig
from ard.models.families import make_teacher
from ard.storage.files import shown
from ard.weights.names import listing, positions_of

Parts = dict[str, list[str]]  # our name -> theirs, whose tensors stacked along dim 0 are ours
Encode = Callable[[Mapping[str, Tensor], Any], tuple[dict[str, Tensor], dict]]
Decode = Callable[[Mapping[str, Tensor], Mapping], tuple[dict[str, Tensor], Any]]

NORM_EPS = 1e-6
SIZES = ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size")
FIXED = {  # config keys with the one value that our models compute
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
_FREQUENCY_SIZE, _MLP_RATIO = 256, 4
_PATCHES = "pos_embed.proj.weight"
_LARGEST_SIZE, _LARGEST_POSITIONS = 1 << 20, 1 << 25  # of a config; of the computed table, 160 x 160 for DiT-XL


@dataclass(frozen=True)
class DiffusersClass:
    """One of their classes, for the models of one family. norm_type: by which the older class for all tells it.

    encode: public state and config -> (tensors, content of config.json); decode: the way back. Both copy, are strict in
    names and shapes, and raise ValueError.
    """

    name: str
    family: str
    norm_type: str
    encode: Encode
    decode: Decode


def parts_of(layers: Mapping[str, list[str]]) -> Parts:
    """Weights and biases of layers."""
    return {
        f"{name}.{kind}": [f"{part}.{kind}" for part in parts]
        for name, parts in layers.items()
        for kind in ("weight", "bias")
    }


def block_layers(i: int) -> Parts:
    """Self-attention and MLP of block i."""
    ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
    return {
        ours + "attn.qkv": [f"{theirs}attn1.to_{part}" for part in "qkv"],
        ours + "attn.proj": [theirs + "attn1.to_out.0"],
        ours + "mlp.fc1": [theirs + "ff.net.0.proj"],
        ours + "mlp.fc2": [theirs + "ff.net.2"],
    }


def divided(state: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Their tensors of ours, sharing no memory with them."""
    pairs = ((theirs, state[name].detach().chunk(len(theirs))) for name, theirs in parts.items())
    return {part: own(tensor) for theirs, tensors in pairs for part, tensor in zip(theirs, tensors, strict=True)}


def joined(tensors: Mapping[str, Tensor], parts: Parts) -> dict[str, Tensor]:
    """Our tensors of theirs, sharing no memory with them."""
    return {name: torch.cat([tensors[part].detach() for part in theirs]) for name, theirs in parts.items()}


def part_shapes(shapes: Mapping[str, tuple[int, ...]], parts: Parts) -> dict[str, tuple[int, ...]]:
    """Shapes of their tensors."""
    return {
        part: (shapes[name][0] // len(theirs), *shapes[name][1:]) for name, theirs in parts.items() for part in theirs
    }


def public_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Of a teacher's tensors."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in make_teacher(config).state_dict().items()}


def require_keys(content: Mapping, sizes: Iterable[str], fixed: Mapping[str, Any]) -> None:
    """Raise unless a config.json has these sizes, and these keys with these values."""
    if missing := [key for key in (*sizes, *fixed) if key not in content]:
        raise ValueError(f"from_diffusers: config lacks {listing(missing)}")
    for key, value in fixed.items():
        if content[key] != value:
            raise ValueError(f"from_diffusers: {key} is {shown(content[key])}; expected {value!r}")
    for key in sizes:
        if type(content[key]) is not int or not 1 <= content[key] <= _LARGEST_SIZE:
            found = shown(content[key])
            raise ValueError(
                f"from_diffusers: {key} is {found}; expected an integer of at least 1 and at most {_LARGEST_SIZE}"
            )


def shared_sizes(content: Mapping) -> dict[str, Any]:
    """Fields of our config, from a config.json whose `SIZES` have been checked."""
    in_channels, out_channels = content["in_channels"], content.get("out_channels")
    out_channels = in_channels if out_channels is None else out_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"from_diffusers: out_channels is {shown(out_channels)}; expected {in_channels} (epsilon) or "
            f"{2 * in_channels} (epsilon and sigma)"
        )
    return {
        "input_size": content["sample_size"],
        "patch_size": content["patch_size"],
        "in_channels": in_channels,
        "hidden_size": content["num_attention_heads"] * content["attention_head_dim"],
        "depth": content["num_layers"],
        "num_heads": content["num_attention_heads"],
        "mlp_ratio": float(_MLP_RATIO),
        "learn_sigma": out_channels == 2 * in_channels,
        "frequency_embedding_size": _FREQUENCY_SIZE,
    }


def shared_content(config: ModelConfig) -> dict[str, Any]:
    """Keys of config.json that every class has. Raises ValueError for what none of them can express: a latent that is
    not square, mlp_ratio other than 4, frequency_embedding_size other than 256."""
    height, width = config.input_hw
    if height != width:
        raise ValueError(f"to_diffusers: input_size is {config.input_hw}; expected a square latent")
    if config.mlp_hidden_size != _MLP_RATIO * config.hidden_size:
        raise ValueError(f"to_diffusers: mlp_ratio is {config.mlp_ratio}; expected {_MLP_RATIO}")
    if config.frequency_embedding_size != _FREQUENCY_SIZE:
        raise ValueError(
            f"to_diffusers: frequency_embedding_size is {config.frequency_embedding_size}; expected {_FREQUENCY_SIZE}"
        )
    return {
        **FIXED,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": height,
        "patch_size": config.patch_size,
        "norm_eps": NORM_EPS,
    }


def require_sizes(tensors: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Sizes that the tensors bear out, before a model of these sizes is built on shapes alone."""
    if config.depth > len(tensors):
        raise ValueError(
            f"from_diffusers: num_layers is {config.depth}; expected at most one for each of {len(tensors)} tensors"
        )
    if config.tokens * config.hidden_size > _LARGEST_POSITIONS:
        raise ValueError(
            f"from_diffusers: sample_size is {config.input_size}: {config.tokens} x {config.hidden_size} positions; "
            f"expected at most {_LARGEST_POSITIONS} numbers"
        )
    expected = (config.hidden_size, config.in_channels, config.patch_size, config.patch_size)
    require_tensors("from_diffusers", {k: v for k, v in tensors.items() if k == _PATCHES}, {_PATCHES: expected})


def require_tensors(caller: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise unless `tensors` has exactly these names and shapes, in one floating dtype."""
    problems = []
    if missing := [name for name in shapes if name not in tensors]:
        problems.append(f"missing keys {listing(missing)}")
    if unexpected := [name for name in tensors if name not in shapes]:
        problems.append(f"unexpected keys {listing(unexpected)}")
    if wrong := [
        f"{name}: expected {shape}, got {tuple(tensors[name].shape)}"
        for name, shape in shapes.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]:
        problems.append(f"wrong shapes [{listing(wrong)}]")
    dtypes = sorted({str(tensor.dtype) for tensor in tensors.values()})
    if len(dtypes) > 1 or not all(tensor.is_floating_point() for tensor in tensors.values()):
        problems.append(f"dtypes are [{', '.join(dtypes)}], expected one floating dtype")
    if problems:
        raise ValueError(f"{caller}: " + "; ".join(problems))


def positions(config: ModelConfig, like: Tensor) -> Tensor:
    """The table (1, L, C) as their class computes it, in float32, then cast to the dtype of `like`."""
    return positions_of(config)[None].float().to(like.device, like.dtype)


def require_positions(pos_embed: Tensor, config: ModelConfig) -> None:
    """Raise unless these are the positions that their class computes, but for what averaging them has rounded."""
    # As DiT's trainer does, see `PatchTrunk.check_buffers`; and entries are at most 1, so an eps covers their dtype's.
    tolerance = 1e-3 + torch.finfo(pos_embed.dtype).eps
    difference = float((pos_embed.detach().cpu().double() - positions_of(config)[None]).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"to_diffusers: pos_embed differs by {difference:.3g} from the sin-cos table; expected at most "
            f"{tolerance:.3g}, as diffusers computes the positions and stores none"
        )


def own(tensor: Tensor) -> Tensor:
    """A contiguous copy."""
    return tensor.clone(memory_format=torch.contiguous_format)
