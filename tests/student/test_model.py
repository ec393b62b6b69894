"""Teacher and student against an independent dense implementation; cached sampling against the training forward."""

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from ard import ARDStudent, DiT, DiTConfig
from ard.models.layers import sincos_position_embedding
from ard.training.losses import trajectory_loss

SMALL = DiTConfig(
    input_size=8, patch_size=2, in_channels=3, hidden_size=32, depth=3, num_heads=2, num_classes=5, learn_sigma=True
)
MASKS = {
    "M1": {"window": 1, "sink": 0},
    "M2": {"window": 2, "sink": 0},
    "M3": {"window": 1, "sink": 1},
    "M4": {"window": None, "sink": 0},
}


@pytest.fixture(autouse=True)
def _ieee(monkeypatch):
    """The convolution of `dense_model` in float32 on a GPU too, where cuDNN would round its inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def randomized(model, seed=0):
    """Give every trainable weight a random value: the initialization leaves the gates zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                scale = 1.0 / math.sqrt(parameter[0].numel()) if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def student_and_inputs(device, mask="M4", history_layers=2, steps=4, config=SMALL, batch=2):
    student = randomized(ARDStudent(config, steps=steps, history_layers=history_layers, **MASKS[mask]))
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(batch, steps, config.in_channels, *config.input_hw, generator=generator)
    labels = torch.randint(config.num_classes, (batch,), generator=generator)
    return student.to(device), states.to(device), labels.to(device)


@cache
def allowed_pairs(T, L, *, history, window, sink):
    """Dense mask (T, T), pair by pair from the definition."""
    allowed = torch.zeros(T, T, dtype=torch.bool)
    for i in range(T):
        for j in range(T):
            query, key = i // L, j // L
            near = window is None or query - key < window
            allowed[i, j] = key == query or (history and key < query and (near or key < sink))
    return allowed


def dense_model(weights, config, states, timesteps_BS, labels, final_names, *, history_layers=0, window=None, sink=0):
    """The published computation written plainly: convolution patches, adaLN per token, dense masked softmax.

    Returns all channels of the final layers, (B, S, out, h, w).
    """
    B, S = states.shape[:2]
    (rows, columns), p, C, H = config.grid_hw, config.patch_size, config.hidden_size, config.num_heads
    L, T, dtype, device = rows * columns, S * rows * columns, states.dtype, states.device

    def linear(name, x):
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def modulated(x, shift, scale):
        centered = x - x.mean(-1, keepdim=True)
        return centered / (centered.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + scale) + shift

    patches = F.conv2d(
        states.flatten(0, 1), weights["x_embedder.proj.weight"], weights["x_embedder.proj.bias"], stride=p
    )
    x = (patches.flatten(2).transpose(1, 2) + weights["pos_embed"]).reshape(B, T, C)
    half = config.frequency_embedding_size // 2
    index = torch.arange(half, dtype=dtype, device=device)
    angles = timesteps_BS.to(dtype)[..., None] * torch.exp(-math.log(10000) * index / half)
    t = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], -1))))
    c = t + weights["y_embedder.embedding_table.weight"][labels][:, None]
    c_BTC = c.repeat_interleave(L, dim=1)

    for i in range(config.depth):
        allowed = allowed_pairs(T, L, history=i < history_layers, window=window, sink=sink).to(device)
        rows_ = linear(f"blocks.{i}.adaLN_modulation.1", F.silu(c_BTC)).chunk(6, -1)
        qkv = linear(f"blocks.{i}.attn.qkv", modulated(x, rows_[0], rows_[1]))
        q, k, v = qkv.reshape(B, T, 3, H, C // H).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-1, -2) / math.sqrt(C // H)).masked_fill(~allowed, -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, C)
        x = x + rows_[2] * linear(f"blocks.{i}.attn.proj", mixed)
        hidden = F.gelu(linear(f"blocks.{i}.mlp.fc1", modulated(x, rows_[3], rows_[4])), approximate="tanh")
        x = x + rows_[5] * linear(f"blocks.{i}.mlp.fc2", hidden)

    images = []
    for s, name in enumerate(final_names):
        shift, scale = linear(f"{name}.adaLN_modulation.1", F.silu(c[:, s : s + 1])).chunk(2, -1)
        tokens = linear(f"{name}.linear", modulated(x[:, s * L : (s + 1) * L], shift, scale))
        tokens = tokens.reshape(B, rows, columns, p, p, config.out_channels)
        images.append(torch.einsum("nhwpqc->nchpwq", tokens).reshape(B, config.out_channels, rows * p, columns * p))
    return torch.stack(images, dim=1)


def assert_as_accurate_as_plain(actual, compute, what):
    """`compute(dtype)` is the plain computation: err(actual) <= 1.5 err(plain fp32) + rounding floor, in the 2-norm."""
    exact, plain = compute(torch.float64), compute(torch.float32)
    floor = torch.finfo(torch.float32).eps * exact.norm()
    assert (actual - exact).norm() <= 1.5 * (plain - exact).norm() + floor, what


def cast(state, dtype):
    return {name: tensor.detach().to(dtype) for name, tensor in state.items()}


def test_state_dict_has_the_public_names_and_shapes():
    config = DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=2, num_classes=5)
    C = 32
    expected = {
        "pos_embed": (1, 16, C),
        "x_embedder.proj.weight": (C, 4, 2, 2),
        "x_embedder.proj.bias": (C,),
        "t_embedder.mlp.0.weight": (C, 256),
        "t_embedder.mlp.0.bias": (C,),
        "t_embedder.mlp.2.weight": (C, C),
        "t_embedder.mlp.2.bias": (C,),
        "y_embedder.embedding_table.weight": (6, C),
        "final_layer.linear.weight": (2 * 2 * 8, C),
        "final_layer.linear.bias": (2 * 2 * 8,),
        "final_layer.adaLN_modulation.1.weight": (2 * C, C),
        "final_layer.adaLN_modulation.1.bias": (2 * C,),
    }
    for name, shape in {
        "attn.qkv": (3 * C, C),
        "attn.proj": (C, C),
        "mlp.fc1": (4 * C, C),
        "mlp.fc2": (C, 4 * C),
        "adaLN_modulation.1": (6 * C, C),
    }.items():
        expected[f"blocks.0.{name}.weight"], expected[f"blocks.0.{name}.bias"] = shape, shape[:1]
    assert {name: tuple(tensor.shape) for name, tensor in DiT(config).state_dict().items()} == expected

    final = {name for name in expected if name.startswith("final_layer.")}
    later = {name.replace("final_layer", f"final_layer{i}") for name in final for i in (2, 3)}
    assert set(ARDStudent(config, steps=3, history_layers=1).state_dict()) == set(expected) | later


def test_parameter_counts_of_the_published_sizes():
    config = DiTConfig.from_name("DiT-XL/2")
    assert (config.hidden_size, config.depth, config.head_dim, config.tokens) == (1152, 28, 72, 256)
    with torch.device("meta"):
        models = DiT(config), ARDStudent(config, steps=4, history_layers=6)
    teacher, student = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models)
    assert teacher == 674_834_720
    assert student == 682_914_944
    assert not models[1].pos_embed.requires_grad


def test_position_embedding_order():
    """Columns in the first half of C, rows in the second; sin before cos; row-major tokens."""
    C, rows, columns = 24, 3, 5
    table = sincos_position_embedding(C, (rows, columns))
    for row, column in ((0, 0), (1, 4), (2, 3)):
        for i in range(C // 4):
            omega = 10000 ** (-i / (C / 4))
            expected = [
                math.sin(column * omega),
                math.cos(column * omega),
                math.sin(row * omega),
                math.cos(row * omega),
            ]
            actual = table[row * columns + column, i :: C // 4].tolist()
            assert actual == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        DiTConfig(
            input_size=(6, 12),
            patch_size=3,
            in_channels=2,
            hidden_size=48,
            depth=2,
            num_heads=3,
            mlp_ratio=3.0,
            num_classes=2,
            learn_sigma=False,
        ),
    ],
    ids=["square", "oblong-no-sigma"],
)
def test_teacher_matches_dense(config, device):
    teacher = randomized(DiT(config)).to(device)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(3, config.in_channels, *config.input_hw, generator=generator).to(device)
    t, labels = torch.tensor([[999, 0, 41], [0, config.num_classes, 1]], device=device)

    def dense(dtype):
        weights = cast(teacher.state_dict(), dtype)
        return dense_model(weights, config, x[:, None].to(dtype), t[:, None], labels, ["final_layer"])[:, 0]

    actual = teacher(x, t, labels)
    assert actual.shape == (3, config.out_channels, *config.input_hw)
    assert_as_accurate_as_plain(actual, dense, "output")


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("history_layers", [0, 2, 3])
def test_student_forward_and_gradients_match_dense(mask, history_layers, device):
    student, states, labels = student_and_inputs(device, mask, history_layers)
    targets = torch.randn(states.shape, generator=torch.Generator().manual_seed(3)).to(device)
    names = ["final_layer", "final_layer2", "final_layer3", "final_layer4"]
    timesteps = torch.tensor([[999.0, 749.25, 499.5, 249.75]], device=device)

    def dense(dtype):
        weights = {name: tensor.requires_grad_() for name, tensor in cast(student.state_dict(), dtype).items()}
        predictions = dense_model(
            weights,
            student.config,
            states.to(dtype),
            timesteps,
            labels,
            names,
            history_layers=history_layers,
            **MASKS[mask],
        )[:, :, : student.config.in_channels]
        segment_losses = [F.mse_loss(predictions[:, s], targets[:, s].to(dtype)) for s in range(4)]
        return weights, predictions, torch.stack(segment_losses).mean()

    runs = {dtype: dense(dtype) for dtype in (torch.float64, torch.float32)}
    predictions = student(states, labels)
    loss = trajectory_loss(predictions, targets)
    loss.backward()
    assert_as_accurate_as_plain(predictions, lambda dtype: runs[dtype][1], "predictions")
    assert_as_accurate_as_plain(loss, lambda dtype: runs[dtype][2], "loss")

    gradients = {dtype: torch.autograd.grad(run[2], list(run[0].values())) for dtype, run in runs.items()}
    for index, (name, weight) in enumerate(student.named_parameters()):
        assert name == list(runs[torch.float64][0])[index]
        if not weight.requires_grad:
            continue
        exact, plain = (gradients[dtype][index] for dtype in (torch.float64, torch.float32))
        floor = torch.finfo(torch.float32).eps * exact.norm()
        assert (weight.grad - exact).norm() <= 2 * (plain - exact).norm() + floor, name


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("history_layers", [0, 2, 3])
def test_sampling_equals_forward_on_its_own_predictions(mask, history_layers, device):
    student, states, labels = student_and_inputs(device, mask, history_layers)
    cache = student.new_cache(len(labels))
    predictions = student.sample(states[:, 0], labels, cache=cache)
    own_states = torch.cat([states[:, :1], predictions[:, :-1]], dim=1)
    teacher_forced = student(own_states, labels).detach()

    def dense(dtype):
        return dense_model(
            cast(student.state_dict(), dtype),
            student.config,
            own_states.to(dtype),
            student.timesteps(4, states.device),
            labels,
            ["final_layer", "final_layer2", "final_layer3", "final_layer4"],
            history_layers=history_layers,
            **MASKS[mask],
        )[:, :, : student.config.in_channels]

    assert_as_accurate_as_plain(predictions, dense, "sample")
    assert_as_accurate_as_plain(teacher_forced, dense, "forward")
    again = student.sample(states[:, 0], labels, cache=cache)
    assert torch.equal(again, predictions), "a reused cache must not leak the previous call"


def test_history_reaches_only_the_allowed_segments(device):
    """Perturb one state: under each mask exactly the segments that may see it (through all layers) change."""
    reached = {"M1": [1], "M2": [1, 2, 3], "M3": [1], "M4": [1, 2, 3]}
    for mask, expected in reached.items():
        student, states, labels = student_and_inputs(device, mask, history_layers=3)
        before = student(states, labels)
        states[:, 1] += 1.0
        changed = (student(states, labels) - before).abs().amax(dim=(0, 2, 3, 4)) > 0
        assert changed.nonzero().flatten().tolist() == expected, mask


def test_fewer_states_give_the_first_predictions(device):
    student, states, labels = student_and_inputs(device)
    whole = student(states, labels)
    for segments in (1, 2, 3):
        part = student(states[:, :segments], labels)
        assert part.shape == (2, segments, 3, 8, 8)
        torch.testing.assert_close(part, whole[:, :segments])


def test_one_step_student_is_the_teacher_at_999(device):
    teacher = randomized(DiT(SMALL)).to(device)
    student = ARDStudent.from_teacher(teacher, steps=1, history_layers=2)
    x, labels = torch.randn(2, 3, 8, 8, device=device), torch.tensor([1, 4], device=device)
    expected = teacher(x, torch.full((2,), 999, device=device), labels)[:, :3]
    torch.testing.assert_close(student(x[:, None], labels)[:, 0], expected)


def test_from_teacher_copies_every_weight(device):
    teacher = randomized(DiT(SMALL)).to(device)
    student = ARDStudent.from_teacher(teacher, steps=3, history_layers=1, window=2, sink=1)
    source = teacher.state_dict()
    for name, tensor in student.state_dict().items():
        original = source[name.replace("final_layer2", "final_layer").replace("final_layer3", "final_layer")]
        assert torch.equal(tensor, original) and tensor.data_ptr() != original.data_ptr()
    assert not student.pos_embed.requires_grad and student.blocks[0].attn.qkv.weight.requires_grad


def test_fresh_models_predict_zero(device):
    """adaLN-Zero: gates and final linears start at zero."""
    x, (t, labels) = torch.randn(2, 3, 8, 8, device=device), torch.tensor([[5, 900], [0, 1]], device=device)
    assert not DiT(SMALL).to(device)(x, t, labels).any()
    assert not ARDStudent(SMALL, steps=2, history_layers=1).to(device).sample(x, labels).any()


def test_null_conditions_are_the_last_row(device):
    teacher, labels = DiT(SMALL).to(device), torch.tensor([0, 1], device=device)
    assert teacher.null_conditions(labels)[0].tolist() == [SMALL.num_classes] * 2
    with pytest.raises(ValueError, match=r"conditions: got 0; expected 1: labels"):
        teacher(torch.zeros(2, 3, 8, 8, device=device), labels)


def test_compiles_without_graph_breaks(device):
    student, states, labels = student_and_inputs(device)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    compiled(states, labels).square().mean().backward()
    compiled_gradient = student.blocks[0].attn.qkv.weight.grad.clone()
    student.zero_grad()
    student(states, labels).square().mean().backward()
    torch.testing.assert_close(compiled_gradient, student.blocks[0].attn.qkv.weight.grad)


def test_empty_batch(device):
    student, states, labels = student_and_inputs(device)
    assert student(states[:0], labels[:0]).shape == (0, 4, 3, 8, 8)
    assert student.sample(states[:0, 0], labels[:0]).shape == (0, 4, 3, 8, 8)


def test_bfloat16_autocast_sampling(device):
    student, states, labels = student_and_inputs(device)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        predictions = student.sample(states[:, 0], labels)
        own_states = torch.cat([states[:, :1], predictions[:, :-1].float()], dim=1)
        expected = student(own_states, labels)
    exact = student(own_states, labels)
    bound = 1.5 * (expected - exact).norm() + torch.finfo(torch.bfloat16).eps * exact.norm()
    assert (predictions - exact).norm() <= bound


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: DiTConfig(input_size=9), r"input_size is 9; expected"),
        (lambda: DiTConfig(hidden_size=100, num_heads=3), r"hidden_size is 100; expected"),
        (lambda: DiTConfig(hidden_size=8, num_heads=2), r"hidden_size is 8 with num_heads=2, heads of width 4"),
        (lambda: DiTConfig(hidden_size=264, num_heads=1), r"heads of width 264; expected a multiple of 8 up to 256"),
        (lambda: DiTConfig(depth=0), r"depth is 0; expected within \[1, "),
        (lambda: DiTConfig.from_name("DiT-XXL/2"), r"'DiT-XXL/2'; expected one of DiT-S/2"),
        (lambda: ARDStudent(SMALL, steps=0), r"steps is 0; expected at least 1"),
        (lambda: DiT(SMALL)(torch.zeros(1, 3, 8, 6), torch.zeros(1), torch.zeros(1).long()), r"x: got \(1, 3, 8, 6\)"),
        (lambda: DiT(SMALL)(torch.zeros(1, 3, 8, 8), torch.zeros(2), torch.zeros(1).long()), r"t: got \(2,\)"),
        (lambda: DiT(SMALL)(torch.zeros(1, 3, 8, 8), torch.zeros(1), torch.zeros(1)), r"labels: got .*float32"),
        (
            lambda: ARDStudent(SMALL, steps=2, history_layers=1)(torch.zeros(1, 3, 3, 8, 8), torch.zeros(1).long()),
            r"states: got 3 segments; expected 1 to steps=2",
        ),
        (lambda: trajectory_loss(torch.zeros(1, 2), torch.zeros(2, 2)), r"targets are \(2, 2\); expected"),
    ],
)
def test_bad_input_names_argument_expected_got(call, message):
    with pytest.raises(ValueError, match=message):
        call()
