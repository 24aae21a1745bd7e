"""Predictions: the time of a step on grids that have not been measured."""
