"""PixArt's weights in and out: its own files, diffusers' folders, what neither shows, and `ard export`."""

from __future__ import annotations

import math
from dataclasses import asdict, replace

import pytest
import torch
from ard import ARDStudent
from ard.checkpoint import load_student, load_teacher
from ard.config.recipe import read_recipe
from ard.models.dit import DiT, DiTConfig
from ard.models.families import make_teacher
from ard.models.pixart import PixArt, PixArtConfig
from ard.storage import checkpoints
from ard.storage.files import write_tensors
from ard.weights.diffusers_format import from_diffusers, load_diffusers, save_diffusers, to_diffusers
from ard.weights.export import export_weights
from ard.weights.opened import open_source, open_student, open_teacher
from student.test_model import randomized

SQUARE = PixArtConfig(input_size=8, hidden_size=48, depth=2, num_heads=2, caption_channels=12, caption_tokens=5)
CONFIGS = {
    "alpha": SQUARE,
    "sized": replace(SQUARE, size_conditions=True, learn_sigma=False, learned_null=False, position_scale=2.0),
    "scaled": replace(SQUARE, position_scale=0.5, in_channels=3, patch_size=4, num_heads=3),
}
SIZED = CONFIGS["sized"]
NULL = "y_embedder.y_embedding"
HOW = {"num_heads": 2, "family": "pixart"}


def state_of(config, dtype=torch.float32):
    torch.manual_seed(0)  # of the null text, which is not trained
    return randomized(make_teacher(config)).to(dtype).state_dict()


def without(state, *names):
    return {name: tensor for name, tensor in state.items() if name not in names}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


def recipe_of(config):
    return replace(read_recipe("digits", ["student.history_layers=1"]), model=config)


# Their own files


def test_names_are_the_releases():
    shapes = {name: tuple(tensor.shape) for name, tensor in state_of(replace(SIZED, learned_null=True)).items()}
    C, E, N = 48, 12, 5
    expected = {
        "pos_embed": (1, 16, C), "x_embedder.proj.weight": (C, 4, 2, 2), "t_embedder.mlp.2.bias": (C,),
        "t_block.1.weight": (6 * C, C), "y_embedder.y_embedding": (N, E), "y_embedder.y_proj.fc1.weight": (C, E),
        "y_embedder.y_proj.fc2.weight": (C, C), "csize_embedder.mlp.0.weight": (C // 3, 256),
        "ar_embedder.mlp.2.weight": (C // 3, C // 3), "blocks.1.scale_shift_table": (6, C),
        "blocks.1.attn.qkv.weight": (3 * C, C), "blocks.1.attn.proj.weight": (C, C),
        "blocks.1.cross_attn.q_linear.weight": (C, C), "blocks.1.cross_attn.kv_linear.bias": (2 * C,),
        "blocks.1.cross_attn.proj.weight": (C, C), "blocks.1.mlp.fc1.weight": (4 * C, C),
        "final_layer.linear.weight": (16, C), "final_layer.scale_shift_table": (2, C),
    }  # fmt: skip
    assert {name: shapes.get(name) for name in expected} == expected
    assert not [name for name in shapes if "norm" in name or "adaLN" in name]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_the_release_loads_strictly(name, tmp_path):
    config = CONFIGS[name]
    state = state_of(config, torch.float16)
    torch.save({"state_dict": state_of(config), "state_dict_ema": state, "epoch": 3}, tmp_path / "PixArt.pth")
    how = {**HOW, "num_heads": config.num_heads, "position_scale": config.position_scale}
    loaded = load_teacher(tmp_path / "PixArt.pth", **how, **({} if config.learned_null else {"caption_tokens": 5}))
    assert type(loaded) is PixArt and loaded.config == config
    assert_same(loaded.state_dict(), state)


def test_the_weights_that_are_not_averaged_are_taken_where_there_are_no_others(tmp_path):
    torch.save({"state_dict": state_of(SQUARE)}, tmp_path / "PixArt.pth")
    assert_same(load_teacher(tmp_path / "PixArt.pth", **HOW).state_dict(), state_of(SQUARE))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("found", [None, 9, 64], ids=["none", "smaller", "larger"])
def test_positions_that_a_file_lacks_are_computed(found, dtype):
    state = state_of(SIZED, dtype)
    expected = state["pos_embed"].clone()
    if found is None:
        del state["pos_embed"]
    else:
        state["pos_embed"] = torch.zeros(1, found, 48, dtype=dtype)
    how = {**HOW, "input_size": 8, "caption_tokens": 5}
    loaded = load_teacher(state, **how, position_scale=2.0)
    assert loaded.config == SIZED and torch.equal(loaded.pos_embed, expected) and loaded.pos_embed.dtype == dtype
    with pytest.raises(ValueError, match=r"has no pos_embed of this grid, to compare positions with; give position_sc"):
        load_teacher(state, **how)
    student = load_student(state, **how, history_layers=1, position_scale=2.0)
    assert torch.equal(student.pos_embed, expected)


def test_positions_that_a_file_has_are_kept_and_compared():
    state = state_of(SIZED)
    state["pos_embed"] = state["pos_embed"] + 3e-6  # computed in another way
    how = {**HOW, "caption_tokens": 5}
    assert torch.equal(load_teacher(state, **how, position_scale=2.0).pos_embed, state["pos_embed"])
    with pytest.raises(
        ValueError, match=r"load_teacher: pos_embed differs by .* \(4, 4\) tokens with position_scale=1$"
    ):
        load_teacher(state, **how)
    with pytest.raises(ValueError, match=r"pos_embed differs by .* with position_scale=2"):
        load_teacher(state, **how, position_scale=2.0, position_base=5)
    state["pos_embed"][0, 3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"pos_embed differs by nan"):
        load_teacher(state, **how, position_scale=2.0)


@pytest.mark.parametrize(
    "edit, more, message",
    [
        (lambda s: without(s, "pos_embed"), {}, r"has no pos_embed, which would show the grid; give input_size"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][:, :15]}, {}, r"15 tokens, not a square grid; give input_size"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][..., :47]}, {}, r"pos_embed has 47 channels; expected 48"),
        (lambda s: {**s, "pos_embed": s["pos_embed"][0]}, {}, r"pos_embed has shape \(16, 48\); expected 3 dimensions"),
        (lambda s: without(s, NULL), {}, rf"has no {NULL}, which would show the length of a text; give caption_tokens"),
        (dict, {"caption_tokens": 6}, rf"{NULL} has 5 tokens; expected caption_tokens=6"),
        (lambda s: {**s, NULL: s[NULL][:, :11]}, {}, rf"{NULL}: expected \(5, 12\) floating point, got \(5, 11\)"),
        (lambda s: {**s, NULL: s[NULL][:0]}, {}, rf"{NULL} has shape \(0, 12\); expected elements"),
        (lambda s: without(s, "blocks.1.scale_shift_table"), {}, r"missing keys blocks\.1\.scale_shift_table"),
        (
            lambda s: without(s, "t_embedder.mlp.0.weight"),
            {},
            r"missing keys t_embedder\.mlp\.0\.weight; expected the p",
        ),
        (lambda s: {**s, "blocks.0.attn.sr.weight": s["t_block.1.bias"]}, {}, r"unexpected keys blocks\.0\.attn\.sr"),
        (
            lambda s: {**s, "csize_embedder.mlp.0.bias": s["t_block.1.bias"]},
            {},
            r"missing keys csize_embedder\.mlp\.0\.w",
        ),
        (
            lambda s: {**s, "t_block.1.bias": s["t_block.1.bias"].int()},
            {},
            r"t_block\.1\.bias: expected .*torch\.int32",
        ),
        (lambda s: {**s, "t_block.1.bias": s["t_block.1.bias"][1:]}, {}, r"t_block\.1\.bias: expected \(288,\)"),
        (dict, {"position_scale": math.nan}, r"position_scale is nan; expected within \(0, 64\]"),
        (dict, {"caption_tokens": 0}, r"expected caption_tokens=0"),
        (dict, {"positon_scale": 1.0}, r"got 'positon_scale' for family='pixart'; did you mean 'position_scale'\?"),
        (dict, {"num_heads": 5}, r"expected a multiple of num_heads=5"),
    ],
)
def test_other_files_and_settings_are_refused(edit, more, message):
    with pytest.raises(ValueError, match=message):
        load_teacher(edit(state_of(SQUARE)), **{**HOW, **more})


def test_families_whose_tensors_show_all_take_no_more_settings():
    config = DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2)
    state = make_teacher(config).state_dict()
    with pytest.raises(ValueError, match=r"got 'position_scale' for family='dit'; expected no more settings"):
        load_teacher(state, num_heads=2, position_scale=1.0)
    with pytest.raises(ValueError, match=r"missing keys y_embedder\.y_proj\.fc1\.weight; expected the public par"):
        load_teacher(state, **HOW)


def test_a_students_public_names(tmp_path):
    student = randomized(ARDStudent(SIZED, steps=3, history_layers=1))
    write_tensors(tmp_path / "student.safetensors", student.state_dict())
    path, more = tmp_path / "student.safetensors", {"position_scale": 2.0, "caption_tokens": 5}
    loaded = load_student(path, **HOW, history_layers=1, **more)
    assert loaded.config == SIZED and loaded.settings == student.settings
    assert_same(loaded.state_dict(), student.state_dict())
    with pytest.raises(ValueError, match=r"did you mean 'caption_tokens'"):
        load_student(path, **HOW, history_layers=1, caption_token=5)


# diffusers' folders


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_names_shapes_and_bits_both_ways(name, dtype):
    diffusers = pytest.importorskip("diffusers")
    config, state = CONFIGS[name], state_of(CONFIGS[name], dtype)
    tensors, content = to_diffusers(state, config)
    with torch.device("meta"):
        expected = diffusers.PixArtTransformer2DModel.from_config(content).state_dict()
    assert {key: tensor.shape for key, tensor in tensors.items()} == {k: tensor.shape for k, tensor in expected.items()}
    back, back_config = from_diffusers(tensors, content)
    assert back_config == replace(config, learned_null=False, caption_tokens=120)
    assert list(back) == [key for key in state if key != NULL]
    assert_same(back, without(state, NULL))
    again, same_content = to_diffusers(back, back_config)
    assert_same(again, tensors)
    assert same_content == content
    storages = {each.untyped_storage().data_ptr() for part in (state, tensors, back) for each in part.values()}
    assert len(storages) == len(state) + len(tensors) + len(back)


@pytest.mark.parametrize("scale, side", [(None, 8), (2.0, 8), (0.5, 32), (None, 128)])
def test_positions_are_theirs(scale, side):
    diffusers = pytest.importorskip("diffusers")
    tensors, content = to_diffusers(state_of(SQUARE), SQUARE)
    content |= {"sample_size": side, "interpolation_scale": scale, "use_additional_conditions": False}
    state, config = from_diffusers(tensors, content)
    assert config.position_scale == (scale or max(1, side // 64))
    theirs = diffusers.PixArtTransformer2DModel.from_config(content).pos_embed.pos_embed
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(state["pos_embed"], theirs, rtol=0, atol=eps)


def test_the_older_class_and_what_it_leaves_open():
    """The published folders: Transformer2DModel, which takes a config without size conditions for one that has them at
    128, and has keys of its own."""
    config = PixArtConfig(
        input_size=128, hidden_size=48, depth=1, num_heads=2, caption_channels=12, size_conditions=True,
        learned_null=False, position_scale=2.0,
    )  # fmt: skip
    state = state_of(config)
    tensors, content = to_diffusers(state, config)
    del content["interpolation_scale"], content["use_additional_conditions"], content["attention_type"]
    content |= {"_class_name": "Transformer2DModel", "only_cross_attention": False, "norm_num_groups": 32}
    loaded, found = from_diffusers(tensors, content)
    assert found == config
    assert_same(loaded, state)
    dit = DiTConfig(input_size=4, hidden_size=16, depth=1, num_heads=2)
    tensors, content = to_diffusers(DiT(dit).state_dict(), dit)
    assert from_diffusers(tensors, content | {"_class_name": "Transformer2DModel"})[1] == dit


FIRST = "transformer_blocks.1.attn2.to_v.weight"


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: without(t, FIRST), rf"from_diffusers: missing keys {FIRST}"),
        (lambda t: without(t, "scale_shift_table"), r"missing keys scale_shift_table"),
        (lambda t: {**t, "pos_embed.pos_embed": torch.zeros(1)}, r"unexpected keys pos_embed\.pos_embed"),
        (lambda t: {**t, FIRST: t[FIRST][:-1]}, r"to_v\.weight: expected \(48, 48\), got \(47, 48\)"),
        (lambda t: {**t, FIRST: t[FIRST].double()}, r"dtypes are \[torch.float32, torch.float64\], expected one"),
    ],
)
def test_damaged_tensors_are_refused_by_name(edit, message):
    tensors, content = to_diffusers(state_of(SIZED), SIZED)
    with pytest.raises(ValueError, match=message):
        from_diffusers(edit(tensors), content)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "SD3Transformer2DModel"}, r"expected 'DiTTransformer2DModel' or 'PixArtTransformer2DModel'"),
        (
            {"_class_name": "Transformer2DModel", "norm_type": "layer_norm"},
            r"norm_type is 'layer_norm'; expected 'ada_n",
        ),
        ({"_class_name": "DiTTransformer2DModel"}, r"config lacks num_embeds|norm_type is 'ada_norm_single'"),
        ({"norm_type": "ada_norm_zero"}, r"norm_type is 'ada_norm_zero'; expected 'ada_norm_single'"),
        ({"norm_eps": 1e-5}, r"norm_eps is 1e-05; expected 1e-06"),
        ({"attention_type": "gated"}, r"attention_type is 'gated'; expected 'default'"),
        ({"upcast_attention": True}, r"upcast_attention is True; expected False"),
        ({"caption_channels": None}, r"caption_channels is None; expected an integer of at least 1"),
        ({"caption_channels": 13}, r"linear_1\.weight: expected \(48, 13\), got \(48, 12\)"),
        ({"cross_attention_dim": 64}, r"cross_attention_dim is 64; expected 48, the width"),
        ({"interpolation_scale": math.nan}, r"interpolation_scale is nan; expected within \(0, 64\]"),
        ({"interpolation_scale": 0}, r"interpolation_scale is 0; expected within"),
        ({"interpolation_scale": "2"}, r"interpolation_scale is '2'; expected a number or null"),
        ({"interpolation_scale": [2]}, r"interpolation_scale is \[2\]; expected a number or null"),
        ({"interpolation_scale": 10**400}, r"interpolation_scale is .*; expected within"),
        ({"use_additional_conditions": "no"}, r"use_additional_conditions is 'no'; expected true, false or null"),
        (
            {"use_additional_conditions": False},
            r"unexpected keys adaln_single\.emb\.(aspect_ratio|resolution)_embedder",
        ),
        ({"num_layers": math.nan}, r"num_layers is nan; expected an integer"),
        ({"num_layers": 10**3}, r"num_layers is 1000; expected at most one for each of \d+ tensors"),
        ({"sample_size": 4096}, r"sample_size is 4096: .* positions; expected at most"),
        ({"attention_head_dim": 32}, r"cross_attention_dim is 48; expected 64, the width"),
        ({"out_channels": 5}, r"out_channels is 5; expected 4 \(epsilon\) or 8"),
    ],
)
def test_other_configs_are_refused_before_a_model_is_built(changes, message, monkeypatch):
    tensors, content = to_diffusers(state_of(SIZED), SIZED)
    built = {"caption_channels", "use_additional_conditions"} & changes.keys()
    if not built:
        monkeypatch.setattr(PixArt, "__init__", lambda *_: pytest.fail("was built"))
    with pytest.raises(ValueError, match=message):
        from_diffusers(tensors, content | changes)


@pytest.mark.parametrize("key", ["out_channels", "cross_attention_dim", "norm_eps"])
def test_a_config_without_what_their_class_would_assume_is_refused(key):
    tensors, content = to_diffusers(state_of(SIZED), SIZED)
    del content[key]
    with pytest.raises(ValueError, match=f"config lacks {key}"):
        from_diffusers(tensors, content)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_size": (8, 12)}, r"input_size is \(8, 12\); expected a square latent"),
        ({"position_base": 5}, r"position_base is 5; expected none, or the 4 rows"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio is 2\.0; expected 4"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(tmp_path, changes, message):
    config = replace(SQUARE, **changes)
    with pytest.raises(ValueError, match=message):
        save_diffusers(tmp_path / "pixart", make_teacher(config).state_dict(), config)
    assert not list(tmp_path.iterdir())


# What a path means


def test_what_a_bare_file_does_not_show_is_the_recipes(tmp_path):
    path, pathless = tmp_path / "teacher.safetensors", tmp_path / "without.safetensors"
    write_tensors(path, state_of(SIZED))
    write_tensors(pathless, without(state_of(SIZED), "pos_embed"))
    for source in (path, pathless):
        teacher, _ = open_teacher(source, SIZED)
        assert teacher.config == SIZED
        assert_same(teacher.state_dict(), state_of(SIZED))
    with pytest.raises(ValueError, match=r"has model\.size_conditions=True; expected False"):
        open_teacher(path, replace(SIZED, size_conditions=False))
    with pytest.raises(ValueError, match=r"pos_embed differs by"):
        open_teacher(path, replace(SIZED, position_scale=1.0))
    student = randomized(ARDStudent(SIZED, steps=4, history_layers=1))
    write_tensors(tmp_path / "student.safetensors", without(student.state_dict(), "pos_embed"))
    opened, _ = open_student(tmp_path / "student.safetensors", recipe_of(SIZED))
    assert opened.config == SIZED
    assert_same(opened.state_dict(), student.state_dict())


def test_a_diffusers_folder_takes_the_length_of_texts_from_the_recipe_and_nothing_else(tmp_path):
    save_diffusers(tmp_path / "pixart", state_of(SIZED), SIZED)
    assert "caption_tokens" not in open_source(tmp_path / "pixart").facts["model"]
    for tokens in (5, 300):
        config = replace(SIZED, caption_tokens=tokens)
        teacher, _ = open_teacher(tmp_path / "pixart", config)
        assert teacher.config == config
    for name, value in {"learned_null": True, "position_scale": 1.0, "caption_channels": 13, "num_heads": 3}.items():
        with pytest.raises(ValueError, match=rf"has model\.{name}=.*; expected {value}"):
            open_teacher(tmp_path / "pixart", replace(SIZED, **{name: value}))
    with pytest.raises(ValueError, match=r"has model\.family='pixart'; expected 'dit'"):
        open_teacher(tmp_path / "pixart", DiTConfig(hidden_size=48, num_heads=2))


# ard export


def test_a_teachers_file_to_diffusers_and_back(tmp_path):
    state = state_of(SQUARE)
    write_tensors(tmp_path / "teacher.safetensors", without(state, "pos_embed"))
    with pytest.raises(ValueError, match=r"expected --config beside it"):
        export_weights(tmp_path / "teacher.safetensors", tmp_path / "out", to="diffusers")
    recipe = recipe_of(SQUARE)
    said = export_weights(tmp_path / "teacher.safetensors", tmp_path / "out", to="diffusers", recipe=recipe)
    assert "PixArtTransformer2DModel" in said and "without its null text" in said
    assert_same(load_diffusers(tmp_path / "out")[0], without(state, NULL))
    export_weights(
        tmp_path / "out", tmp_path / "again", to="diffusers", recipe=recipe_of(replace(SQUARE, learned_null=False))
    )
    assert_same(load_diffusers(tmp_path / "again")[0], load_diffusers(tmp_path / "out")[0])
    assert (tmp_path / "again" / "config.json").read_text() == (tmp_path / "out" / "config.json").read_text()
    export_weights(tmp_path / "out", tmp_path / "back.safetensors", to="public")
    assert_same(open_source(tmp_path / "back.safetensors").state, without(state, NULL))


def test_a_students_segment_to_diffusers(tmp_path):
    student, recipe = randomized(ARDStudent(SIZED, steps=4, history_layers=1)), recipe_of(SIZED)
    tensors, facts = dict(student.state_dict()), {**recipe.student_facts(), "steps": 1}
    checkpoints.save(tmp_path / "run" / "checkpoints", 1, {"model": tensors, "ema": tensors}, facts, keep_last=1)
    with pytest.raises(ValueError, match=r"expected --segment of the student"):
        export_weights(tmp_path / "run", tmp_path / "out", to="diffusers")
    said = export_weights(tmp_path / "run", tmp_path / "out", to="diffusers", segment=2)
    assert "PixArtTransformer2DModel" in said and "null text" not in said
    state, config = load_diffusers(tmp_path / "out")
    assert asdict(config) == {**asdict(SIZED), "caption_tokens": 120}
    for name in ("linear.weight", "scale_shift_table"):
        assert torch.equal(state[f"final_layer.{name}"], tensors[f"final_layer3.{name}"])
    assert torch.equal(state["blocks.1.cross_attn.kv_linear.weight"], tensors["blocks.1.cross_attn.kv_linear.weight"])


def test_families_without_a_class_are_named(tmp_path):
    recipe = read_recipe("sit256")
    write_tensors(tmp_path / "sit.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"a class for the families 'dit' and 'pixart'; got a model of 'sit'"):
        export_weights(tmp_path / "sit.safetensors", tmp_path / "out", to="diffusers", recipe=recipe)
