"""The run directory and the run's fate: checkpoints, log, failure; rank 0 writes, all ranks learn how it went."""
