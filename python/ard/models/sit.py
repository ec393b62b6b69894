"""SiT (arXiv 2401.08740), and REPA's SiT: DiT's network on the linear path. Time is the path's position, embedded as it
is: 0 is noise, 1 data. The output is the velocity data - noise; sigma channels, where there are any, are dropped."""

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


class SiT(Teacher, DiTTrunk):
    """The teacher: x (B, c, h, w), times (B,) in [0, 1], labels (B,) -> velocity (B, c, h, w)."""
