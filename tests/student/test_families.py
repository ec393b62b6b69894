"""SiT, REPA and LightningDiT against plain statements of their definitions in float64."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from ard import ARDStudent, DiTConfig
from ard.checkpoint import load_student, load_teacher
from ard.diffusion import trajectory
from ard.models.families import make_teacher
from ard.models.flops import flop_table
from ard.models.layers import sincos_position_embedding
from ard.models.lightningdit import LightningDiTConfig
from ard.models.sit import REPAConfig, SiTConfig
from ard.storage.files import read_tensors, write_tensors
from ard.weights.names import infer_config
from student.test_model import MASKS, allowed_pairs, dense_model, randomized
from torch import Tensor

SIT = SiTConfig(input_size=8, in_channels=4, hidden_size=32, depth=3, num_heads=2, num_classes=5)
LIGHTNING = LightningDiTConfig(input_size=(4, 6), in_channels=5, hidden_size=48, depth=3, num_heads=2, num_classes=5)
CONFIGS = {"sit": SIT, "lightningdit": LIGHTNING}


def drawn(config, batch: int = 3, steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """States, times and labels in float64."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch, *(() if steps is None else (steps,)), *config.image_shape)
    states = torch.randn(shape, generator=generator, dtype=torch.float64)
    times = torch.rand(batch, generator=generator, dtype=torch.float64)
    return states, times, torch.randint(config.num_classes, (batch,), generator=generator)


def double(model):
    """In float64, with the tables that a float64 file would hold."""
    model = randomized(model).double()
    with torch.no_grad():
        model.pos_embed.copy_(sincos_position_embedding(model.config.hidden_size, model.config.grid_hw)[None])
        if hasattr(model, "feat_rope"):
            model.feat_rope.fill(model.config)
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.add_(1.0)
    return model


def rotated(x: Tensor, columns: int) -> Tensor:
    """(B, L, H, D): token by token and pair by pair, from the definition of 2-D rotary positions."""
    out, half = x.clone(), x.shape[-1] // 2
    for token in range(x.shape[1]):
        for start, position in ((0, token // columns), (half, token % columns)):
            for pair in range(half // 2):
                angle = position * 10000.0 ** (-2 * pair / half)
                i = start + 2 * pair
                a, b = x[:, token, :, i], x[:, token, :, i + 1]
                out[:, token, :, i] = a * math.cos(angle) - b * math.sin(angle)
                out[:, token, :, i + 1] = b * math.cos(angle) + a * math.sin(angle)
    return out


def plain_lightningdit(weights, config, states, times_BS, labels, finals, *, history_layers=0, window=None, sink=0):
    """LightningDiT over S segments, written plainly: modulation per token, dense masked softmax. (B, S, c, h, w)."""
    B, S = states.shape[:2]
    (rows, columns), p, C, H = config.grid_hw, config.patch_size, config.hidden_size, config.num_heads
    L, T = rows * columns, S * rows * columns

    def linear(name, x):
        return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    def norm(name, x):
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weights[f"{name}.weight"]

    patches = F.unfold(states.flatten(0, 1), p, stride=p).transpose(1, 2)
    x = (linear("x_embedder.proj", patches) + weights["pos_embed"]).reshape(B, T, C)
    frequency = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float64) / 128)
    angles = times_BS[..., None] * frequency
    t = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    c = t + weights["y_embedder.embedding_table.weight"][labels][:, None]
    c_BTC = c.repeat_interleave(L, dim=1)
    for i in range(config.depth):
        allowed = allowed_pairs(T, L, history=i < history_layers, window=window, sink=sink)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = linear(
            f"blocks.{i}.adaLN_modulation.1", F.silu(c_BTC)
        ).chunk(6, -1)
        y = norm(f"blocks.{i}.norm1", x) * (1 + scale_a) + shift_a
        q, k, v = linear(f"blocks.{i}.attn.qkv", y).reshape(B, T, 3, H, C // H).unbind(2)
        q, k = (rotated(z.reshape(B * S, L, H, C // H), columns).reshape(B, T, H, C // H) for z in (q, k))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(C // H)
        mixed = torch.einsum("bhqk,bkhd->bqhd", scores.masked_fill(~allowed, -math.inf).softmax(-1), v).reshape(B, T, C)
        x = x + gate_a * linear(f"blocks.{i}.attn.proj", mixed)
        y = norm(f"blocks.{i}.norm2", x) * (1 + scale_m) + shift_m
        a, b = linear(f"blocks.{i}.mlp.w12", y).chunk(2, -1)
        x = x + gate_m * linear(f"blocks.{i}.mlp.w3", F.silu(a) * b)
    images = []
    for s, name in enumerate(finals):
        shift, scale = linear(f"{name}.adaLN_modulation.1", F.silu(c[:, s : s + 1])).chunk(2, -1)
        y = norm(f"{name}.norm_final", x[:, s * L : (s + 1) * L]) * (1 + scale) + shift
        tokens = linear(f"{name}.linear", y).reshape(B, rows, columns, p, p, config.in_channels)
        images.append(torch.einsum("nhwpqc->nchpwq", tokens).reshape(B, *config.image_shape))
    return torch.stack(images, dim=1)


PLAIN: dict[str, Callable] = {"sit": dense_model, "lightningdit": plain_lightningdit}


@pytest.mark.parametrize("family", CONFIGS)
def test_teachers_equal_their_definition(family):
    config = CONFIGS[family]
    teacher, (x, t, labels) = double(make_teacher(config)), drawn(config)
    labels[0] = config.num_classes  # the null label
    expected = PLAIN[family](teacher.state_dict(), config, x[:, None], t[:, None], labels, ["final_layer"])
    got = teacher(x, t, labels)
    assert got.shape == x.shape  # no sigma channels
    torch.testing.assert_close(got, expected[:, 0, : config.in_channels], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mask", ["M2", "M3", "M4"])
@pytest.mark.parametrize("family", CONFIGS)
def test_students_equal_their_definition(family, mask):
    config, times = CONFIGS[family], (0.0, 0.25, 0.7)
    student = ARDStudent(config, steps=3, history_layers=2, timesteps=times, **MASKS[mask])
    student, (states, _, labels) = double(student), drawn(config, 2, 3)
    finals = ["final_layer", "final_layer2", "final_layer3"]
    times_BS = torch.tensor([times], dtype=torch.float32).double()
    expected = PLAIN[family](
        student.state_dict(), config, states, times_BS, labels, finals, history_layers=2, **MASKS[mask]
    )
    torch.testing.assert_close(student(states, labels), expected[:, :, : config.in_channels], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", CONFIGS)
def test_cached_sampling_equals_the_training_forward(family):
    config = CONFIGS[family]
    student = double(ARDStudent(config, steps=4, history_layers=2))
    noise, _, labels = drawn(config)
    samples = student.sample(noise, labels)
    states = torch.cat([noise[:, None], samples[:, :-1]], dim=1)
    torch.testing.assert_close(student(states, labels), samples, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("family", CONFIGS)
def test_even_times_run_from_noise_to_data(family):
    student = ARDStudent(CONFIGS[family], steps=4, history_layers=1)
    assert student.timesteps(4, torch.device("cpu")).tolist() == [[0.0, 0.25, 0.5, 0.75]]
    assert ARDStudent(DiTConfig(depth=1), steps=4, history_layers=1).timesteps(2, torch.device("cpu"))[0, 1] == 749.25


@pytest.mark.parametrize("family", CONFIGS)
def test_public_names_load_strictly_and_come_back(family, tmp_path):
    config = CONFIGS[family]
    teacher = randomized(make_teacher(config))
    state = teacher.state_dict()
    write_tensors(tmp_path / "teacher.safetensors", state)
    loaded = load_teacher(tmp_path / "teacher.safetensors", num_heads=2, family=family, input_size=config.input_size)
    assert type(loaded) is type(teacher) and loaded.config == config
    write_tensors(tmp_path / "again.safetensors", loaded.state_dict())
    again = read_tensors(tmp_path / "again.safetensors")
    assert again.keys() == state.keys() and all(torch.equal(again[name], state[name]) for name in state)

    def load(changed):
        return load_teacher(changed, num_heads=2, family=family, input_size=config.input_size)

    name = "blocks.1.attn.proj.weight"
    with pytest.raises(ValueError, match=r"missing keys blocks\.1\.attn\.proj\.weight"):
        load({key: value for key, value in state.items() if key != name})
    with pytest.raises(ValueError, match=r"unexpected keys more"):
        load({**state, "more": state[name]})
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.proj\.weight: expected \((32, 32|48, 48)\)"):
        load({**state, name: state[name][:-1]})


def test_names_of_lightningdit():
    state = {name: tuple(tensor.shape) for name, tensor in make_teacher(LIGHTNING).state_dict().items()}
    C, hidden, L, D = 48, 128, 24, 24
    expected = {"norm1.weight": (C,), "norm2.weight": (C,), "mlp.w12.weight": (2 * hidden, C), "mlp.w3.bias": (C,)}
    for name, shape in expected.items():
        assert state[f"blocks.0.{name}"] == shape
    assert state["feat_rope.freqs_cos"] == state["feat_rope.freqs_sin"] == (L, D)
    assert state["final_layer.norm_final.weight"] == (C,) and state["x_embedder.proj.weight"] == (C, 5, 1, 1)
    assert LightningDiTConfig().mlp_hidden_size == 3072 and LightningDiTConfig().head_dim == 72


def test_a_repa_file_has_projectors_and_runs_the_other_way():
    state = make_teacher(REPAConfig(**{**vars(SIT), "family": "repa"})).state_dict()
    repa = {"ema": {**state, "projectors.0.0.weight": torch.zeros(3, 3)}}
    loaded = load_teacher(repa, num_heads=2, family="repa", input_size=8)
    assert loaded.state_dict().keys() == state.keys()
    with pytest.raises(ValueError, match=r"has projectors\.\*, as REPA's; expected family='repa'"):
        load_teacher(repa, num_heads=2, family="sit", input_size=8)
    with pytest.raises(ValueError, match=r"unexpected keys projectors"):
        load_teacher(repa, num_heads=2, input_size=8)
    (noise, _, labels), teacher = drawn(SIT), double(loaded)
    x = noise
    with torch.no_grad():
        for i in range(5):  # REPA's own sampler: t from 1 to 0, x + (t_next - t) * v, all channels guided
            t = torch.full((3,), 1 - i / 5, dtype=torch.float64)
            v, null = teacher(x, t, labels), teacher(x, t, torch.full_like(labels, SIT.num_classes))
            x = x - (null + 1.5 * (v - null)) / 5
    got = trajectory(teacher, noise, labels, times=6, cfg_scale=1.5, cfg_channels=None)
    torch.testing.assert_close(got[:, -1], x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("width", [64, 1024, 1152, 1792])
def test_a_whole_mlp_ratio_is_found_again(width):
    config = LightningDiTConfig(input_size=2, in_channels=2, hidden_size=width, depth=1, num_heads=width // 32)
    with torch.device("meta"):
        state = make_teacher(config).state_dict()
    assert infer_config(state, num_heads=width // 32, family="lightningdit") == config


def test_rotary_tables_of_a_file_are_compared_with_the_grid():
    state = make_teacher(LIGHTNING).state_dict()
    how = {"num_heads": 2, "family": "lightningdit", "input_size": LIGHTNING.input_size}
    load_teacher({name: tensor.bfloat16() for name, tensor in state.items()}, **how)
    wrong = {**state, "feat_rope.freqs_sin": torch.zeros_like(state["feat_rope.freqs_sin"])}
    with pytest.raises(ValueError, match=r"feat_rope\.freqs_sin differs by .* from that of \(4, 6\) tokens"):
        load_teacher(wrong, **how)

    with pytest.raises(ValueError, match=r"family: got 'sti'; expected one of dit, sit, repa, lightningdit"):
        load_teacher(state, num_heads=2, family="sti")


@pytest.mark.parametrize("family", CONFIGS)
def test_a_students_public_names(family, tmp_path):
    student = randomized(ARDStudent(CONFIGS[family], steps=3, history_layers=1, timesteps=(0.0, 0.5, 0.75)))
    how = {"num_heads": 2, "history_layers": 1, "timesteps": (0.0, 0.5, 0.75), "family": family}
    loaded = load_student(student.state_dict(), input_size=CONFIGS[family].input_size, **how)
    noise, _, labels = drawn(CONFIGS[family])
    assert torch.equal(loaded.sample(noise.float(), labels), student.sample(noise.float(), labels))
    assert loaded.settings == student.settings


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("history_layers, window, sink", [(0, None, 0), (2, None, 0), (3, 1, 1)])
def test_flops_by_formula_are_those_counted(family, history_layers, window, sink):
    table = flop_table(CONFIGS[family], steps=4, history_layers=history_layers, window=window, sink=sink)
    for row, values in table.items():
        assert values["analytic"] == values["counted"], row


@pytest.mark.slow
def test_compiled_blocks_of_lightningdit():
    """Rotated attention is an object made at each call: it must not make each call compile anew."""
    config = replace(LIGHTNING, depth=2)
    student, (states, _, labels) = randomized(ARDStudent(config, steps=2, history_layers=2)), drawn(config, 2, 2)
    expected = student(states.float(), labels)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for block in student.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(3):
        torch.testing.assert_close(student(states.float(), labels), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_students_are_copied_and_pickled():
    student = randomized(ARDStudent(SIT, steps=3, history_layers=1, timesteps=(0.0, 0.5, 0.75)))
    noise, _, labels = drawn(SIT)
    for other in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        assert type(other) is type(student) and other.settings == student.settings
        assert torch.equal(other.sample(noise.float(), labels), student.sample(noise.float(), labels))


@pytest.mark.parametrize("times", [(999.0, 499.0), (0.0, math.nan)])
def test_times_of_another_family_are_refused(times):
    with pytest.raises(ValueError, match=r"timesteps are \[.*; expected within \[0, 1\], the times of family='sit'"):
        ARDStudent(SIT, steps=2, history_layers=0, timesteps=times)
