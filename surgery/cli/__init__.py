"""The `surgery` command: one file per command."""
