"""Tests and benchmarks run from a checkout, whether ard_kernels is installed or not."""

import sys
from pathlib import Path

ROOT = Path(__file__).parent
# At the end of the path, so that an installed ard_kernels comes first.
sys.path += [str(ROOT), str(ROOT / "python")]
