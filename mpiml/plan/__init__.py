"""The plan of a job: its stages, memory and messages on any grid, worked out from its settings without MPI."""
