"""A student as a pipeline of diffusers: the names of the weights' room that user code imports."""

from ard.weights.pipeline import ARDPipeline, ARDTransformer, write_pipeline

__all__ = ["ARDPipeline", "ARDTransformer", "write_pipeline"]
