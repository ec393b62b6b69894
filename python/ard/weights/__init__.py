"""Weights in and out, under any name."""
