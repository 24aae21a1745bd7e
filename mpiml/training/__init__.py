"""What lies between the settings and the loop: data, model, stages, their places in memory, and how they are kept."""
