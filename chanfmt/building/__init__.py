"""Measure a model: tokens to sums, sums to an atlas."""
