"""What a job would be on any grid, from its settings alone; no MPI."""
