"""Models and data of the examples that `make example-NAME` runs, as a user would write them."""
