"""Weights of DiT as diffusers' `DiTTransformer2DModel` has them. Needs no diffusers.

Ours (the DiT release's names)                     theirs
    x_embedder.proj                                pos_embed.proj
    t_embedder.mlp.{0,2}                           transformer_blocks.i.norm1.emb.timestep_embedder.linear_{1,2}, all i
    y_embedder.embedding_table                     transformer_blocks.i.norm1.emb.class_embedder.embedding_table, all i
    blocks.i.attn.qkv                              transformer_blocks.i.attn1.to_{q,k,v}
    blocks.i.attn.proj                             transformer_blocks.i.attn1.to_out.0
    blocks.i.mlp.{fc1,fc2}                         transformer_blocks.i.ff.net.{0.proj,2}
    blocks.i.adaLN_modulation.1                    transformer_blocks.i.norm1.linear
    final_layer.{adaLN_modulation.1,linear}        proj_out_1, proj_out_2
    pos_embed                                      computed, not stored

No tensor is changed on the way: the orders of (shift, scale, gate), of cos and sin, and of patch pixels are the same.
Two numbers of their class are not weights and differ from the release, see `use_release_arithmetic`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ard.models.dit import DiTConfig
from ard.storage.files import shown
from ard.weights import diffusers_common as common

CLASS_NAME, NORM_TYPE = "DiTTransformer2DModel", "ada_norm_zero"
_DEFAULT_NORM_EPS = 1e-5
_FIXED = {"norm_type": NORM_TYPE, **common.FIXED}
_SIZES = (*common.SIZES, "num_embeds_ada_norm")


def encode(state: Mapping[str, Tensor], config: DiTConfig) -> tuple[dict[str, Tensor], dict]:
    """See `DiffusersClass`; refused: what `shared_content` refuses, and positions other than the sin-cos table."""
    own = {"_class_name": CLASS_NAME, "norm_type": NORM_TYPE, "num_embeds_ada_norm": config.num_classes}
    content = {**common.shared_content(config), **own}
    common.require_tensors("to_diffusers", state, common.public_shapes(config))
    common.require_positions(state["pos_embed"], config)
    tensors = common.divided(state, _parts(config.depth))
    for name, copies in _copies(config.depth).items():
        tensors.update({copy: common.own(state[name].detach()) for copy in copies})
    return tensors, content


def decode(tensors: Mapping[str, Tensor], content: Mapping) -> tuple[dict[str, Tensor], DiTConfig]:
    """See `DiffusersClass`.

    norm_eps may be 1e-6 or 1e-5: the latter is their default, with which the release's weights were published although
    they were trained with 1e-6. Our model computes with 1e-6 either way. Refused: blocks whose copies of the embedders
    differ.
    """
    common.require_keys(content, _SIZES, _FIXED)
    norm_eps = content.get("norm_eps", _DEFAULT_NORM_EPS)
    if norm_eps not in (common.NORM_EPS, _DEFAULT_NORM_EPS):
        raise ValueError(
            f"from_diffusers: norm_eps is {shown(norm_eps)}; expected {common.NORM_EPS} or {_DEFAULT_NORM_EPS}"
        )
    config = DiTConfig(**common.shared_sizes(content), num_classes=content["num_embeds_ada_norm"])
    common.require_sizes(tensors, config)
    shapes = common.public_shapes(config)
    parts, copies_of = _parts(config.depth), _copies(config.depth)
    expected = {copy: shapes[name] for name, copies in copies_of.items() for copy in copies}
    common.require_tensors("from_diffusers", tensors, expected | common.part_shapes(shapes, parts))
    for copies in copies_of.values():
        for block, copy in enumerate(copies):
            if not _same_bits(tensors[copy], tensors[copies[0]]):
                raise ValueError(
                    f"from_diffusers: {copy} differs from block 0's copy; expected the same embedder in every block, "
                    f"got another one in block {block}"
                )
    state = common.joined(tensors, parts)
    state.update({name: common.own(tensors[copies[0]].detach()) for name, copies in copies_of.items()})
    state["pos_embed"] = common.positions(config, state["x_embedder.proj.weight"])
    return {name: state[name] for name in shapes}, config


FORMAT = common.DiffusersClass(CLASS_NAME, "dit", NORM_TYPE, encode, decode)


def use_release_arithmetic(model: nn.Module) -> None:
    """Make a diffusers `DiTTransformer2DModel` compute, in place, what the DiT release and our model compute.

    Timestep features: their class takes the frequencies 10000^(-i / (half - 1)), half = 128; the release was trained
    with 10000^(-i / half). No config key sets it, and no change of weights undoes it: unchanged, their class agrees
    with the release at t = 0 only. LayerNorm before the MLP: eps 1e-6 in place of config's norm_eps.
    Raises ValueError for a model without such blocks.
    """
    try:
        blocks: Any = model.transformer_blocks
        places = [(block.norm1.emb.time_proj, block.norm3) for block in blocks]
        if any(not hasattr(projection, "downscale_freq_shift") for projection, _ in places):
            raise AttributeError("time_proj has no downscale_freq_shift")
    except AttributeError as error:
        raise ValueError(
            f"use_release_arithmetic: model is a {type(model).__name__}; expected a {CLASS_NAME} ({error})"
        ) from error
    for projection, norm in places:
        projection.downscale_freq_shift = 0
        norm.eps = common.NORM_EPS


def _parts(depth: int) -> common.Parts:
    layers = {
        "x_embedder.proj": ["pos_embed.proj"],
        "final_layer.adaLN_modulation.1": ["proj_out_1"],
        "final_layer.linear": ["proj_out_2"],
    }
    for i in range(depth):
        layers |= common.block_layers(i)
        layers[f"blocks.{i}.adaLN_modulation.1"] = [f"transformer_blocks.{i}.norm1.linear"]
    return common.parts_of(layers)


def _copies(depth: int) -> common.Parts:
    """Our name -> their names, one in each block, all with the same content."""
    embedders = {"y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight"}
    for kind in ("weight", "bias"):
        embedders[f"t_embedder.mlp.0.{kind}"] = f"timestep_embedder.linear_1.{kind}"
        embedders[f"t_embedder.mlp.2.{kind}"] = f"timestep_embedder.linear_2.{kind}"
    return {
        name: [f"transformer_blocks.{i}.norm1.emb.{copy}" for i in range(depth)] for name, copy in embedders.items()
    }


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))
