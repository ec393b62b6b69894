"""The teacher's ODE: solvers, guidance, trajectories; and samples of a student."""

from ard.diffusion.trajectories import TrajectoryBatch, generate, trajectory

__all__ = ["TrajectoryBatch", "generate", "trajectory"]
