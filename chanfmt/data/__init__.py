"""Calibration text and arrays, and the sequences drawn from them."""
