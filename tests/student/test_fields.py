"""Teachers as fields: guidance and ODE solvers against plain loops in float64, for every prediction and direction."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from ard import DiTConfig
from ard.diffusion import generate, trajectory
from ard.models.convention import Convention, alphas_cumprod
from ard.models.families import make_teacher
from ard.models.lightningdit import LightningDiTConfig
from ard.models.sit import SiTConfig
from student.test_families import double
from torch import Tensor, nn

SHAPE = (4, 4, 4)


class Stand(nn.Module):
    """A teacher that is an elementwise function of state, time and label, in any convention."""

    def __init__(self, convention: Convention, velocity):
        super().__init__()
        self.weight, self.velocity, self.seen = torch.zeros((), dtype=torch.float64), velocity, []

        @dataclass(frozen=True)
        class Config(SiTConfig):
            CONVENTION: ClassVar = convention
            family: str = field(default="stand", kw_only=True)

        self.config = Config(input_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)

    def null_conditions(self, labels: Tensor):
        return (torch.full_like(labels, 3),)

    def forward(self, x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        self.seen += [(float(time), len(x)) for time in t[:1]]
        position = t.double() / 1000 if self.config.CONVENTION.schedule == "ddpm" else self.position(t)
        return self.velocity(x, position[:, None, None, None], labels[:, None, None, None])

    def position(self, t: Tensor) -> Tensor:
        convention = self.config.CONVENTION
        return (t - convention.noise_time) / (convention.data_time - convention.noise_time)


def field_of(x, p, labels):
    return torch.sin(1.3 * x + p + labels) - 0.3 * x


FLOW = Convention("velocity", "linear", noise_time=0.0, data_time=1.0)


def inputs(batch: int = 3) -> tuple[Tensor, Tensor]:
    noise = torch.randn(batch, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return noise, torch.arange(batch) % 3


def guided_plainly(x, p, labels, scale, channels, interval):
    conditional = field_of(x, p, labels.view(-1, 1, 1, 1))
    if interval and not interval[0] <= p <= interval[1]:
        return conditional
    unconditional = field_of(x, p, torch.full_like(labels, 3).view(-1, 1, 1, 1))
    out = conditional.clone()
    out[:, :channels] = unconditional[:, :channels] + scale * (conditional - unconditional)[:, :channels]
    return out


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint"])
@pytest.mark.parametrize("shift", [0.0, 0.3, 3.0])
@pytest.mark.parametrize("interval", [None, (0.3, 1.0)])
def test_solvers_equal_plain_loops(solver, shift, interval):
    (noise, labels), times, scale, channels = inputs(), 8, 2.5, 3
    got = trajectory(
        Stand(FLOW, field_of), noise, labels, solver=solver, times=times, shift=shift, cfg_scale=scale,
        cfg_channels=channels, cfg_interval=interval,
    )  # fmt: skip
    grid = [i / (times - 1) for i in range(times)]
    grid = [shift * p / (1 + (shift - 1) * p) for p in grid] if shift else grid
    x, expected = noise, [noise]
    for p, q in itertools.pairwise(grid):
        v = lambda x, p: guided_plainly(x, p, labels, scale, channels, interval)  # noqa: E731
        if solver == "euler":
            x = x + (q - p) * v(x, p)
        elif solver == "heun":
            first = v(x, p)
            x = x + (q - p) * (first + v(x + (q - p) * first, q)) / 2
        else:
            x = x + (q - p) * v(x + (q - p) / 2 * v(x, p), (p + q) / 2)
        expected.append(x)
    assert got.shape == (3, times, *SHAPE) and torch.equal(got[:, 0], noise)
    torch.testing.assert_close(got, torch.stack(expected, dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", [
    SiTConfig(input_size=4, in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=3),
    LightningDiTConfig(input_size=4, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=3),
], ids=lambda config: config.family)  # fmt: skip
def test_trajectories_of_real_networks(config):
    """Guidance of three channels by two calls of the teacher, and Euler steps, written out."""
    teacher, (noise, labels) = double(make_teacher(config)), inputs()
    null, x, states = torch.full_like(labels, 3), noise, [noise]
    with torch.no_grad():
        for i in range(5):
            t = torch.full((3,), i / 5, dtype=torch.float64)
            conditional, unconditional = teacher(x, t, labels), teacher(x, t, null)
            v = torch.cat([(unconditional + 1.5 * (conditional - unconditional))[:, :3], conditional[:, 3:]], dim=1)
            x = x + v / 5
            states.append(x)
    got = trajectory(teacher, noise, labels, times=6, cfg_scale=1.5)
    torch.testing.assert_close(got, torch.stack(states, dim=1), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("convention", [
    Convention("velocity", "linear", noise_time=1000.0, data_time=0.0, velocity_to_noise=True),
    Convention("x0", "linear", noise_time=0.0, data_time=1.0),
    Convention("x0", "linear", noise_time=1.0, data_time=0.0),
], ids=str)  # fmt: skip
def test_one_field_in_every_convention(convention):
    """The same velocity, told in other words, walks the same way; so do its x0-predictions."""
    noise, labels = inputs()

    def told(x, p, labels):
        v = field_of(x, p, labels)
        return x + (1 - p) * v if convention.prediction == "x0" else -v

    for solver in ("euler", "midpoint"):
        how = {"sampling_steps": 6, "keep": (4, 1, 0), "solver": solver, "shift": 0.5, "cfg_scale": 1.0}
        expected = generate(Stand(FLOW, field_of), noise, labels, **how)
        got = generate(Stand(convention, told), noise, labels, **how)
        for kind in ("x0", "ode"):
            torch.testing.assert_close(got.targets(kind), expected.targets(kind), rtol=1e-9, atol=1e-9)
    if convention.prediction == "x0":
        with pytest.raises(ValueError, match=r"solver: got 'heun'; expected 'euler' or 'midpoint'"):
            trajectory(Stand(convention, told), noise, labels, solver="heun")


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_ddim_in_every_prediction(prediction):
    noise, labels = inputs()
    a = alphas_cumprod()

    def told(x, p, labels):
        epsilon, here = field_of(x, p, labels), a[(p * 1000).round().long()]
        x0 = (x - (1 - here).sqrt() * epsilon) / here.sqrt()
        return x0 if prediction == "x0" else here.sqrt() * epsilon - (1 - here).sqrt() * x0

    expected = generate(Stand(Convention("epsilon", "ddpm", 999.0, 0.0), field_of), noise, labels)
    got = generate(Stand(Convention(prediction, "ddpm", 999.0, 0.0), told), noise, labels)
    for kind in ("x0", "ode"):
        torch.testing.assert_close(got.targets(kind), expected.targets(kind), rtol=1e-6, atol=1e-6)


def test_x0_is_where_the_velocity_leads_and_the_last_state_is_the_last_prediction():
    noise, labels = inputs()
    batch = generate(Stand(FLOW, field_of), noise, labels, sampling_steps=4, keep=(3, 0), cfg_scale=1.0)
    torch.testing.assert_close(batch.x0[:, 0], noise + field_of(noise, 0.0, labels.view(-1, 1, 1, 1)))
    torch.testing.assert_close(batch.x0[:, 1], batch.ode[:, 1])


def test_guidance_outside_its_interval_costs_one_forward():
    (noise, labels), stand = inputs(), Stand(FLOW, field_of)
    trajectory(stand, noise, labels, times=5, cfg_scale=2.0, cfg_interval=0.5)  # from there to the data
    assert stand.seen == [(0.0, 3), (0.25, 3), (0.5, 6), (0.75, 6)]


def test_an_interval_end_that_a_grid_rounds_away_is_in_it():
    down = Convention("velocity", "linear", noise_time=1.0, data_time=0.0, velocity_to_noise=True)
    assert down.grid(10)[8:] != (0.2, 0.1, 0.0) and down.grid(10, 0.3)[-1] == 0.0
    (noise, labels), stand = inputs(), Stand(down, field_of)
    trajectory(stand, noise, labels, times=11, cfg_scale=2.0, cfg_interval=(0.7, 0.1))
    assert [len_ for _, len_ in stand.seen] == [3, 3, 3, 6, 6, 6, 6, 6, 6, 6]


def test_an_empty_batch():
    noise, labels = inputs()
    assert trajectory(Stand(FLOW, field_of), noise[:0], labels[:0], times=3, cfg_scale=2.0).shape == (0, 3, *SHAPE)


def test_kept_times():
    flow = SiTConfig().CONVENTION
    assert flow.kept_times(25, (15, 10, 5, 0)) == (0.4, 0.6, 0.8, 1.0)
    assert flow.grid(2, 0.5) == pytest.approx((0.0, 1 / 3, 1.0))
    ddpm = DiTConfig().CONVENTION
    assert ddpm.kept_times(25, (15, 10, 5, 0)) == (583.0, 375.0, 166.0, 0.0)  # of the states, a step after the index


@pytest.mark.parametrize(
    "options, message",
    [
        ({"solver": "ddim"}, r"solver: got 'ddim'; expected one of \('euler', 'heun', 'midpoint'\) for .*'linear'"),
        ({"times": 1}, r"times: got 1; expected at least 2"),
        ({"shift": -1.0}, r"grid: got steps=25, shift=-1\.0; expected"),
        ({"cfg_interval": (0.1,)}, r"cfg_interval: got \[0\.1\]; expected two times"),
        ({"cfg_interval": (500, 1000)}, r"cfg_interval: got \[500\.0, 1000\.0\]; expected two times within \[0, 1\]"),
        ({"cfg_interval": (0.1, float("nan"))}, r"cfg_interval: got \[0\.1, nan\]; expected two times within \[0, 1\]"),
        ({"cfg_channels": -1}, r"cfg_channels: got -1"),
        ({"cfg_scale": float("nan")}, r"cfg_scale: got nan; expected a finite number"),
    ],
)
def test_bad_options(options, message):
    noise, labels = inputs()
    with pytest.raises(ValueError, match=message):
        trajectory(Stand(FLOW, field_of), noise, labels, **options)


def test_dit_walks_by_ddim_alone():
    config = DiTConfig(input_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    teacher, (noise, labels) = make_teacher(config), inputs()
    with pytest.raises(ValueError, match=r"solver: got 'euler'; expected one of \('ddim',\) for the schedule 'ddpm'"):
        trajectory(teacher, noise, labels)
    with pytest.raises(ValueError, match=r"shift: got 2\.0; expected 0 for the timesteps of DDPM"):
        trajectory(teacher, noise, labels, solver="ddim", shift=2.0)
    states = trajectory(teacher, noise.float(), labels, solver="ddim", times=26, cfg_scale=1.5)
    batch = generate(teacher, noise.float(), labels)
    assert states.shape == (3, 26, *SHAPE)
    assert torch.equal(states[:, [10, 15, 20, 25]], batch.ode)
    with pytest.raises(ValueError, match=r"Convention: epsilon on the linear path"):
        Convention("epsilon", "linear", 0.0, 1.0)
