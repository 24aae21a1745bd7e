"""The benchmark: the package against NumPy, MPI and PyTorch, side by side."""
