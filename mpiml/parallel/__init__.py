"""Parallel training: the grid, memory, the gradient sum, schedules and stages; independent of kinds of layers."""
