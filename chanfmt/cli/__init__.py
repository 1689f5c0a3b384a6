"""The `atlas` command: one file per subcommand, and the framework that `surgery` shares."""
