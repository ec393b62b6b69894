"""`make gpu-check`: everything that only a GPU can tell about the kernels, in one unattended run. See `__main__.py`."""
