"""The programs beside training: benchmarks."""
