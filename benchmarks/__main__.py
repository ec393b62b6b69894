"""`python -m benchmarks [room ...]`: run all rooms, or those named, and write benchmarks/results/<device>/*.json."""

import sys
from importlib import import_module

ROOMS = ("segment_adaln", "block_causal_attention", "student")

for room in sys.argv[1:] or ROOMS:
    if room not in ROOMS:
        sys.exit(f"benchmarks: room is {room!r}; expected one of {', '.join(ROOMS)}")
    import_module(f"benchmarks.{room}").main()
