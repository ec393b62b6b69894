"""Losses, the loop, and the stages of the method."""
