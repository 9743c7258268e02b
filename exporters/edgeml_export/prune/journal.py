"""What was decided, in order, kept in a file so that a broken-off search goes on where it was.

Pruning is deterministic, so a resumed run is the same run with the answers given: each decision that the file holds is taken from
it in place of a search, and the rest is searched. Fine-tuned weights lie beside the file, one per round, since training is the
step that cannot be done again in seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from edgeml.errors import DataError

__all__ = ["Journal", "fingerprint"]

SCHEMA = 1


class Journal:
    """Decisions by key; on disk where `path` is given. Raises `DataError` for a file of another run or one that cannot be read."""

    def __init__(self, path: Path | None, key: str) -> None:
        self.path, self.key = path, key
        self.entries: dict[str, Any] = {}
        if path is not None and path.exists():
            self.entries = self._read(path)

    def recorded(self, key: str) -> Any:
        """What was decided under this key, or None."""
        return self.entries.get(key)

    def record(self, key: str, value: Any) -> None:
        """Keep a decision; the file is replaced as a whole."""
        self.entries[key] = value
        if self.path is not None:
            _replace(self.path, json.dumps({"schema": SCHEMA, "key": self.key, "decisions": self.entries}).encode())

    def weights(self, round_: int, module: nn.Module) -> bool:
        """Load the weights that fine-tuning gave in this round; False where there are none."""
        name = self.recorded(f"{round_}/weights")
        if self.path is None or name is None:
            return False
        file = self.path.with_name(str(name).rsplit("/", 1)[-1])
        try:
            module.load_state_dict(torch.load(file, weights_only=True))
        except (OSError, RuntimeError, ValueError, KeyError, EOFError) as error:
            raise DataError(f"{file.name}: the fine-tuned weights of the checkpoint cannot be read; delete the checkpoint") from error
        return True

    def keep_weights(self, round_: int, module: nn.Module) -> None:
        """Write the round's weights, then say that they are there."""
        if self.path is not None:
            file = self.path.with_name(f"{self.path.name}.round{round_}.pt")
            scratch = file.with_name(f".{file.name}.tmp")
            torch.save(module.state_dict(), scratch)
            os.replace(scratch, file)
            self.record(f"{round_}/weights", file.name)

    def _read(self, path: Path) -> dict[str, Any]:
        try:
            content = json.loads(path.read_text("utf-8"))
            schema, key, decisions = content["schema"], content["key"], content["decisions"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path.name} is not a checkpoint of pruning; delete it or name another file") from error
        if schema != SCHEMA or key != self.key or not isinstance(decisions, dict):
            raise DataError(f"{path.name} is the checkpoint of another network, calibration set or setting; name another file")
        return decisions


def fingerprint(module: nn.Module, inputs: Sequence[torch.Tensor], settings: dict[str, Any]) -> str:
    """A digest of the network's weights, the calibration inputs and the settings."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in [*sorted(module.state_dict().items()), *(("input", tensor) for tensor in inputs)]:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _replace(path: Path, content: bytes) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    with open(scratch, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
