"""What an installed distribution promises: its commands start, and its wheel says what it is."""

from __future__ import annotations

from importlib.metadata import distribution

import edgeml


def test_every_entry_point_can_be_loaded() -> None:
    """A name in pyproject.toml that no module has breaks the command only once it is installed."""
    points = list(distribution("edgeml-runtime").entry_points)
    assert "edgeml" in {point.name for point in points}
    for point in points:
        assert callable(point.load()), point


def test_version_is_the_distribution_s() -> None:
    assert edgeml.__version__ == distribution("edgeml-runtime").version
