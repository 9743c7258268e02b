"""The export side of edgeml: torch models become bundles. Needs the extra `export`."""
