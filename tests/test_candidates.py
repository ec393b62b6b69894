"""The shipped tables are whole, and of the candidates that `make aot` and the tuner try."""

import pytest
import torch

from ard_kernels.block_causal_attention.triton_impl import parts_of
from ard_kernels.common import tuning
from ard_kernels.tune.candidates import candidates, keys


@pytest.mark.parametrize("arch", tuning.ARCHITECTURES)
def test_every_key_has_a_configuration(arch):
    table = tuning.shipped(arch)
    assert list(table) == keys()
    for key, constants in table.items():
        own = {"adaln": {"TOKENS", "ROWS", "STAGES", "num_warps"}, "rope": {"BLOCKS", "STAGES", "num_warps"}}
        expected = own.get(key.split("_")[0], {"BLOCK_M", "BLOCK_N"})
        assert expected <= constants.keys() and constants in list(candidates(key))


def test_every_width_dtype_and_length_has_a_key():
    known = set(keys())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for D in range(8, 257, 8):
            for kernel in ("attention_forward", "attention_backward_dq", "attention_backward_dkv", "attention_history"):
                assert {tuning.key(kernel, dtype, D, length) for length in (0, 16, 127, 128, 4096)} <= known
            upper = int(tuning.key("attention_forward", dtype, D, 0).split("/")[2])
            assert sum(parts_of(D)) <= sum(parts_of(upper)), "an entry is tuned at no smaller a width, once padded"
        for C in (1, 384, 1152, 8192, 20000):
            kernels = ("adaln_forward", "adaln_backward", "rope_forward", "rope_backward")
            assert {tuning.key(kernel, dtype, C, 0) for kernel in kernels} <= known
