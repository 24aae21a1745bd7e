"""Data sets, and which rows of them a replica reads at which step; no MPI."""
