"""One module a command; `edgeml.cli` finds them by name."""
