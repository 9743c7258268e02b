"""The subcommands of `edgeml device`, a module each."""
