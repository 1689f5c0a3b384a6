"""Experiments that remove chosen channels of a loaded model and controls, and measure what the removal costs."""
