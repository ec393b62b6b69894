"""The sampler against an independent implementation in the manner of the published one: respaced betas, DDIM, CFG."""

import numpy as np
import pytest
import torch
from ard import DiT, DiTConfig
from ard.diffusion import generate
from ard.models.convention import TRAIN_STEPS, alphas_cumprod, respaced_timesteps
from torch import nn

CONFIG = DiTConfig(input_size=4, patch_size=2, in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=3)


class ElementwiseTeacher(nn.Module):
    """Stands in for a DiT in float64: an elementwise function of state, timestep and label, so that the sampler's
    algebra is checked to float64 rounding.
    """

    def __init__(self, learn_sigma=True):
        super().__init__()
        self.config = DiTConfig(**{**vars(CONFIG), "learn_sigma": learn_sigma})
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def null_conditions(self, labels):
        return (torch.full_like(labels, self.config.num_classes),)

    def forward(self, x, t, labels):
        offset = (t / 1000.0 + labels)[:, None, None, None]
        epsilon = torch.sin(1.3 * x + offset) + 0.5 * x
        return torch.cat([epsilon, 100.0 * x], dim=1) if self.config.learn_sigma else epsilon


def dit_teacher():
    torch.manual_seed(0)
    teacher = DiT(CONFIG)
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    return teacher.eval()


def inputs(device, dtype=torch.float64, batch=3):
    noise = torch.randn(batch, 4, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return noise.to(device, dtype), torch.arange(batch, device=device) % CONFIG.num_classes


@torch.no_grad()
def published_sampler(teacher, noise, labels, sampling_steps, cfg_scale, cfg_channels):
    """{index: (x0-prediction, next state)} with betas recomputed for the kept steps, epsilon re-derived from x0."""
    betas = np.linspace(1e-4, 0.02, 1000, dtype=np.float64)
    cumulative = np.cumprod(1.0 - betas)
    kept = [round(i * 999 / (sampling_steps - 1)) for i in range(sampling_steps)]
    new_betas, last = [], 1.0
    for t in kept:
        new_betas.append(1 - cumulative[t] / last)
        last = cumulative[t]
    a = np.cumprod(1.0 - np.array(new_betas))
    a_prev = np.append(1.0, a[:-1])
    B, channels, null = len(labels), noise.shape[1], teacher.config.num_classes
    x, visited = noise.double(), {}
    for i in reversed(range(sampling_steps)):
        both = torch.cat([x, x]).to(teacher.weight.dtype)
        t = torch.full((2 * B,), kept[i], device=x.device)
        out = teacher(both, t, torch.cat([labels, torch.full_like(labels, null)])).double()
        guided, rest = out[:, :cfg_channels], out[:, cfg_channels:]
        conditional, unconditional = guided[:B], guided[B:]
        half = unconditional + cfg_scale * (conditional - unconditional)
        epsilon = torch.cat([half, rest[:B]], dim=1)[:, :channels]
        x0 = np.sqrt(1.0 / a[i]) * x - np.sqrt(1.0 / a[i] - 1) * epsilon
        epsilon = (np.sqrt(1.0 / a[i]) * x - x0) / np.sqrt(1.0 / a[i] - 1)
        x = x0 * np.sqrt(a_prev[i]) + np.sqrt(1 - a_prev[i]) * epsilon
        visited[i] = x0, x
    return visited


def test_respaced_timesteps():
    kept = respaced_timesteps(25)
    assert kept[:4] == (0, 42, 83, 125) and kept[-2:] == (957, 999) and len(kept) == 25
    with pytest.raises(ValueError, match="sampling_steps: got 1; expected 2 to 1000"):
        respaced_timesteps(1)
    assert respaced_timesteps(2) == (0, 999)
    assert respaced_timesteps(TRAIN_STEPS) == tuple(range(1000))
    assert all(len(set(respaced_timesteps(n))) == n for n in (3, 7, 50, 250, 999))


def test_noise_schedule():
    a = alphas_cumprod()
    assert a.dtype == torch.float64 and a.shape == (1000,)
    assert a[0].item() == pytest.approx(1 - 1e-4, rel=1e-15)
    assert (a[1] / a[0]).item() == pytest.approx(1 - (1e-4 + (0.02 - 1e-4) / 999), rel=1e-14)
    assert (a[-1] / a[-2]).item() == pytest.approx(0.98, rel=1e-14)


@pytest.mark.parametrize(
    "learn_sigma, cfg_scale, cfg_channels", [(True, 1.5, 3), (True, 4.0, None), (False, 1.5, 3), (True, 1.0, 3)]
)
def test_matches_the_published_sampler(learn_sigma, cfg_scale, cfg_channels, device):
    teacher, (noise, labels) = ElementwiseTeacher(learn_sigma).to(device), inputs(device)
    keep = (15, 10, 5, 0)
    batch = generate(
        teacher, noise, labels, sampling_steps=25, keep=keep, cfg_scale=cfg_scale, cfg_channels=cfg_channels
    )
    visited = published_sampler(teacher, noise, labels, 25, cfg_scale, cfg_channels or CONFIG.in_channels)
    for i, index in enumerate(keep):
        torch.testing.assert_close(batch.x0[:, i], visited[index][0], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(batch.ode[:, i], visited[index][1], rtol=1e-9, atol=1e-11)
    assert torch.equal(batch.x0[:, -1], batch.ode[:, -1])


def test_guided_channels_differ_from_all_channels(device):
    """With cfg_channels=3 the fourth epsilon channel is the conditional one, whatever the scale."""
    teacher, (noise, labels) = ElementwiseTeacher().to(device), inputs(device)
    plain, three, every = (
        generate(teacher, noise, labels, keep=(24,), cfg_scale=scale, cfg_channels=channels).x0[:, 0]
        for scale, channels in ((1.0, 3), (3.0, 3), (3.0, None))
    )
    assert torch.equal(plain[:, 3:], three[:, 3:]) and not torch.equal(three[:, 3:], every[:, 3:])
    assert torch.equal(three[:, :3], every[:, :3]) and not torch.equal(plain[:, :3], three[:, :3])


def test_keep_stops_early_and_samples_are_independent(device):
    teacher, (noise, labels) = ElementwiseTeacher().to(device), inputs(device)
    calls = []
    hook = teacher.register_forward_pre_hook(lambda module, args: calls.append(args[1][0].item()))
    part = generate(teacher, noise, labels, sampling_steps=5, keep=(4, 2))
    hook.remove()
    assert calls == [999, 749, 500]  # the original timesteps; indices 1 and 0 are not visited
    alone = generate(teacher, noise[1:2], labels[1:2], sampling_steps=5, keep=(4, 2))
    assert torch.equal(alone.x0, part.x0[1:2]) and torch.equal(alone.ode, part.ode[1:2])


def test_unguided_sampling_evaluates_once_per_step(device):
    teacher, (noise, labels) = ElementwiseTeacher().to(device), inputs(device)
    rows = []
    teacher.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    generate(teacher, noise, labels, sampling_steps=3, keep=(0,), cfg_scale=1.0)
    generate(teacher, noise, labels, sampling_steps=3, keep=(0,), cfg_scale=1.5)
    assert rows == [3, 3, 3, 6, 6, 6]


def test_dit_teacher_agrees_with_the_published_sampler(device):
    """A float32 network inside float64 algebra: 25 evaluations amplify rounding, so the bound is loose by design."""
    teacher, (noise, labels) = dit_teacher().to(device), inputs(device, torch.float32)
    batch = generate(teacher, noise, labels)
    visited = published_sampler(teacher, noise, labels, 25, 1.5, 3)
    error = (batch.x0[:, -1] - visited[0][0]).norm() / visited[0][0].norm()
    assert batch.x0.dtype == torch.float32 and error < 1e-4


def test_states_and_targets(device):
    teacher, (noise, labels) = dit_teacher().to(device), inputs(device, torch.float32)
    batch = generate(teacher, noise, labels, sampling_steps=6, keep=(4, 1, 0))
    for kind in ("x0", "ode"):
        kept = getattr(batch, kind)
        assert kept.shape == (3, 3, 4, 4, 4) and not kept.requires_grad
        assert torch.equal(batch.targets(kind), kept)
        assert torch.equal(batch.states(kind)[:, 0], noise) and torch.equal(batch.states(kind)[:, 1:], kept[:, :-1])
    assert batch.conditions == (labels,)


def test_bfloat16_teacher_keeps_float32_states(device):
    teacher, (noise, labels) = dit_teacher().to(device, torch.bfloat16), inputs(device, torch.bfloat16)
    batch = generate(teacher, noise, labels, sampling_steps=3, keep=(1, 0))
    assert batch.x0.dtype == torch.float32 and batch.x0.isfinite().all()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"keep": (5, 10)}, r"keep: got \(5, 10\); expected strictly descending"),
        ({"keep": ()}, r"keep: got \(\)"),
        ({"keep": (25, 0)}, r"keep: got \(25, 0\)"),
        ({"keep": (3, -1)}, r"keep: got \(3, -1\)"),
        ({"sampling_steps": 1001}, r"sampling_steps: got 1001; expected 2 to 1000"),
        ({"cfg_channels": -1}, r"cfg_channels: got -1"),
    ],
)
def test_bad_options(options, message):
    teacher, (noise, labels) = ElementwiseTeacher(), inputs("cpu")
    with pytest.raises(ValueError, match=message):
        generate(teacher, noise, labels, **options)
    with pytest.raises(ValueError, match=r"kind: got 'x1'; expected one of"):
        generate(teacher, noise, labels, sampling_steps=2, keep=(0,)).states("x1")
