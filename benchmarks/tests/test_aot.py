"""What `make aot` must object to. (It runs on its own, without the interpreter; here only its judgement is tested.)"""

import dataclasses

import pytest

from ard_kernels.common import tuning
from benchmarks import aot, triton_objects

GOOD = aot.Row(
    kernel="forward", key="attention_forward/16bit/72/long", variant="full", constants="BLOCK_M=128 BLOCK_N=64",
    warps=8, stages=3, registers=126, spill_bytes=0, shared_bytes=81920, blocks_per_sm=2, tensor_core_ops=13,
    wide_accesses=22, issued_over_useful="1.111",
)  # fmt: skip


def test_a_good_row_passes():
    assert aot.problems(GOOD, False, 90) == []


@pytest.mark.parametrize(
    ("change", "serialised", "message"),
    [
        ({"spill_bytes": 8}, False, "spills 8 bytes"),
        ({"shared_bytes": 300000}, False, "300000 bytes of shared memory; the limit is 232448"),
        ({"blocks_per_sm": 0}, False, "do not fit"),
        ({"tensor_core_ops": 0}, False, "no wgmma.mma_async"),
        ({"wide_accesses": 0}, False, "no 16-byte accesses"),
        ({"issued_over_useful": "1.160"}, False, "at most 1.15 at D = 72"),
        ({}, True, "wgmma serialised"),
    ],
)
def test_a_bad_row_does_not(change, serialised, message):
    (found,) = aot.problems(dataclasses.replace(GOOD, **change), serialised, 90)
    assert message in found


def test_the_committed_tables_are_of_the_shipped_configurations():
    for arch in tuning.ARCHITECTURES:
        lines = (aot.TABLES / f"sm{arch}.csv").read_text().splitlines()[2:]
        assert {line.split(",")[1] for line in lines} == set(tuning.shipped(arch))


def test_matrix_instructions_are_counted():
    wgmma = "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {};\n" * 3
    assert triton_objects.tensor_core_flops(wgmma, warps=8) == 3 * 2 * 64 * 128 * 16 * 2
    matmul = "ttng.tc_gen5_mma %a, %b : !ttg.memdesc<128x16xbf16, #s, #smem>, !ttg.memdesc<16x64xbf16, #s>, rest\n"
    loop = f"{matmul} %r = scf.for %i = 0 {{\n {matmul} {matmul} scf.yield %x\n}} {matmul}"
    assert triton_objects.tcgen05_flops(loop) == 2 * 2 * 128 * 16 * 64
    assert triton_objects.tensor_core_flops("mma.sync.aligned.m16n8k16.row.col.f32 {};", warps=4) == 2 * 16 * 8 * 16 * 4
