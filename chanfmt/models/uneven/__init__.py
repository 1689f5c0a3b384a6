"""The code that travels with a result whose FFNs have widths of their own. It imports transformers and nothing of chanfmt."""
