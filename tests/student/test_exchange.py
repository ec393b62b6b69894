"""Weights to and from diffusers: names, bits and outputs against the real `DiTTransformer2DModel`."""

import json
import os

import pytest
import torch
from ard import ARDStudent, DiT, DiTConfig
from ard.weights.diffusers_format import (
    INDEX_NAME,
    WEIGHTS_NAME,
    from_diffusers,
    load_diffusers,
    save_diffusers,
    segment_teacher_state,
    to_diffusers,
    use_release_arithmetic,
)
from ard.weights.public import load_teacher
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers")
Theirs = diffusers.DiTTransformer2DModel

CONFIGS = {
    "sigma": DiTConfig(input_size=8, patch_size=2, hidden_size=32, depth=3, num_heads=4, num_classes=7),
    "no-sigma": DiTConfig(
        input_size=12, patch_size=4, in_channels=1, hidden_size=48, depth=2, num_heads=2, num_classes=3,
        learn_sigma=False,
    ),
}  # fmt: skip
SIGMA = CONFIGS["sigma"]
# float64: the two models sum in other orders, C to 4C terms in each of a few layers; measured 2 to 13 eps.
ROUNDING = 64 * torch.finfo(torch.float64).eps


def randomised(model):
    """Weights as large as after training: the initial adaLN and final layers are zero and would hide every block."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.normal_(std=0.2)
    return model.eval()


def teacher_of(name="sigma"):
    return randomised(DiT(CONFIGS[name]))


def their_model(**changes):
    sizes = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8}
    return randomised(Theirs(**sizes, num_embeds_ada_norm=7, **{"out_channels": 8, "norm_eps": 1e-6} | changes))


def shared_embedders(model):
    """What training or conversion gives: the same embedders in every block."""
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    return model


def from_folder(folder, **options):
    return Theirs.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False, **options).eval()


def inputs(config, timesteps=(0, 1, 13, 500, 999)):
    """One image for each timestep; the last label is the null label."""
    generator = torch.Generator().manual_seed(1)
    B = len(timesteps)
    x = torch.randn(B, config.in_channels, *config.input_hw, generator=generator, dtype=torch.float64)
    labels = torch.randint(config.num_classes, (B,), generator=generator)
    labels[-1] = config.num_classes
    return x, torch.tensor(timesteps), labels


@torch.no_grad()
def outputs(model, x, t, labels):
    return model(x, timestep=t, class_labels=labels).sample if isinstance(model, Theirs) else model(x, t, labels)


def relative_error(actual, expected):
    return float((actual - expected).abs().max() / expected.abs().max())


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor), name


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_names_shapes_and_bits_both_ways(name, dtype):
    state = teacher_of(name).to(dtype).state_dict()
    tensors, content = to_diffusers(state, CONFIGS[name])
    with torch.device("meta"):
        expected = Theirs.from_config(content).state_dict()
    assert {key: tensor.shape for key, tensor in tensors.items()} == {k: tensor.shape for k, tensor in expected.items()}
    back, config = from_diffusers(tensors, content)
    assert config == CONFIGS[name]
    assert list(back) == list(state)
    assert_same(back, state)
    again, same_content = to_diffusers(back, config)
    assert_same(again, tensors)
    assert same_content == content


def test_results_share_no_memory_with_their_source():
    state = teacher_of().state_dict()
    tensors, content = to_diffusers(state, SIGMA)
    back, _ = from_diffusers(tensors, content)
    storages = {tensor.untyped_storage().data_ptr() for part in (state, tensors, back) for tensor in part.values()}
    assert len(storages) == len(state) + len(tensors) + len(back)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_saved_folder_runs_in_diffusers(tmp_path, name):
    teacher = teacher_of(name).double()
    save_diffusers(tmp_path / "new" / "dit", teacher.state_dict(), CONFIGS[name])
    assert sorted(path.name for path in (tmp_path / "new").rglob("*")) == ["config.json", WEIGHTS_NAME, "dit"]
    theirs = from_folder(tmp_path / "new" / "dit", torch_dtype=torch.float64)
    assert_same(theirs.state_dict(), to_diffusers(teacher.state_dict(), CONFIGS[name])[0])
    use_release_arithmetic(theirs)
    batch = inputs(CONFIGS[name])
    expected = outputs(theirs, *batch)
    assert expected.std() > 0.1
    assert relative_error(outputs(teacher, *batch), expected) <= ROUNDING


def test_their_class_takes_other_frequencies_than_the_release(tmp_path):
    """Why `use_release_arithmetic` is needed; fails when diffusers changes its class."""
    teacher = teacher_of().double()
    save_diffusers(tmp_path / "dit", teacher.state_dict(), SIGMA)
    theirs = from_folder(tmp_path / "dit", torch_dtype=torch.float64)
    at_zero = inputs(SIGMA, timesteps=(0, 0))
    assert relative_error(outputs(teacher, *at_zero), outputs(theirs, *at_zero)) <= ROUNDING
    late = inputs(SIGMA, timesteps=(500, 999))
    assert relative_error(outputs(teacher, *late), outputs(theirs, *late)) > 0.1
    half, index = 128, torch.arange(128, dtype=torch.float64)
    cos, sin = theirs.transformer_blocks[0].norm1.emb.time_proj(torch.tensor([1.0]))[0].double().split(half)
    torch.testing.assert_close(torch.atan2(sin, cos), 10000 ** (-index / (half - 1)), rtol=1e-5, atol=0)


def test_use_release_arithmetic_sets_eps_and_refuses_other_models():
    model = shared_embedders(their_model(norm_eps=1e-5)).double()
    state, config = from_diffusers(model.state_dict(), json.loads(model.to_json_string()))
    ours, at_zero, batch = load_teacher(state, num_heads=4), inputs(config, timesteps=(0, 0)), inputs(config)
    assert 1e-8 < relative_error(outputs(ours, *at_zero), outputs(model, *at_zero)) < 1e-4  # norm_eps alone
    use_release_arithmetic(model)
    assert relative_error(outputs(ours, *batch), outputs(model, *batch)) <= ROUNDING
    with pytest.raises(ValueError, match=r"model is a DiT; expected a DiTTransformer2DModel"):
        use_release_arithmetic(DiT(SIGMA))
    del model.transformer_blocks[1].norm1.emb.time_proj.downscale_freq_shift
    model.transformer_blocks[0].norm3.eps = 0.5
    with pytest.raises(ValueError, match=r"time_proj has no downscale_freq_shift"):
        use_release_arithmetic(model)
    assert model.transformer_blocks[0].norm3.eps == 0.5


@pytest.mark.parametrize("sharded", [False, True], ids=["one-file", "sharded"])
@pytest.mark.parametrize("pipeline", [False, True], ids=["model", "pipeline"])
def test_a_folder_of_diffusers_loads_into_ours(tmp_path, sharded, pipeline):
    theirs = shared_embedders(their_model()).double()
    folder = tmp_path / "transformer" if pipeline else tmp_path
    theirs.save_pretrained(folder, max_shard_size="300KB" if sharded else "1GB")
    assert (folder / INDEX_NAME).exists() == sharded and len(list(folder.glob("*.safetensors"))) >= 1 + sharded
    state, config = load_diffusers(tmp_path)
    assert config == SIGMA
    assert_same(to_diffusers(state, config)[0], theirs.state_dict())
    use_release_arithmetic(theirs)
    batch = inputs(config)
    assert relative_error(outputs(load_teacher(state, num_heads=4), *batch), outputs(theirs, *batch)) <= ROUNDING


@pytest.mark.parametrize("sample_size, patch_size", [(6, 1), (32, 8), (64, 2)])
def test_positions_are_theirs_at_every_size(sample_size, patch_size):
    config = DiTConfig(input_size=sample_size, patch_size=patch_size, hidden_size=24, depth=1, num_heads=3)
    tensors, content = to_diffusers(DiT(config).state_dict(), config)
    theirs = Theirs.from_config(content).pos_embed.pos_embed
    # The sine of an angle of up to 31 in two libraries: a last place, of values up to 1.
    torch.testing.assert_close(
        from_diffusers(tensors, content)[0]["pos_embed"], theirs, rtol=0, atol=torch.finfo(torch.float32).eps / 2
    )


def test_the_older_class_name_and_defaults_are_read():
    """The published folders: Transformer2DModel, with keys of that class, and no norm_eps."""
    state = teacher_of().state_dict()
    tensors, content = to_diffusers(state, SIGMA)
    del content["norm_eps"]
    content |= {"_class_name": "Transformer2DModel", "cross_attention_dim": None, "norm_num_groups": 32}
    loaded, config = from_diffusers(tensors, content)
    assert config == SIGMA
    assert_same(loaded, state)


@pytest.mark.parametrize("steps", [1, 3])
def test_each_segment_of_a_student_without_history_runs_in_diffusers(steps):
    student = randomised(ARDStudent(SIGMA, steps=steps, history_layers=0)).double()
    x, _, labels = inputs(SIGMA, timesteps=(0,) * 2 * steps)
    states = x.view(2, steps, *x.shape[1:])
    with torch.no_grad():
        predictions = student(states, labels[-2:])
    times = student.timesteps(steps, torch.device("cpu"))[0]
    assert times.is_floating_point()
    for s in range(steps):
        tensors, content = to_diffusers(segment_teacher_state(student.state_dict(), s), SIGMA)
        theirs = Theirs.from_config(content).double().eval()
        theirs.load_state_dict(tensors)
        use_release_arithmetic(theirs)
        epsilon = outputs(theirs, states[:, s], times[s].expand(2), labels[-2:])[:, : SIGMA.in_channels]
        assert relative_error(predictions[:, s], epsilon) <= ROUNDING


def test_segment_teacher_state_refuses_gaps_and_other_segments():
    state = ARDStudent(SIGMA, steps=3, history_layers=0).state_dict()
    for segment in (-1, 3):
        with pytest.raises(ValueError, match=rf"segment is {segment}; expected 0 to 2"):
            segment_teacher_state(state, segment)
    gap = {name: tensor for name, tensor in state.items() if not name.startswith("final_layer2.")}
    with pytest.raises(ValueError, match=r"final layers are \[final_layer, final_layer3\]; expected .* without a gap"):
        segment_teacher_state(gap, 0)
    with pytest.raises(ValueError, match=r"final layers are \[\]"):
        segment_teacher_state({"pos_embed": state["pos_embed"]}, 0)


COPY = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"


def flipped(tensor):
    """The last bit of one element changed."""
    changed = tensor.clone()
    changed.view(torch.int32)[3] ^= 1
    return changed


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda t: {**t, COPY: flipped(t[COPY])}, r"block 0's copy; .* got another one in block 2"),
        (lambda t: {k: v for k, v in t.items() if k != COPY}, rf"from_diffusers: missing keys {COPY}"),
        (lambda t: {k: v for k, v in t.items() if "attn1.to_k" not in k}, r"missing keys .*0\.attn1\.to_k\.weight"),
        (lambda t: {**t, "extra": torch.zeros(1)}, r"unexpected keys extra"),
        (lambda t: {**t, COPY: torch.zeros(5)}, r"linear_1\.bias: expected \(32,\), got \(5,\)"),
        (lambda t: {**t, COPY: t[COPY].double()}, r"dtypes are \[torch.float32, torch.float64\], expected one"),
        (lambda t: {k: v.int() for k, v in t.items()}, r"dtypes are \[torch.int32\], expected one floating dtype"),
    ],
)
def test_damaged_tensors_are_refused_by_name(edit, message):
    tensors, content = to_diffusers(teacher_of().state_dict(), SIGMA)
    with pytest.raises(ValueError, match=message):
        from_diffusers(edit(tensors), content)


def test_copies_with_the_same_bits_are_equal_even_when_not_finite():
    state = teacher_of().state_dict()
    state["t_embedder.mlp.0.bias"][0] = torch.nan
    back, _ = from_diffusers(*to_diffusers(state, SIGMA))
    assert back["t_embedder.mlp.0.bias"].isnan().nonzero().tolist() == [[0]]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"_class_name": "UNet2DModel"}, r"_class_name is 'UNet2DModel'; expected 'DiTTransformer2DModel'"),
        ({"norm_type": "ada_norm_single"}, r"norm_type is 'ada_norm_single'; expected 'ada_norm_zero'"),
        ({"activation_fn": "geglu"}, r"activation_fn is 'geglu'; expected 'gelu-approximate'"),
        ({"attention_bias": False}, r"attention_bias is False; expected True"),
        ({"norm_eps": 1e-4}, r"norm_eps is 0\.0001; expected 1e-06 or 1e-05"),
        ({"num_layers": 0}, r"num_layers is 0; expected an integer of at least 1"),
        ({"sample_size": [8, 4]}, r"sample_size is \[8, 4\]; expected an integer"),
        ({"sample_size": 9}, r"input_size is 9; expected multiples of patch_size=2"),
        ({"out_channels": 5}, r"out_channels is 5; expected 4 \(epsilon\) or 8"),
        ({"num_layers": 2}, r"unexpected keys transformer_blocks\.2\."),
        ({"num_embeds_ada_norm": 8}, r"embedding_table\.weight: expected \(9, 32\), got \(8, 32\)"),
    ],
)
def test_other_configs_are_refused(changes, message):
    tensors, content = to_diffusers(teacher_of().state_dict(), SIGMA)
    with pytest.raises(ValueError, match=message):
        from_diffusers(tensors, content | changes)


def test_a_config_without_sizes_is_refused():
    tensors, content = to_diffusers(teacher_of().state_dict(), SIGMA)
    del content["patch_size"], content["norm_type"]
    with pytest.raises(ValueError, match=r"config lacks patch_size, norm_type"):
        from_diffusers(tensors, content)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"input_size": (8, 12)}, r"input_size is \(8, 12\); expected a square latent"),
        ({"mlp_ratio": 2.0}, r"mlp_ratio is 2\.0; expected 4"),
        ({"frequency_embedding_size": 128}, r"frequency_embedding_size is 128; expected 256"),
    ],
)
def test_what_diffusers_cannot_express_is_refused(tmp_path, changes, message):
    sizes = {"input_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2} | changes
    teacher = DiT(DiTConfig(**sizes))
    with pytest.raises(ValueError, match=message):
        save_diffusers(tmp_path / "dit", teacher.state_dict(), teacher.config)
    assert not list(tmp_path.iterdir())


def test_other_positions_and_states_are_not_exported():
    state = teacher_of().state_dict()
    state["pos_embed"] = state["pos_embed"].clone()
    state["pos_embed"][0, 3, 5] += 2e-4  # of an average, as those of DiT's trainer
    to_diffusers(state, SIGMA)
    state["pos_embed"][0, 3, 5] += 2e-3
    with pytest.raises(
        ValueError, match=r"pos_embed differs by 0\.0022 from the sin-cos table; expected at most 0\.001"
    ):
        to_diffusers(state, SIGMA)
    state["pos_embed"][0, 3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"pos_embed differs by nan"):
        to_diffusers(state, SIGMA)
    with pytest.raises(ValueError, match=r"to_diffusers: unexpected keys final_layer2"):
        to_diffusers(ARDStudent(SIGMA, steps=2, history_layers=0).state_dict(), SIGMA)


def test_float32_positions_in_a_float64_state_come_back_as_they_are():
    state = teacher_of().double().state_dict()
    back, _ = from_diffusers(*to_diffusers(state, SIGMA))
    assert torch.equal(back["pos_embed"], state["pos_embed"])


def test_an_existing_folder_is_not_overwritten(tmp_path):
    state = teacher_of().state_dict()
    folder = tmp_path / "dit"
    folder.mkdir()
    save_diffusers(folder, state, SIGMA)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"dit exists; expected a new or an empty folder"):
        save_diffusers(folder, DiT(SIGMA).state_dict(), SIGMA)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert_same(load_diffusers(folder)[0], state)


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        save_diffusers(tmp_path / "dit", teacher_of().state_dict(), SIGMA)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def saved(tmp_path):
    save_diffusers(tmp_path / "dit", teacher_of().state_dict(), SIGMA)
    return tmp_path / "dit"


def test_pickles_and_empty_folders_are_refused(saved, tmp_path):
    os.replace(saved / WEIGHTS_NAME, saved / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"\['diffusion_pytorch_model.bin'\]; expected .* a \.bin file is a pickle"):
        load_diffusers(saved)
    os.remove(saved / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match=r"holds no weights; expected diffusion_pytorch_model\.safetensors$"):
        load_diffusers(saved)
    with pytest.raises(ValueError, match=r"has no config\.json and no transformer/config\.json"):
        load_diffusers(tmp_path / "absent")


def test_broken_files_are_refused_by_name(saved):
    weights = (saved / WEIGHTS_NAME).read_bytes()
    (saved / WEIGHTS_NAME).write_bytes(weights[:-8])
    with pytest.raises(ValueError, match=rf"{WEIGHTS_NAME} is not a whole safetensors file"):
        load_diffusers(saved)
    (saved / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_diffusers(saved)
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config\.json holds a list; expected an object"):
        load_diffusers(saved)


def test_broken_indices_are_refused(saved):
    tensors = load_file(saved / WEIGHTS_NAME)
    index = saved / INDEX_NAME
    index.write_text("{}")
    with pytest.raises(ValueError, match=rf"has both {WEIGHTS_NAME} and {INDEX_NAME}"):
        load_diffusers(saved)
    os.replace(saved / WEIGHTS_NAME, saved / "shard.safetensors")
    with pytest.raises(ValueError, match=r"has no weight_map"):
        load_diffusers(saved)
    for name in ("../dit/shard.safetensors", "absent.safetensors", "config.json"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(tensors, name)}))
        with pytest.raises(ValueError, match=rf"names '{name}'; expected a \.safetensors file beside it"):
            load_diffusers(saved)
    whole = dict.fromkeys(tensors, "shard.safetensors")
    index.write_text(json.dumps({"weight_map": {k: v for k, v in whole.items() if k != COPY} | {"x": whole[COPY]}}))
    with pytest.raises(ValueError, match=rf"disagree about {COPY}, x"):
        load_diffusers(saved)
    index.write_text(json.dumps({"weight_map": whole}))
    assert_same(to_diffusers(*load_diffusers(saved))[0], tensors)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_layers": 10**7}, r"num_layers is 10000000; expected an integer of at least 1 and at most"),
        ({"num_layers": 10**3}, r"num_layers is 1000; expected at most one for each of \d+ tensors"),
        ({"sample_size": 4096}, r"sample_size is 4096: .* positions; expected at most"),
        ({"sample_size": 10**6}, r"input_size is 1000000; expected within"),
        ({"attention_head_dim": 10**12}, r"attention_head_dim is 1000000000000; expected an integer"),
        ({"attention_head_dim": 4000}, r"heads of width 4000; expected a multiple of 8 up to 256"),
        ({"attention_head_dim": 256}, r"pos_embed\.proj\.weight: expected \(1024, "),
        ({"_class_name": "x" * 10**6}, r"_class_name is 'x{76}\.\.\.; expected"),
    ],
)
def test_sizes_of_a_config_are_compared_with_the_tensors_before_a_model_is_built(changes, message, monkeypatch):
    tensors, content = to_diffusers(teacher_of().state_dict(), SIGMA)
    monkeypatch.setattr(DiT, "__init__", lambda *_: pytest.fail("was built"))
    with pytest.raises(ValueError, match=message):
        from_diffusers(tensors, content | changes)
