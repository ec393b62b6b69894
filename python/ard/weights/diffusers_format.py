"""Weights in the folder format of diffusers' `DiTTransformer2DModel`: config.json + safetensors. Needs no diffusers.

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

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ard.models.dit import DiT, DiTConfig
from ard.models.layers import sincos_position_embedding
from ard.models.student import final_layer_name
from ard.storage.files import atomic_folder, json_text, parse_json, read_tensors, shown, write_json, write_tensors
from ard.weights.names import listing

WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
INDEX_NAME = "diffusion_pytorch_model.safetensors.index.json"
CLASS_NAME = "DiTTransformer2DModel"
# diffusers before 0.28 had one class for all; the published DiT folders still name it.
_LEGACY_CLASS_NAME = "Transformer2DModel"

_FREQUENCY_SIZE = 256
_MLP_RATIO = 4
_NORM_EPS = 1e-6
_DEFAULT_NORM_EPS = 1e-5
_FIXED = {  # config keys with the one value that our model computes
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
_SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "num_layers",
    "sample_size",
    "patch_size",
    "num_embeds_ada_norm",
)
_PATCHES = "pos_embed.proj.weight"
_LARGEST_SIZE, _LARGEST_POSITIONS = 1 << 20, 1 << 25  # of a config; of the computed table, 160 x 160 for DiT-XL


def to_diffusers(state: Mapping[str, Tensor], config: DiTConfig) -> tuple[dict[str, Tensor], dict]:
    """(tensors, content of config.json) of a `DiTTransformer2DModel` with the weights of a teacher `state`.

    state: the public DiT names, all in one floating dtype, which is kept; the result shares no memory with it.
    Raises ValueError for a state that does not fit `config` and for what their class cannot express: a latent that is
    not square, mlp_ratio other than 4, frequency_embedding_size other than 256, positions other than the sin-cos table.
    """
    height, width = config.input_hw
    if height != width:
        raise ValueError(f"to_diffusers: input_size is {config.input_hw}; expected a square latent")
    if config.mlp_hidden_size != _MLP_RATIO * config.hidden_size:
        raise ValueError(f"to_diffusers: mlp_ratio is {config.mlp_ratio}; expected {_MLP_RATIO}")
    if config.frequency_embedding_size != _FREQUENCY_SIZE:
        raise ValueError(
            f"to_diffusers: frequency_embedding_size is {config.frequency_embedding_size}; expected {_FREQUENCY_SIZE}"
        )
    _require_tensors("to_diffusers", state, _public_shapes(config))
    _require_sincos(state["pos_embed"], config)
    tensors = {}
    for name, parts in _parts(config.depth).items():
        for part, tensor in zip(parts, state[name].detach().chunk(len(parts)), strict=True):
            tensors[part] = _own(tensor)
    for name, copies in _copies(config.depth).items():
        tensors.update({copy: _own(state[name].detach()) for copy in copies})
    content = {
        "_class_name": CLASS_NAME,
        **_FIXED,
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.head_dim,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "num_layers": config.depth,
        "sample_size": height,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": _NORM_EPS,
    }
    return tensors, content


def from_diffusers(tensors: Mapping[str, Tensor], config_json: Mapping) -> tuple[dict[str, Tensor], DiTConfig]:
    """(state with the public DiT names, its config), for `ard.checkpoint.load_teacher(state, num_heads=...)`.

    tensors: state dict of a `DiTTransformer2DModel`, all in one floating dtype, which is kept; config_json: its
    config.json. The result shares no memory with `tensors`. `pos_embed` is the sin-cos table in float32, as their class
    computes it, cast to the dtype.
    norm_eps may be 1e-6 or 1e-5: the latter is their default, with which the release's weights were published although
    they were trained with 1e-6. Our model computes with 1e-6 either way.
    Raises ValueError for another class or architecture, missing, unexpected and misshapen tensors, and blocks whose
    copies of the embedders differ.
    """
    config = _read_config(config_json)
    _require_sizes(tensors, config)
    shapes = _public_shapes(config)
    parts_of, copies_of = _parts(config.depth), _copies(config.depth)
    expected = {copy: shapes[name] for name, copies in copies_of.items() for copy in copies}
    for name, parts in parts_of.items():
        rows, *others = shapes[name]
        expected.update({part: (rows // len(parts), *others) for part in parts})
    _require_tensors("from_diffusers", tensors, expected)
    for copies in copies_of.values():
        for block, copy in enumerate(copies):
            if not _same_bits(tensors[copy], tensors[copies[0]]):
                raise ValueError(
                    f"from_diffusers: {copy} differs from block 0's copy; expected the same embedder in every block, "
                    f"got another one in block {block}"
                )
    state = {name: torch.cat([tensors[part].detach() for part in parts]) for name, parts in parts_of.items()}
    state.update({name: _own(tensors[copies[0]].detach()) for name, copies in copies_of.items()})
    state["pos_embed"] = _positions(config, next(iter(state.values())))
    return {name: state[name] for name in shapes}, config


def save_diffusers(folder: str | os.PathLike, state: Mapping[str, Tensor], config: DiTConfig) -> None:
    """Write a folder that `DiTTransformer2DModel.from_pretrained` reads; it appears whole or not at all.

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


def load_diffusers(folder: str | os.PathLike) -> tuple[dict[str, Tensor], DiTConfig]:
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
        norm.eps = _NORM_EPS


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


def _parts(depth: int) -> dict[str, list[str]]:
    """Our name -> their names, whose tensors stacked along dim 0 are ours."""
    layers = {
        "x_embedder.proj": ["pos_embed.proj"],
        "final_layer.adaLN_modulation.1": ["proj_out_1"],
        "final_layer.linear": ["proj_out_2"],
    }
    for i in range(depth):
        ours, theirs = f"blocks.{i}.", f"transformer_blocks.{i}."
        layers[ours + "attn.qkv"] = [f"{theirs}attn1.to_{part}" for part in "qkv"]
        layers[ours + "attn.proj"] = [theirs + "attn1.to_out.0"]
        layers[ours + "mlp.fc1"] = [theirs + "ff.net.0.proj"]
        layers[ours + "mlp.fc2"] = [theirs + "ff.net.2"]
        layers[ours + "adaLN_modulation.1"] = [theirs + "norm1.linear"]
    return {
        f"{name}.{kind}": [f"{part}.{kind}" for part in parts]
        for name, parts in layers.items()
        for kind in ("weight", "bias")
    }


def _copies(depth: int) -> dict[str, list[str]]:
    """Our name -> their names, one in each block, all with the same content."""
    embedders = {"y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight"}
    for kind in ("weight", "bias"):
        embedders[f"t_embedder.mlp.0.{kind}"] = f"timestep_embedder.linear_1.{kind}"
        embedders[f"t_embedder.mlp.2.{kind}"] = f"timestep_embedder.linear_2.{kind}"
    return {
        name: [f"transformer_blocks.{i}.norm1.emb.{copy}" for i in range(depth)] for name, copy in embedders.items()
    }


def _read_config(content: Mapping) -> DiTConfig:
    class_name = content.get("_class_name")
    if class_name not in (CLASS_NAME, _LEGACY_CLASS_NAME):
        raise ValueError(f"from_diffusers: _class_name is {shown(class_name)}; expected {CLASS_NAME!r}")
    if missing := [key for key in (*_SIZES, *_FIXED) if key not in content]:
        raise ValueError(f"from_diffusers: config lacks {listing(missing)}")
    for key, value in _FIXED.items():
        if content[key] != value:
            raise ValueError(f"from_diffusers: {key} is {shown(content[key])}; expected {value!r}")
    for key in _SIZES:
        if type(content[key]) is not int or not 1 <= content[key] <= _LARGEST_SIZE:
            found = shown(content[key])
            raise ValueError(
                f"from_diffusers: {key} is {found}; expected an integer of at least 1 and at most {_LARGEST_SIZE}"
            )
    norm_eps = content.get("norm_eps", _DEFAULT_NORM_EPS)
    if norm_eps not in (_NORM_EPS, _DEFAULT_NORM_EPS):
        raise ValueError(f"from_diffusers: norm_eps is {shown(norm_eps)}; expected {_NORM_EPS} or {_DEFAULT_NORM_EPS}")
    in_channels = content["in_channels"]
    out_channels = content.get("out_channels")
    out_channels = in_channels if out_channels is None else out_channels
    if out_channels not in (in_channels, 2 * in_channels):
        raise ValueError(
            f"from_diffusers: out_channels is {shown(out_channels)}; expected {in_channels} (epsilon) or "
            f"{2 * in_channels} (epsilon and sigma)"
        )
    return DiTConfig(
        input_size=content["sample_size"],
        patch_size=content["patch_size"],
        in_channels=in_channels,
        hidden_size=content["num_attention_heads"] * content["attention_head_dim"],
        depth=content["num_layers"],
        num_heads=content["num_attention_heads"],
        mlp_ratio=float(_MLP_RATIO),
        num_classes=content["num_embeds_ada_norm"],
        learn_sigma=out_channels == 2 * in_channels,
        frequency_embedding_size=_FREQUENCY_SIZE,
    )


def _require_sizes(tensors: Mapping[str, Tensor], config: DiTConfig) -> None:
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
    _require_tensors("from_diffusers", {k: v for k, v in tensors.items() if k == _PATCHES}, {_PATCHES: expected})


def _public_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()}


def _require_tensors(caller: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
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


def _positions(config: DiTConfig, like: Tensor) -> Tensor:
    """The table (1, L, C) as their class computes it, in float32, then cast to the dtype of `like`."""
    return sincos_position_embedding(config.hidden_size, config.grid_hw)[None].float().to(like.device, like.dtype)


def _require_sincos(pos_embed: Tensor, config: DiTConfig) -> None:
    # Entries are at most 1, so one eps covers a value rounded twice; float64 states may hold float32 positions.
    tolerance = max(torch.finfo(pos_embed.dtype).eps, torch.finfo(torch.float32).eps)
    table = sincos_position_embedding(config.hidden_size, config.grid_hw)[None]
    difference = float((pos_embed.detach().cpu().double() - table).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"to_diffusers: pos_embed differs by {difference:.3g} from the sin-cos table; expected at most "
            f"{tolerance:.3g}, as diffusers computes the positions and stores none"
        )


def _own(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach().contiguous().view(torch.uint8), b.detach().contiguous().view(torch.uint8))
