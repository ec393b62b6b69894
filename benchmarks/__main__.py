"""`python -m benchmarks [room ...]`: run all rooms, or those named, and write benchmarks/results/<device>/*.json."""

import sys
from importlib import import_module

ROOMS = {
    "numerics": "numerics.main",
    "segment_adaln": "segment_adaln.main",
    "block_causal_attention": "block_causal_attention.main",
    "student_training": "student.training",
    "student_sampling": "student.sampling",
}

names = sys.argv[1:] or list(ROOMS)
for name in names:
    if name not in ROOMS:
        sys.exit(f"benchmarks: room is {name!r}; expected one of {', '.join(ROOMS)}")
for name in names:
    module, function = ROOMS[name].split(".")
    getattr(import_module(f"benchmarks.{module}"), function)()
