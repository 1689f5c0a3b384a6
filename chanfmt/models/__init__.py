"""A model: its files, the loaded model, its FFNs, and where their weights lie in the files."""
