"""Backend flash: the calls that a mask is composed of (torch_impl.py) by a flash-attn package, where one is installed.

    FlashAttention-3   flash_attn_3         compute capability 9.0
    FlashAttention-4   flash-attn-4         9.0 to 11.x
    FlashAttention-2   flash-attn >= 2.7    8.0 and newer

The first of them that is installed and serves a GPU takes its calls. All take grouped heads and (B, T, H, D) whose rows
start on 16 bytes, and give the natural log-sum-exp of the scaled scores, (B, H, T) fp32. Called are their functions
below autograd, which take the global out and lse; asked for it, they add dQ in a fixed order.
"""

from __future__ import annotations

import importlib
import importlib.util
from abc import ABC, abstractmethod
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ard_kernels.block_causal_attention.cuda import aligned
from ard_kernels.block_causal_attention.dense import LSE_COLUMNS, Gradients, through_values
from ard_kernels.block_causal_attention.spec import empty_output
from ard_kernels.common import machine
from ard_kernels.common.gpu_support import architecture, on_device, refuses_device
from ard_kernels.common.library import constant_in_graphs

MISSING = "no flash-attn package is installed; expected flash-attn, flash_attn_3 or flash-attn-4"
WIDEST = 256 - LSE_COLUMNS  # head dim of a package whose backward takes no gradient of lse, see `through_values`
NO_MASK_2 = {"causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0, "alibi_slopes": None}


class Package(ABC):
    """A generation of flash-attn, as `Dense` has it: importing it makes it.

    Raises:
        ImportError: it cannot be imported, or lacks a function that is called.
    """

    name: str
    distributions: tuple[str, ...]  # names of its releases
    module: str
    functions: tuple[str, str]  # forward, backward
    takes_lse_gradient = False
    grouped = True

    def __init__(self) -> None:
        module = importlib.import_module(self.module)
        for function in self.functions:
            if not callable(getattr(module, function, None)):
                raise ImportError(f"{self.module} has no {function}")
        self._forward, self._backward = (getattr(module, function) for function in self.functions)

    @staticmethod
    @abstractmethod
    def installed() -> bool:
        """Whether Python finds it, without importing it."""

    @staticmethod
    @abstractmethod
    def refuses(arch: int, head_dim: int) -> str | None:
        """Why it cannot run on a GPU of compute capability `arch` (90 is 9.0); None when it can."""

    @abstractmethod
    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """out (B, T, H, D) and lse of q, k, v (B, T, H, D)."""

    @abstractmethod
    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, written: dict[str, Tensor],
        scale: float, grad_lse: Tensor | None,
    ) -> None:  # fmt: skip
        """Writes dq, dk, dv of these names. All (B, T, H, D); lse and its gradient (B, H, T), contiguous."""

    @classmethod
    def described(cls) -> str:
        return f"{cls.name} {machine.version(*cls.distributions) or '(version unknown)'}"

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        """See Dense."""
        out, lse = self._call(self.forward, *(aligned(x).transpose(1, 2) for x in (q, k, v)), scale)
        out = out.transpose(1, 2)
        for what, got, expected in (("out", out.shape, q.shape), ("lse", lse.shape, q.shape[:3])):
            if got != expected:
                raise RuntimeError(
                    f"backend flash: {self.described()} returned {what} {tuple(got)}; expected {tuple(expected)}"
                )
        return out, lse

    def attend_backward(
        self, grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        scale: float,
    ) -> Gradients:  # fmt: skip
        """See Dense."""
        if grad_lse is None or self.takes_lse_gradient:
            return self._gradients(grad_out, q, k, v, out, lse, scale, grad_lse)
        return through_values(self._gradients, grad_out, grad_lse, q, k, v, out, lse, scale)

    def _gradients(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float,
        grad_lse: Tensor | None = None,
    ) -> Gradients:  # fmt: skip
        grads = empty_output(q), empty_output(k), empty_output(v)
        inputs = [aligned(x).transpose(1, 2) for x in (grad_out, q, k, v, out)]
        written = dict(zip(("dq", "dk", "dv"), (x.transpose(1, 2) for x in grads), strict=True))
        grad_lse = None if grad_lse is None else grad_lse.contiguous()
        self._call(self.backward, *inputs, lse.contiguous(), written, scale, grad_lse)
        return grads

    def _call(self, run: Any, *inputs: Any) -> Any:
        """`run` on the inputs' GPU; RuntimeError where this version's functions have other arguments."""
        try:
            return on_device(run)(*inputs)
        except (TypeError, ValueError) as error:  # arguments, or the number of results
            names = " and ".join(self.functions)
            message = f"{names} of {self.described()} are not called as this version wants: {error}"
            raise RuntimeError(f"backend flash: {message}") from error


def _too_wide(head_dim: int) -> str | None:
    return f"with its gradient of lse it takes head dims up to {WIDEST}; got {head_dim}" if head_dim > WIDEST else None


class FlashAttention3(Package):
    name = "FlashAttention-3"
    distributions = ("flash_attn_3",)
    module = "flash_attn_interface"
    functions = ("_flash_attn_forward", "_flash_attn_backward")

    @staticmethod
    def installed() -> bool:
        return importlib.util.find_spec("flash_attn_interface") is not None

    @staticmethod
    def refuses(arch: int, head_dim: int) -> str | None:
        return _too_wide(head_dim) if arch == 90 else "it is made for compute capability 9.0"

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(q, k, v, softmax_scale=scale)
        return out, lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, written: dict[str, Tensor],
        scale: float, grad_lse: Tensor | None,
    ) -> None:  # fmt: skip
        self._backward(grad_out, q, k, v, out, lse, **written, softmax_scale=scale, deterministic=True)


class FlashAttention4(Package):
    name = "FlashAttention-4"
    distributions = ("flash-attn-4", "flash-attn-cute")
    module = "flash_attn.cute.interface"
    functions = ("_flash_attn_fwd", "_flash_attn_bwd")
    takes_lse_gradient = True

    @staticmethod
    def installed() -> bool:
        """FlashAttention-2 may be in the same package, which finding a part of would import."""
        package = importlib.util.find_spec("flash_attn")
        places = package.submodule_search_locations if package else None
        return any((Path(place) / "cute" / "interface.py").is_file() for place in places or ())

    @staticmethod
    def refuses(arch: int, head_dim: int) -> str | None:
        if not 90 <= arch < 120:  # no deterministic backward on 12.x, none at all on 8.x
            return "it is made for compute capability 9.0 to 11.x"
        if arch >= 100 and head_dim > 128 and head_dim != 256:
            return f"on this GPU it takes head dims up to 128, and 256; got {head_dim}"
        return None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._forward(q, k, v, softmax_scale=scale, return_lse=True)
        return out, lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, written: dict[str, Tensor],
        scale: float, grad_lse: Tensor | None,
    ) -> None:  # fmt: skip
        more = {} if grad_lse is None else {"dlse": grad_lse}  # which its first releases lack
        self._backward(q, k, v, out, grad_out, lse, **written, softmax_scale=scale, deterministic=True, **more)


class FlashAttention2(Package):
    name = "FlashAttention-2"
    distributions = ("flash-attn",)
    module = "flash_attn.flash_attn_interface"
    functions = ("_flash_attn_forward", "_flash_attn_backward")

    @staticmethod
    def installed() -> bool:
        return importlib.util.find_spec("flash_attn_2_cuda") is not None

    @staticmethod
    def refuses(arch: int, head_dim: int) -> str | None:
        return _too_wide(head_dim)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, _, _ = self._forward(q, k, v, softmax_scale=scale, dropout_p=0.0, return_softmax=False, **NO_MASK_2)
        return out, lse

    def backward(
        self, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, written: dict[str, Tensor],
        scale: float, grad_lse: Tensor | None,
    ) -> None:  # fmt: skip
        how = {"softmax_scale": scale, "dropout_p": 0.0, "deterministic": True}
        self._backward(grad_out, q, k, v, out, lse, **written, **how, **NO_MASK_2)


PACKAGES: tuple[type[Package], ...] = (FlashAttention3, FlashAttention4, FlashAttention2)


@cache
def serving(arch: int, head_dim: int) -> Package | str:
    """The package that serves GPUs of compute capability `arch` (90 is 9.0); or why none does."""
    reasons = []
    for kind in PACKAGES:
        if not kind.installed():
            continue
        reason = kind.refuses(arch, head_dim)
        if reason is None:
            try:
                return kind()
            except Exception as error:  # whatever its libraries raise when they are loaded
                reason = f"importing it: {type(error).__name__}: {error}"
        reasons.append(f"{kind.described()}: {reason}")
    return "; ".join(reasons) or MISSING


@cache
def _reason(device: torch.device, dtype: torch.dtype, width: int | None) -> str | None:
    """`refuses`, asked once: looking for packages takes 0.3 ms."""
    if not any(kind.installed() for kind in PACKAGES):
        return MISSING
    reason = refuses_device(device)
    if reason is not None:
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return "flash-attn takes bfloat16 and float16"
    package = serving(architecture(device), width or 64)  # 64 is served by all
    return package if isinstance(package, str) else None


@constant_in_graphs
def refuses(device: torch.device, dtype: torch.dtype, width: int | None = None) -> str | None:
    """Why no flash-attn package serves these tensors; None when one does. `width` is the head dim."""
    return _reason(device, dtype, width)


def dense(device: torch.device, head_dim: int) -> Package:
    """What computes the calls on `device`, which `refuses` has not refused."""
    package = serving(architecture(device), head_dim)
    if isinstance(package, str):
        raise ValueError(f"backend flash: {package}")
    return package
