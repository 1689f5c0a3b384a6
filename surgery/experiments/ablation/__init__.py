"""Experiments that remove chosen channels of a loaded model, with controls, and measure what it costs."""
