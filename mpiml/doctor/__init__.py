"""Looks at the job it runs in: ranks, cores, MPI, speed."""
