"""Experiments on a loaded model: sweeps and ablations."""
