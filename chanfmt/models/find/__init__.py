"""Find the FFNs of a loaded model by what it computes."""
