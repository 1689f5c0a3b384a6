"""Find the FFNs of a loaded model by what the model computes."""
