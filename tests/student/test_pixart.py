"""PixArt against diffusers' class and against a plain statement of its definition in float64; its FLOPs."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ard import ARDStudent
from ard.models.families import make_teacher
from ard.models.flops import counted_flops, flop_table
from ard.models.pixart import PixArtConfig
from ard.weights.diffusers_format import load_diffusers, save_diffusers
from ard.weights.public import load_teacher
from student.test_model import MASKS, allowed_pairs, randomized
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ard_kernels import flops as analytic

# Oblong, so that rows and columns, height and width are told apart.
OBLONG = PixArtConfig(
    input_size=(4, 8), hidden_size=48, depth=3, num_heads=2, caption_channels=12, caption_tokens=5, position_scale=1.5
)
CONFIGS = {"alpha": OBLONG, "sized": replace(OBLONG, size_conditions=True, learn_sigma=False, learned_null=False)}


def drawn(config: PixArtConfig, lengths: tuple[int, ...], steps: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """States, text and its mask, of so many tokens in each sample."""
    generator = torch.Generator().manual_seed(1)
    B = len(lengths)
    shape = (B, *(() if steps is None else (steps,)), *config.image_shape)
    states = torch.randn(shape, generator=generator, dtype=torch.float64)
    text = torch.randn(B, config.caption_tokens, config.caption_channels, generator=generator, dtype=torch.float64)
    return states, text, torch.arange(config.caption_tokens) < torch.tensor(lengths)[:, None]


def double(model):
    """In float64, with the positions that a float64 file would hold."""
    model = randomized(model).double().eval()
    with torch.no_grad():
        model.pos_embed.copy_(model.positions()[None])
    return model


def features(numbers: Tensor) -> Tensor:
    """[cos, sin] of numbers (...,), in float32 as the release computes them: (..., 256)."""
    angles = numbers.float()[..., None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    return torch.cat([angles.cos(), angles.sin()], -1).double()


def table(config: PixArtConfig) -> Tensor:
    """Positions (L, C) in float64: both axes stretched to as many as there are rows, over the scale."""
    (rows, columns), quarter = config.grid_hw, config.hidden_size // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    tokens = []
    for row in range(rows):
        for column in range(columns):
            x = column * rows / columns / config.position_scale * omega
            y = row / config.position_scale * omega
            tokens.append(torch.cat([x.sin(), x.cos(), y.sin(), y.cos()]))
    return torch.stack(tokens)


def plain_pixart(
    weights, config, states, times_BS, text, mask, finals, *, history_layers=0, window=None, sink=0
) -> Tensor:
    """PixArt over S segments, written plainly: modulation per token, dense masked softmax. (B, S, c', h, w)."""
    B, S = states.shape[:2]
    (rows, columns), p, C, H = config.grid_hw, config.patch_size, config.hidden_size, config.num_heads
    L, T, N = rows * columns, S * rows * columns, config.caption_tokens

    def linear(name, x):
        return x @ weights[f"{name}.weight"].flatten(1).T + weights[f"{name}.bias"]

    def embedded(name, numbers):
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", features(numbers))))

    def norm(x):
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()

    def attended(q, k, v, allowed):
        """q (B, T, C), k and v (B, N, C), allowed (B or 1, T, N)."""
        q, k, v = (z.unflatten(-1, (H, C // H)) for z in (q, k, v))
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(C // H)
        weight = scores.masked_fill(~allowed[:, None], -math.inf).softmax(-1).nan_to_num(0.0)  # of no key: nothing
        return torch.einsum("bhqk,bkhd->bqhd", weight, v).flatten(2)

    c = embedded("t_embedder", times_BS)
    if config.size_conditions:
        height, width = (8.0 * side for side in config.input_hw)
        parts = [embedded("csize_embedder", torch.tensor(pixels)) for pixels in (height, width)]
        c = c + torch.cat([*parts, embedded("ar_embedder", torch.tensor(height / width))])
    y = linear("y_embedder.y_proj.fc2", F.gelu(linear("y_embedder.y_proj.fc1", text), approximate="tanh"))
    patches = F.unfold(states.flatten(0, 1), p, stride=p).transpose(1, 2)
    x = (linear("x_embedder.proj", patches) + table(config)).reshape(B, T, C)
    shared = linear("t_block.1", F.silu(c)).expand(B, -1, -1).repeat_interleave(L, dim=1)
    for i in range(config.depth):
        block = f"blocks.{i}."
        allowed = allowed_pairs(T, L, history=i < history_layers, window=window, sink=sink)[None]
        rows_BTR = shared + weights[block + "scale_shift_table"].flatten()
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rows_BTR.chunk(6, -1)
        q, k, v = linear(block + "attn.qkv", norm(x) * (1 + scale_a) + shift_a).chunk(3, -1)
        x = x + gate_a * linear(block + "attn.proj", attended(q, k, v, allowed))
        k, v = linear(block + "cross_attn.kv_linear", y).chunk(2, -1)
        read = attended(linear(block + "cross_attn.q_linear", x), k, v, mask[:, None].expand(B, T, N))
        x = x + linear(block + "cross_attn.proj", read)
        hidden = F.gelu(linear(block + "mlp.fc1", norm(x) * (1 + scale_m) + shift_m), approximate="tanh")
        x = x + gate_m * linear(block + "mlp.fc2", hidden)
    images = []
    for s, name in enumerate(finals):
        shift, scale = (c[:, s : s + 1, None] + weights[f"{name}.scale_shift_table"]).unbind(2)
        tokens = linear(f"{name}.linear", norm(x[:, s * L : (s + 1) * L]) * (1 + scale) + shift)
        tokens = tokens.reshape(B, rows, columns, p, p, config.out_channels)
        images.append(torch.einsum("nhwpqc->nchpwq", tokens).reshape(B, config.out_channels, *config.input_hw))
    return torch.stack(images, dim=1)


@pytest.mark.parametrize("name", CONFIGS)
def test_teachers_equal_their_definition(name):
    config = CONFIGS[name]
    teacher, (x, text, mask) = double(make_teacher(config)), drawn(config, (5, 2, 0))
    t = torch.tensor([999.0, 13.0, 0.0])
    expected = plain_pixart(teacher.state_dict(), config, x[:, None], t[:, None], text, mask, ["final_layer"])[:, 0]
    got = teacher(x, t, text, mask)
    assert got.shape[1] == config.out_channels == (4 if name == "sized" else 8) and got.std() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CONFIGS)
def test_students_equal_their_definition(name, mask):
    config, times = CONFIGS[name], (999.0, 700.5, 30.25)
    student = double(ARDStudent(config, steps=3, history_layers=2, timesteps=times, **MASKS[mask]))
    states, text, text_mask = drawn(config, (1, 4), 3)
    finals = ["final_layer", "final_layer2", "final_layer3"]
    how = {"history_layers": 2, **MASKS[mask]}
    expected = plain_pixart(
        student.state_dict(), config, states, torch.tensor([times]), text, text_mask, finals, **how
    )[:, :, : config.in_channels]
    torch.testing.assert_close(student(states, text, text_mask), expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", CONFIGS)
def test_text_read_once_is_text_read_in_every_step(name):
    """Cached sampling is the training forward on its own predictions, and every step alone; text is projected once."""
    config, calls = CONFIGS[name], []
    student = double(ARDStudent(config, steps=4, history_layers=2))
    noise, text, mask = drawn(config, (3, 0, 5))
    for block in student.blocks:
        block.cross_attn.kv_linear.register_forward_hook(lambda *_: calls.append("keys and values"))
    student.y_embedder.y_proj.register_forward_hook(lambda *_: calls.append("projection"))
    samples = student.sample(noise, text, mask)
    assert calls.count("keys and values") == config.depth and calls.count("projection") == 1
    states = torch.cat([noise[:, None], samples[:, :-1]], dim=1)
    for segments in range(1, 5):
        again = student(states[:, :segments], text, mask)
        torch.testing.assert_close(again, samples[:, :segments], rtol=1e-9, atol=1e-10)


def test_what_the_mask_hides_is_not_read():
    student, (noise, text, mask) = double(ARDStudent(OBLONG, steps=2, history_layers=2)), drawn(OBLONG, (2, 4))
    other = torch.where(mask[..., None], text, torch.full_like(text, 1e3))
    assert torch.equal(student.sample(noise, text, mask), student.sample(noise, other, mask))
    assert not torch.equal(student.sample(noise, text, mask), student.sample(noise, 2 * text, mask))


SMALL = {"hidden_size": 48, "depth": 2, "num_heads": 2, "caption_channels": 16, "learned_null": False}
# As at 256 and at 1024 pixels, in all that a config decides but width, depth and the encoder's channels.
AT_256 = PixArtConfig.from_name("PixArt-alpha-256", **SMALL)
AT_1024 = PixArtConfig.from_name("PixArt-alpha-1024", **SMALL)


def their_outputs(model, config, x, t, text, mask):
    """Of diffusers' class, as its pipeline calls it."""
    height, width = (8.0 * side for side in config.input_hw)
    sizes = {
        "resolution": torch.tensor([[height, width]]).expand(len(x), -1),
        "aspect_ratio": torch.tensor([[height / width]]).expand(len(x), -1),
    }
    none = {"resolution": None, "aspect_ratio": None}
    return model(
        x, encoder_hidden_states=text, timestep=t, encoder_attention_mask=mask,
        added_cond_kwargs=sizes if config.size_conditions else none,
    ).sample  # fmt: skip


@pytest.mark.parametrize("config, tokens", [(AT_256, 256), (AT_1024, 4096)], ids=["256", "1024"])
def test_forward_equals_that_of_diffusers(tmp_path, config, tokens):
    diffusers = pytest.importorskip("diffusers")
    assert config.tokens == tokens and config.caption_tokens == 120 and config.size_conditions == (tokens == 4096)
    teacher = randomized(make_teacher(config)).double().eval()
    save_diffusers(tmp_path / "ours", teacher.state_dict(), config)
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(
        tmp_path / "ours", local_files_only=True, low_cpu_mem_usage=False, torch_dtype=torch.float64
    ).eval()
    lengths = (7, 120, 1) if tokens == 256 else (50,)
    x, text, mask = drawn(config, lengths)
    t = torch.tensor([999, 500, 0][: len(x)])
    with torch.no_grad():
        expected = their_outputs(theirs, config, x, t, text, mask)
        got = teacher(x, t, text, mask)
    assert got.shape == expected.shape and expected.std() > 0.1
    assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-12  # the issue asks for 1e-6


def test_weights_made_by_diffusers_give_their_outputs(tmp_path):
    """Each test above starts from ours; here theirs are drawn, saved by them, and read."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=24, num_layers=2, cross_attention_dim=48, sample_size=8,
        caption_channels=16, interpolation_scale=0.5, use_additional_conditions=True,
    ).double().eval()  # fmt: skip
    theirs.save_pretrained(tmp_path)
    state, config = load_diffusers(tmp_path)
    ours = load_teacher(state, num_heads=2, family="pixart", position_scale=0.5, caption_tokens=120)
    assert ours.config == config
    x, text, mask = drawn(config, (3, 80))
    t = torch.tensor([1, 998])
    with torch.no_grad():
        expected, got = their_outputs(theirs, config, x, t, text, mask), ours(x, t, text, mask)
    assert expected.std() > 0.01
    assert float((got - expected).abs().max() / expected.abs().max()) <= 1e-12  # the issue asks for 1e-6


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("history_layers, window, sink", [(0, None, 0), (2, None, 0), (3, 1, 1), (1, 2, 0)])
def test_flops_by_formula_are_those_counted(name, history_layers, window, sink):
    counts = flop_table(CONFIGS[name], steps=4, history_layers=history_layers, window=window, sink=sink)
    for row, values in counts.items():
        assert values["analytic"] == values["counted"], row


def count(config: PixArtConfig, steps: int, history_layers: int, mask: str, way: str) -> int:
    """FLOPs of sampling or of a training forward, on shapes alone."""
    with torch.device("meta"):
        student = ARDStudent(config, steps=steps, history_layers=history_layers, **MASKS[mask])
        states, conditions = torch.empty(1, steps, *config.image_shape), config.blank_conditions(1)
    with FlopCounterMode(display=False) as counter:
        student(states, *conditions) if way == "training forward" else student.sample(states[:, 0], *conditions)
    return counter.get_total_flops()


@pytest.mark.slow
@pytest.mark.parametrize("way", ["training forward", "sampling"])
@pytest.mark.parametrize("pixels", [256, *(pytest.param(p, marks=pytest.mark.exhaustive) for p in (512, 1024))])
def test_flops_of_the_whole_grid(pixels, way):
    """S 2 to 8, N 0 to 28, M1 to M4, by block: blocks are alike but for their own attention. At S = 4 counted whole.

    Tokens enter as a factor: those of 256 pixels tell, mostly.
    """
    config = PixArtConfig.from_name(f"PixArt-alpha-{pixels}")
    formula = analytic.student_sampling if way == "sampling" else analytic.student_forward
    one, two, cases = replace(config, depth=1), replace(config, depth=2), 0
    for steps in range(2, 9):
        without = count(one, steps, 0, "M4", way)
        plain = without + (config.depth - 1) * (count(two, steps, 0, "M4", way) - without)
        for mask, settings in MASKS.items():
            more = count(one, steps, 1, mask, way) - without
            for N in range(config.depth + 1):
                assert plain + N * more == formula(config, steps, N, **settings), (steps, mask, N)
                cases += 1
    assert cases == 7 * 4 * 29
    for N, mask in ((0, "M4"), (6, "M2"), (28, "M4")):
        assert count(config, 4, N, mask, way) == formula(config, 4, N, **MASKS[mask])


def history_table() -> str:
    """The table of docs/performance.md."""
    settings = [(N, mask) for N in (6, 28) for mask in ("M2", "M3", "M4")]
    heads = ["model, S = 4", "tokens", "FLOPs, N = 0", *(f"{mask}, N = {N}" for N, mask in settings), "text read once"]
    lines = [f"| {' | '.join(heads)} |", "| :-- |" + " --: |" * (len(heads) - 1)]
    for name in ("alpha-256", "alpha-512", "alpha-1024", "sigma-1024"):
        config = PixArtConfig.from_name(f"PixArt-{name}")
        baseline = analytic.baseline_sampling(config, 4)
        added = [analytic.history(config, 4, N, **MASKS[mask]) for N, mask in settings]
        saved = 3 * replace(config, size_conditions=False).context_flops
        shares = [
            *(f"+{100 * flops / baseline:.2f} %" for flops in added),
            f"-{100 * saved / (baseline + saved):.2f} %",
        ]
        lines.append(f"| PixArt-{name} | {config.tokens:,} | {baseline:,} | " + " | ".join(shares) + " |")
    return "\n".join(lines)


def test_the_documented_table_is_the_formulas():
    assert history_table() in (Path(__file__).parents[2] / "docs" / "performance.md").read_text()


def test_text_read_once_is_what_the_table_says():
    """Counted: S teacher forwards read the text S times, sampling once."""
    counts = counted_flops(OBLONG, steps=4, history_layers=0)
    assert 4 * counts["teacher_forward"] - counts["baseline_sampling"] == 3 * OBLONG.context_flops


@pytest.mark.slow
def test_ard_flops_of_a_preset():
    from command_line import ard

    result = ard("flops", "--model", "PixArt-sigma-512", "--steps", "2", "--history-layers", "1", "--json")
    assert result.exit_code == 0, result.output
    config = PixArtConfig.from_name("PixArt-sigma-512")
    assert config.tokens == 1024 and config.caption_tokens == 300
    counts = json.loads(result.output)
    for column in ("analytic", "counted"):
        assert counts["student_sampling"][column] == analytic.student_sampling(config, 2, 1)


def test_presets_that_are_not_there_are_named():
    from command_line import ard

    result = ard("flops", "--model", "PixArt-alpha-2K")
    assert result.exit_code == 2 and "PixArt-sigma-2K" in result.output
