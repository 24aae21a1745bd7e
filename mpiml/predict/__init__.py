"""Steps on grids that nobody has measured, from measured pieces."""
