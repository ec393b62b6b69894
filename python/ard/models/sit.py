"""SiT (arXiv 2401.08740) and REPA (arXiv 2410.06940): DiT's network on the linear path, its time embedded as it is.

The same tensors, and opposite directions. SiT: time 0 is noise, 1 data, and the output the velocity data - noise. REPA:
time 1 is noise, 0 data, and the output noise - data. SiT's files have sigma channels, which are dropped.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ard.models.convention import Convention
from ard.models.dit import DiTConfig, DiTTrunk
from ard.models.trunk import Teacher


@dataclass(frozen=True)
class SiTConfig(DiTConfig):
    """Sizes of a SiT."""

    family: str = field(default="sit", kw_only=True)

    CONVENTION: ClassVar = Convention("velocity", "linear", noise_time=0.0, data_time=1.0)


@dataclass(frozen=True)
class REPAConfig(DiTConfig):
    """Sizes of REPA's SiT."""

    family: str = field(default="repa", kw_only=True)
    learn_sigma: bool = False

    CONVENTION: ClassVar = Convention("velocity", "linear", noise_time=1.0, data_time=0.0, velocity_to_noise=True)


class SiT(Teacher, DiTTrunk):
    """The teacher: x (B, c, h, w), times (B,) in [0, 1], labels (B,) -> velocity (B, c, h, w), SiT's or REPA's."""
