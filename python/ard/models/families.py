"""The families of models: one line each. docs/add_a_model.md says what a new one takes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ard.models.config import ModelConfig
from ard.models.dit import DiT, DiTConfig, DiTTrunk
from ard.models.lightningdit import LightningDiT, LightningDiTConfig, LightningDiTTrunk
from ard.models.pixart import PixArt, PixArtConfig, PixArtTrunk
from ard.models.sit import REPAConfig, SiT, SiTConfig
from ard.models.trunk import Teacher, Trunk
from ard_kernels.common.arguments import described


@dataclass(frozen=True)
class Family:
    config: type[ModelConfig]
    trunk: type[Trunk]
    teacher: type[Teacher]


FAMILIES = {
    "dit": Family(DiTConfig, DiTTrunk, DiT),
    "sit": Family(SiTConfig, DiTTrunk, SiT),
    "repa": Family(REPAConfig, DiTTrunk, SiT),
    "lightningdit": Family(LightningDiTConfig, LightningDiTTrunk, LightningDiT),
    "pixart": Family(PixArtConfig, PixArtTrunk, PixArt),
}


def config_class(values: Mapping[str, Any]) -> type[ModelConfig]:
    """That of the family which a mapping of settings names; DiT's where it names none."""
    family = values.get("family", "dit")
    if family not in FAMILIES:
        raise ValueError(f"model.family is {described(family)}; expected one of {', '.join(FAMILIES)}")
    return FAMILIES[family].config


def make_teacher(config: ModelConfig) -> Teacher:
    """A teacher of the config's family with the random weights that training starts from."""
    return FAMILIES[config.family].teacher(config)
