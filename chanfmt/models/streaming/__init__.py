"""Run a model that is larger than memory, block by block."""
