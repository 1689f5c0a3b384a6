"""The `surgery` command: one file per subcommand."""
