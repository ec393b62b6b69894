"""Launches that skip Triton's look-up start the kernel that Triton would have looked up, with the same arguments."""

import os
import random
import subprocess
import sys

import torch

# Run in a process of its own, compiled for an H100 that is not there: here Triton is its interpreter.
PROGRAM = "from tests.test_triton_launch import compare_with_triton; compare_with_triton()"


class NoDriver:
    """What Triton asks of a driver before it launches."""

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compare_with_triton() -> None:
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from ard_kernels import HistoryCache, adaln_modulate, block_causal_attention, gate_residual_adaln, history_attention
    from ard_kernels.common.backends import _refusals
    from ard_kernels.common.triton_support import Launch

    launched, fast = [], Launch.__call__

    class Chosen:
        """In place of a compiled kernel: notes its launches, of Triton's kind and of ours."""

        function = packed_metadata = None

        def launch_metadata(self, *_):
            return None

        def run(self, x, y, z, stream, function, packed, metadata, enter, leave, *arguments):
            launched.append((self, (x, y, z), arguments))

        def __getitem__(self, grid):
            return lambda *arguments: launched.append((self, grid, arguments))

    def choose(kernel, key, signature, device, *_):
        return kernel.device_caches[device][0].setdefault(key, Chosen())

    def both(self, tensors, ints=()):
        launched.clear()
        fast(self, tensors, ints)
        self.kernel[self.grid](*tensors, *self.bound, *ints, **self.constants)
        (ours, theirs), counts["launches"] = launched, counts["launches"] + 1
        assert ours[0] is theirs[0] and ours[1] == theirs[1], self.kernel
        assert all(a is b or a == b for a, b in zip(ours[2], theirs[2], strict=True)), self.kernel
        kernels.add(ours[0])

    counts, kernels = {"launches": 0}, set()
    driver.set_active(NoDriver())
    JITFunction._do_compile = choose
    for refusals in _refusals.values():
        refusals["triton"] = lambda *_: None
    Launch.__call__ = both
    draw = random.Random(0)

    def some(*shape):
        """A tensor whose rows may be apart, and whose memory may start off 16 bytes."""
        extra, offset = draw.choice([0, 0, 1, 8]), draw.choice([0, 0, 1, 8])
        strides = [1]
        for size in (shape[-1] + extra, *shape[-2:0:-1]):
            strides.insert(0, strides[0] * size)
        memory = torch.zeros(offset + shape[0] * strides[0], dtype=torch.bfloat16)
        return memory.as_strided(shape, strides, offset)

    how = {"backend": "triton"}
    for _ in range(25):
        B, L, D = draw.choice([1, 2]), draw.choice([16, 17]), draw.choice([64, 72])
        q, k, v = (some(B, 1, 2 * L, D).requires_grad_() for _ in range(3))
        scale = draw.choice([0.1, -0.1, 1.0])
        out = block_causal_attention(q, k, v, segment_length=L, window=draw.choice([None, 1]), scale=scale, **how)
        torch.autograd.grad(out, (q, k, v), out)
        x, branch = (some(B, 2 * L, D).requires_grad_() for _ in range(2))
        rows = [some(B, 2, D).requires_grad_() for _ in range(3)]
        y = adaln_modulate(x, *rows[:2], segment_length=L, **how)
        torch.autograd.grad(y, (x, *rows[:2]), y)
        ys = gate_residual_adaln(x, branch, *rows, segment_length=L, **how)
        torch.autograd.grad(ys, (x, branch, *rows), ys)
        cache = HistoryCache(1, B, 1, D, 2 * L, torch.bfloat16)
        with torch.no_grad():
            for own in (slice(0, L), slice(L, 2 * L)):
                history_attention(*(t[:, :, own] for t in (q, k, v)), cache, layer=0, scale=scale, **how)
    print(counts["launches"], len(kernels))


def test_the_kernel_that_triton_would_choose():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    launches, kernels = map(int, done.stdout.split())
    assert launches > 250 and kernels > 30
