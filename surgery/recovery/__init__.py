"""Refit the kept channels in closed form: options and results as data, the fits, and the pass through the model."""
