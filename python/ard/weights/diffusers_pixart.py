"""Weights of PixArt as diffusers' `PixArtTransformer2DModel` has them. Needs no diffusers.

Ours (PixArt's own names)                theirs
    x_embedder.proj                      pos_embed.proj
    t_embedder.mlp.{0,2}                 adaln_single.emb.timestep_embedder.linear_{1,2}
    csize_embedder.mlp.{0,2}             adaln_single.emb.resolution_embedder.linear_{1,2}, with size conditions
    ar_embedder.mlp.{0,2}                adaln_single.emb.aspect_ratio_embedder.linear_{1,2}, with size conditions
    t_block.1                            adaln_single.linear
    y_embedder.y_proj.{fc1,fc2}          caption_projection.linear_{1,2}
    y_embedder.y_embedding               none: a pipeline encodes a negative prompt instead
    blocks.i.attn.qkv                    transformer_blocks.i.attn1.to_{q,k,v}
    blocks.i.attn.proj                   transformer_blocks.i.attn1.to_out.0
    blocks.i.cross_attn.q_linear         transformer_blocks.i.attn2.to_q
    blocks.i.cross_attn.kv_linear        transformer_blocks.i.attn2.to_{k,v}
    blocks.i.cross_attn.proj             transformer_blocks.i.attn2.to_out.0
    blocks.i.mlp.{fc1,fc2}               transformer_blocks.i.ff.net.{0.proj,2}
    blocks.i.scale_shift_table           transformer_blocks.i.scale_shift_table
    final_layer.{linear,scale_shift_table}    proj_out, scale_shift_table
    pos_embed                            computed, not stored

No tensor is changed on the way, and their arithmetic is that of the release.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ard.common.settings import require_ranges
from ard.models.pixart import PixArtConfig
from ard.storage.files import shown
from ard.weights import diffusers_common as common

CLASS_NAME, NORM_TYPE = "PixArtTransformer2DModel", "ada_norm_single"
_FIXED = {"norm_type": NORM_TYPE, "norm_eps": common.NORM_EPS, **common.FIXED}
_SIZES = (*common.SIZES, "out_channels", "cross_attention_dim", "caption_channels")
_ABSENT_OR = {  # keys that not every version wrote, with the one value that our model computes
    "attention_type": "default",
    "upcast_attention": False,
    "double_self_attention": False,
    "only_cross_attention": False,
}
_NULL_TEXT = "y_embedder.y_embedding"
_SCALED_SIZE, _CONDITIONED_SIZE = 64, 128  # sample sizes by which their class decides what a config leaves open


def encode(state: Mapping[str, Tensor], config: PixArtConfig) -> tuple[dict[str, Tensor], dict]:
    """See `DiffusersClass`; the model's own null text has no place there. Refused: what `shared_content` refuses, and
    positions other than their class computes."""
    content = common.shared_content(config)
    if config.position_base not in (None, config.grid_hw[0]):
        raise ValueError(
            f"to_diffusers: position_base is {config.position_base}; expected none, or the {config.grid_hw[0]} rows"
        )
    common.require_tensors("to_diffusers", state, common.public_shapes(config))
    common.require_positions(state["pos_embed"], config)
    whole, scale = int(config.position_scale), config.position_scale
    own: dict[str, Any] = {
        "_class_name": CLASS_NAME,
        "norm_type": NORM_TYPE,
        "cross_attention_dim": config.hidden_size,
        "caption_channels": config.caption_channels,
        "interpolation_scale": whole if whole == scale else scale,
        "use_additional_conditions": config.size_conditions,
        "num_embeds_ada_norm": 1000,  # must be there; no tensor has this size
        "attention_type": "default",
    }
    return common.divided(state, _parts(config)), {**content, **own}


def decode(tensors: Mapping[str, Tensor], content: Mapping) -> tuple[dict[str, Tensor], PixArtConfig]:
    """See `DiffusersClass`. The number of text tokens is not said there: the config has PixArt-alpha's."""
    common.require_keys(content, _SIZES, _FIXED)
    common.require_keys(content, (), {key: value for key, value in _ABSENT_OR.items() if key in content})
    sizes = common.shared_sizes(content)
    if content["cross_attention_dim"] != sizes["hidden_size"]:
        found = content["cross_attention_dim"]
        raise ValueError(f"from_diffusers: cross_attention_dim is {found}; expected {sizes['hidden_size']}, the width")
    config = PixArtConfig(
        **sizes,
        caption_channels=content["caption_channels"],
        learned_null=False,
        size_conditions=_size_conditions(content),
        position_scale=_position_scale(content),
    )
    common.require_sizes(tensors, config)
    shapes, parts = common.public_shapes(config), _parts(config)
    common.require_tensors("from_diffusers", tensors, common.part_shapes(shapes, parts))
    state = common.joined(tensors, parts)
    state["pos_embed"] = common.positions(config, state["x_embedder.proj.weight"])
    return {name: state[name] for name in shapes}, config


FORMAT = common.DiffusersClass(CLASS_NAME, "pixart", NORM_TYPE, encode, decode)


def _size_conditions(content: Mapping) -> bool:
    said = content.get("use_additional_conditions")
    if said is not None and type(said) is not bool:
        raise ValueError(f"from_diffusers: use_additional_conditions is {shown(said)}; expected true, false or null")
    return content["sample_size"] == _CONDITIONED_SIZE if said is None else said


def _position_scale(content: Mapping) -> float:
    said, interval = content.get("interpolation_scale"), PixArtConfig.RANGES["position_scale"]
    if said is not None and type(said) not in (int, float):
        raise ValueError(f"from_diffusers: interpolation_scale is {shown(said)}; expected a number or null")
    require_ranges("from_diffusers", {"interpolation_scale": said}, {"interpolation_scale": interval})
    return float(max(content["sample_size"] // _SCALED_SIZE, 1)) if said is None else float(said)


def _parts(config: PixArtConfig) -> common.Parts:
    layers = {
        "x_embedder.proj": ["pos_embed.proj"],
        "t_block.1": ["adaln_single.linear"],
        "y_embedder.y_proj.fc1": ["caption_projection.linear_1"],
        "y_embedder.y_proj.fc2": ["caption_projection.linear_2"],
        "final_layer.linear": ["proj_out"],
    }
    embedders = {"t_embedder": "timestep_embedder"}
    if config.size_conditions:
        embedders |= {"csize_embedder": "resolution_embedder", "ar_embedder": "aspect_ratio_embedder"}
    for ours, theirs in embedders.items():
        for layer, number in ((0, 1), (2, 2)):
            layers[f"{ours}.mlp.{layer}"] = [f"adaln_single.emb.{theirs}.linear_{number}"]
    tables = {"final_layer.scale_shift_table": ["scale_shift_table"]}
    for i in range(config.depth):
        layers |= common.block_layers(i)
        ours, theirs = f"blocks.{i}.cross_attn.", f"transformer_blocks.{i}.attn2."
        layers[ours + "q_linear"] = [theirs + "to_q"]
        layers[ours + "kv_linear"] = [theirs + "to_k", theirs + "to_v"]
        layers[ours + "proj"] = [theirs + "to_out.0"]
        tables[f"blocks.{i}.scale_shift_table"] = [f"transformer_blocks.{i}.scale_shift_table"]
    return common.parts_of(layers) | tables
