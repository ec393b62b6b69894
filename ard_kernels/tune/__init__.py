"""The tuner of the Triton kernels: `python -m ard_kernels.tune --help`. Nothing else of the library imports it."""
