"""Where FFNs lie in the checkpoint files, and their weights read from there."""
