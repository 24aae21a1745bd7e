"""Parts for a training loop of one's own: a guard, rows, a sum, checkpoints."""
