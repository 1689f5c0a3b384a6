"""Measure a model: text to tokens, tokens to sums, sums to an atlas."""
