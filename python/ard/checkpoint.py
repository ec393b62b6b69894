"""Public checkpoints into models: the names of the weights' room that user code imports."""

from ard.weights.public import load_student, load_teacher

__all__ = ["load_student", "load_teacher"]
