"""Scaling studies: points that are measured, and their report."""
