"""The families of models: one line each. docs/add_a_model.md says what a new one takes."""

from __future__ import annotations

from dataclasses import dataclass

from ard.models.config import ModelConfig
from ard.models.dit import DiT, DiTConfig, DiTTrunk
from ard.models.lightningdit import LightningDiT, LightningDiTConfig, LightningDiTTrunk
from ard.models.sit import REPAConfig, SiT, SiTConfig
from ard.models.trunk import Teacher, Trunk


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
}


def make_teacher(config: ModelConfig) -> Teacher:
    """A teacher of the config's family with the random weights that training starts from."""
    return FAMILIES[config.family].teacher(config)
