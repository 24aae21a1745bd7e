"""A page that shows runs: their curves, where their time goes, and how their settings differ; no MPI."""
