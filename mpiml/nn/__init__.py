"""Layers, losses, models and optimizers; no MPI, and no knowledge of ranks."""
