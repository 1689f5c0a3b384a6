"""Perplexity, speed and tasks of models side by side."""
