"""`ard`: autoregressive distillation of diffusion transformers, on the kernels of `ard_kernels`."""

from ard.model import DiT, DiTConfig
from ard.student import ARDStudent

__all__ = ["ARDStudent", "DiT", "DiTConfig"]
