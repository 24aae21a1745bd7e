"""mpiml trains a model on MPI ranks: data-parallel, layer-split or both, with the same bits on every layout."""

__version__ = "0.1.0"
