"""The benchmark: the package against NumPy, MPI and PyTorch, in pairs on the same ranks."""
