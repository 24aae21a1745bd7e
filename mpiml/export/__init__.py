"""What other programs take of a run: its metrics, and its model; see README.md."""
