"""The result of a cut: its record, model card, picture, and the push to the Hub."""
