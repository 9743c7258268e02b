"""Boards and phones for edgeml: profiles, prediction before a download, emulation, runs on a device. See `edgeml device --help`."""
