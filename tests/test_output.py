"""How the C++ kernels of the CPU write large outputs (csrc/common/output.h): as their memory is found."""

import os
import platform
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from ard_kernels import adaln_modulate, gate_residual_adaln, gelu, qk_norm_rope, qk_norm_rope_packed
from testing.poison import poisoned

CSRC = Path(__file__).parents[1] / "csrc"
PROGRAM = r"""
#include "common/output.h"

#include <cstdio>
#include <cstring>
#include <vector>

const int64_t kPage = getpagesize(), kBytes = 9 << 20;

char* fresh() {
  return static_cast<char*>(mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
}

int pages(char* data) {
  std::vector<unsigned char> resident(kBytes / kPage);
  mincore(data, kBytes, resident.data());
  int count = 0;
  for (unsigned char page : resident) count += page & 1;
  return count;
}

int main() {
  char *a = fresh(), *b = fresh(), *c = fresh(), *d = fresh();
  const ard::Output unused(a, kBytes);
  printf("%d %d ", unused.streams(), pages(a));
  unused.claim(a + 10 * kPage + 8, 3 * kPage);  // from the middle of a page to that of the third after it
  printf("%d ", pages(a));
  memset(b, 7, kBytes);
  const ard::Output used(b, kBytes);
  used.claim(b, kBytes);
  int changed = 0;
  for (int64_t i = 0; i < kBytes; ++i) changed += b[i] != 7;
  printf("%d %d ", used.streams(), changed);
  memset(c, 7, kBytes / 3);  // the end of it is fresh
  const ard::Output partly(c, kBytes);
  partly.claim(c, kBytes);
  for (int64_t i = 0; i < kBytes; ++i) changed += c[i] != (i < kBytes / 3 ? 7 : 0);
  printf("%d %d %d ", partly.streams(), pages(c) == kBytes / kPage, changed);
  const ard::Output small(d, kPage), absent;
  small.claim(d, kPage);
  absent.claim(nullptr, 0);
  printf("%d %d %d", small.streams(), pages(d), absent.streams());
}
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="other systems are not asked for pages")
def test_memory_is_asked_for_its_pages(tmp_path):
    (tmp_path / "program.cpp").write_text(PROGRAM)
    build = [os.environ.get("CXX", "g++"), "-std=c++17", f"-I{CSRC}", "program.cpp", "-o", "program"]
    subprocess.run(build, cwd=tmp_path, check=True)
    printed = subprocess.run([tmp_path / "program"], check=True, capture_output=True, text=True).stdout
    fresh, used, partly, small = "0 0 4", "1 0", "0 1 0", "0 0 0"
    assert printed == " ".join((fresh, used, partly, small))


# Outputs over 32 MB, which glibc maps anew for every call: 9 Mi elements of fp32, twice as many of 16 bits.
def normal(dtype, *shape):
    return torch.randn(*shape[:-1], shape[-1] * 4 // dtype.itemsize).to(dtype)


def adaln(op, *names):
    def make(dtype):
        shapes = {"x": (9, 1024, 1024), "branch": (9, 1024, 1024)}
        return partial(op, segment_length=256), [normal(dtype, *shapes.get(name, (9, 4, 1024))) for name in names]

    return make


def heads(dtype):
    """(B, H, T, D), memory (B, T, H, D)."""
    return partial(qk_norm_rope, norm="rms"), [normal(dtype, 2, 1152, 64, 64).transpose(1, 2) for _ in range(2)]


def packed(dtype):
    return partial(qk_norm_rope_packed, norm="rms"), [normal(dtype, 2, 384, 3, 64, 64)]


def activation(dtype):
    return gelu, [normal(dtype, 9 * 1024, 1025)]


CALLS = {
    "adaln_modulate": adaln(adaln_modulate, "x", "shift", "scale"),
    "gate_residual_adaln": adaln(gate_residual_adaln, "x", "branch", "gate", "shift", "scale"),
    "qk_norm_rope": heads,
    "qk_norm_rope_packed": packed,
    "gelu": activation,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CALLS)
def test_same_bits_in_fresh_and_in_used_memory(name, dtype):
    call, inputs = CALLS[name](dtype)
    leaves = [x.requires_grad_() for x in inputs]

    def run():
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return *outputs, *torch.autograd.grad(outputs, leaves, [torch.ones_like(y) for y in outputs])

    fresh = run()
    with poisoned():  # fills outputs before
        used = run()
    assert any(x.nbytes > 32 << 20 for x in fresh)
    for left, right in zip(fresh, used, strict=True):
        assert torch.equal(left, right)
