"""Scaling studies: grids are measured in jobs of their own, and a report is made of the times."""
