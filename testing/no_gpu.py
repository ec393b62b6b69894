"""A GPU that is not there: launches go all the way to a kernel that does nothing."""

from __future__ import annotations

from collections.abc import Callable

from triton.backends.compiler import GPUTarget

from ard_kernels.block_causal_attention.cuda import HEAD_DIMS


class Nothing:
    """Stands in for Triton's driver, which names an H100, and for the CUDA module: what is called does nothing."""

    attention_shared_bytes = dict.fromkeys(HEAD_DIMS, 0)
    utils = property(lambda self: self)

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, *_) -> tuple[int, ...]:
        return 1, 1, 0, 0, 1024

    def launcher_cls(self, *_) -> Callable:
        return lambda *_: None

    def attention_forward_kernel(self, *_) -> tuple[bool, int, int]:
        return True, 128, 128

    def attention_backward_block(self) -> tuple[int, int]:
        return 64, 64

    def attention_history_block(self, head_dim: int) -> tuple[int, int]:
        return 64, 64

    def adaln_geometry(self, *_) -> tuple[int, int, int]:
        return 1, 256, 4

    def __getattr__(self, name: str) -> Callable:
        return lambda *_: None
