"""What was kept, refitted in closed form: options and results as data, the fits, and the pass through the model."""
