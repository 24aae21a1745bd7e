"""What several ranks do together: grid, gradient sum, schedules, stages; knows no layer by name."""
