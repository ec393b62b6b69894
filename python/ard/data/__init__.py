"""What training reads: trajectories, real latents, digits."""
