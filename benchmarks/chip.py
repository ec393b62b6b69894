"""What one multiprocessor of a Hopper GPU and the chip around it can do at most: the constants of `benchmarks.predict`.

None was measured by us. A device check that contradicts one corrects it here, and with it every prediction.
"""

from __future__ import annotations

# Per multiprocessor and cycle. "Programming guide": NVIDIA's CUDA C++ programming guide, throughput of native
# arithmetic instructions, compute capability 9.0. "White paper": NVIDIA's of the H100.
SCHEDULERS = 4  # warp instructions issued (white paper)
TENSOR_FLOPS = 4096  # dense bf16 or fp16: 989.4 TFLOP/s / 132 / 1.83 GHz (white paper)
MMA_SYNC_SHARE = 0.62  # of that rate is what mma.sync reaches on Hopper (arXiv 2402.13499: 62.9 % on average)
EXP2 = 16  # results of the special function unit (programming guide)
SHARED_BYTES = 128  # of shared memory and L1 (white paper; 32 banks of 4 bytes)

# The chip.
MULTIPROCESSORS = 132  # H100 SXM, H200
CLOCK = 1.83e9  # Hz at which the white paper counts its peak rates; power may hold it lower under load
L2_BYTES = 5120  # per cycle, the whole cache (white paper of the A100; NVIDIA gives no other number for the H100)
HBM_BYTES = {"H100 SXM": 3.35e12, "H200": 4.8e12}  # per second, data sheets
