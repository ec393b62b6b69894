"""How the C++ kernels of the CPU write large outputs (csrc/common/output.h): as their memory is found."""

import ctypes
import os
import platform
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from ard_kernels import adaln_modulate, gate_residual_adaln, gelu, qk_norm_rope, qk_norm_rope_packed
from testing.poison import poisoned

ROOT = Path(__file__).parents[1]
PAGE = os.sysconf("SC_PAGESIZE")
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another malloc than glibc's, or no Linux")

PROGRAM = r"""
#include "common/output.h"

#include <cstdio>
#include <cstring>
#include <vector>

const int64_t kPage = getpagesize(), kBytes = 9 << 20;

char* fresh() {
  void* data = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(data, kBytes, MADV_NOHUGEPAGE);
  return static_cast<char*>(data);
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
  if (pages(a) != 0 || madvise(a, kPage, MADV_POPULATE_WRITE) != 0 || pages(a) != 1) {
    printf("the system tells of no pages, or gives none");
    return 0;
  }
  const ard::Output unused(a, kBytes);
  printf("%d ", unused.streams());
  unused.claim(a + 10 * kPage + 8, 3 * kPage);  // from the middle of a page to that of the third after it
  unused.claim(a + 20 * kPage, 8);
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
# Keeps what a process has the system populate.
RECORDER = r"""
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

size_t claims[1 << 16][2];
int claim_count;

int madvise(void* data, size_t bytes, int advice) {
  if (advice == 23) {
    const int n = __atomic_fetch_add(&claim_count, 1, __ATOMIC_RELAXED);
    claims[n][0] = (size_t)data, claims[n][1] = (size_t)data + bytes;
  }
  return syscall(SYS_madvise, data, bytes, advice);
}
"""


def compiled(folder, text, *flags):
    """What g++ makes of a program's text; C of it is C++."""
    (folder / "program.cpp").write_text(text)
    subprocess.run(
        [os.environ.get("CXX", "g++"), "-std=c++17", f"-I{ROOT}/csrc", "program.cpp", *flags], cwd=folder, check=True
    )


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    compiled(folder, PROGRAM, "-o", "program")
    text = subprocess.run([folder / "program"], check=True, capture_output=True, text=True).stdout
    if text.startswith("the system"):
        pytest.skip(text)
    return text


def test_memory_is_asked_for_its_pages(printed):
    unused, used, partly, small = "0 5", "1 0", "0 1 0", "0 0 0"
    assert printed == " ".join((unused, used, partly, small))


def normal(dtype, *shape):
    """Of 9 MB and a little, in fp32 as in 16 bits."""
    return torch.randn(*shape[:-1], shape[-1] * 4 // dtype.itemsize).to(dtype)


def adaln(op, *names):
    def make(dtype):
        shapes = {"x": (3, 768, 1024), "branch": (3, 768, 1024)}
        return partial(op, segment_length=256), [normal(dtype, *shapes.get(name, (3, 3, 1024))) for name in names]

    return make


def heads(B, T):
    """(B, H, T, D), memory (B, T, H, D)."""
    return lambda dtype: (
        partial(qk_norm_rope, norm="rms"),
        [normal(dtype, B, T, 16, 64).transpose(1, 2) for _ in "qk"],
    )


def packed(B, T):
    return lambda dtype: (partial(qk_norm_rope_packed, norm="rms"), [normal(dtype, B, T, 3, 16, 64)])


CALLS = {
    "adaln_modulate": adaln(adaln_modulate, "x", "shift", "scale"),
    "gate_residual_adaln": adaln(gate_residual_adaln, "x", "branch", "gate", "shift", "scale"),
    "qk_norm_rope": heads(2, 1152),
    "qk_norm_rope, one token": heads(2304, 1),
    "qk_norm_rope_packed": packed(2, 384),
    "qk_norm_rope_packed, one token": packed(768, 1),
    "gelu": lambda dtype: (gelu, [normal(dtype, 2304, 1025)]),
}


def check_claims(what, claims, tensors):
    """All but the ends of `tensors` are claimed, and nothing beyond their pages."""
    left = [(x.data_ptr() // PAGE, -(-(x.data_ptr() + x.nbytes) // PAGE)) for x in tensors if x.nbytes > 1 << 20]
    pages = set()
    for first, stop in ((begin // PAGE, -(-end // PAGE)) for begin, end in claims):
        assert any(a <= first and stop <= b for a, b in left), f"{what}: claims pages {first} to {stop} of {left}"
        pages.update(range(first, stop))
    for a, b in left:
        assert len(pages & set(range(a, b))) > 0.9 * (b - a), f"{what}: claims {len(pages)} pages of {left}"


def check_call(name, dtype, recorder):
    """Forward and backward in fresh memory, of which all is claimed, and in used memory: the same bits."""
    call, inputs = CALLS[name](dtype)
    leaves = [x.requires_grad_() for x in inputs]
    count = ctypes.c_int.in_dll(recorder, "claim_count")
    record = (ctypes.c_size_t * 2 * (1 << 16)).in_dll(recorder, "claims")

    def claims():
        made, count.value = [tuple(each) for each in record[: count.value]], 0
        return made

    def run(check):
        claims()
        outputs = call(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        check(f"{name} {dtype}", claims(), outputs)
        grads = [torch.ones_like(y) for y in outputs]
        claims()
        gradients = torch.autograd.grad(outputs, leaves, grads)
        check(f"{name} {dtype}, backward", claims(), gradients)
        return *outputs, *gradients

    def nothing(what, claims, tensors):
        assert not claims, f"{what}: claims used memory"

    fresh = run(check_claims)
    with poisoned():  # fills outputs before
        used = run(nothing)
    assert all(map(torch.equal, fresh, used)), f"{name} {dtype}: not the same bits"


def test_fresh_and_used_memory(printed, tmp_path):
    """In a process that maps every large block anew."""
    compiled(tmp_path, 'extern "C" {' + RECORDER + "}", "-shared", "-fPIC", "-o", "recorder.so")
    environment = os.environ | {"LD_PRELOAD": str(tmp_path / "recorder.so"), "MALLOC_MMAP_THRESHOLD_": "131072"}
    subprocess.run([sys.executable, "-m", "tests.test_output"], cwd=ROOT, env=environment, check=True)


if __name__ == "__main__":
    torch.set_num_threads(2)
    for name in CALLS:
        for dtype in (torch.float32, torch.bfloat16):
            check_call(name, dtype, ctypes.CDLL(os.environ["LD_PRELOAD"]))
