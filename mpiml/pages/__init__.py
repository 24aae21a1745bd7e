"""The one look of all pages that mpiml writes: HTML documents that open from disk, with figures in them; no MPI."""
