"""Comparing two runs, checkpoints or metrics: where they part first, by how much, and what explains it; no MPI."""
