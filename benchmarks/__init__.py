"""Benchmarks of every room, what they share, and the checks of compilers and GPUs."""
