"""The version, here and nowhere else: pyproject.toml, `ard_kernels.__version__` and `ard --version` read it."""

__version__ = "0.1.0"
