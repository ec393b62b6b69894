"""`ard`: autoregressive distillation of diffusion transformers, on the kernels of `ard_kernels`."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ard.models.dit import DiT, DiTConfig
    from ard.models.student import ARDStudent

_MODULES = {"ARDStudent": "ard.models.student", "DiT": "ard.models.dit", "DiTConfig": "ard.models.dit"}
__all__ = ["ARDStudent", "DiT", "DiTConfig"]


def __getattr__(name: str) -> object:
    """The public names at their first use: `ard --help` does not wait for torch."""
    if name in __all__:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
