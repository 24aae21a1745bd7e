"""Models and data of the examples that `make example-NAME` runs: what a user would bring along."""
