"""The profiles that come with edgeml, found by name; a file of one's own by its path; `host` is this machine, measured on the spot."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from pathlib import Path

from edgeml.device import Profile, parse_profile, read_profile
from edgeml.errors import UsageError

__all__ = ["HOST", "find", "profiles"]

HOST = "host"


@cache
def profiles() -> dict[str, Profile]:
    """Every profile that comes with edgeml, by its name, in the order of names."""
    folder = files("edgeml_devices") / "profiles"
    entries = sorted((entry for entry in folder.iterdir() if entry.name.endswith(".toml")), key=lambda entry: entry.name)
    found = [parse_profile(entry.read_bytes(), entry.name) for entry in entries]
    return {profile.name: profile for profile in found}


def find(name: str, measure: Callable[[], Profile]) -> Profile:
    """The profile of that name or alias, in that TOML file, or of this machine (`measure`). Raises `UsageError` with the nearest names."""
    if name == HOST:
        return measure()
    if name.endswith(".toml") or "/" in name:
        return read_profile(Path(name))
    known = profiles()
    named = {alias: profile for profile in known.values() for alias in (profile.name, *profile.aliases)}
    if name in named:
        return named[name]
    near = difflib.get_close_matches(name.lower(), [*named, HOST], 3, 0.4)
    hint = f"did you mean {', '.join(near)}? " if near else ""
    raise UsageError(f"there is no device '{name:.60}'; {hint}edgeml device list shows all; a file.toml of edgeml device probe does too")
