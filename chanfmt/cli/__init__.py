"""The `atlas` command: one file per command, and the framework that `surgery` and `atlas-tui` share."""
