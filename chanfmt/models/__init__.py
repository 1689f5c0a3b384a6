"""From a MODEL argument to its FFNs: resolve, load, discover, map to checkpoint tensors."""
