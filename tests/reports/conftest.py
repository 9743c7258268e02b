"""What tests of `edgeml diff` share."""

from __future__ import annotations

import json
from typing import Any

import pytest
from damage import Run

from edgeml.cli import main


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def diff(*arguments: object) -> dict[str, Any]:
        assert main(["diff", *map(str, arguments), "--json"]) == 0, capsys.readouterr().err
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return diff
