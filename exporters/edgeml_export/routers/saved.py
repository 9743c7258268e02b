"""A trained group router in one safetensors file: its weights, its sizes and the names of its groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from edgeml.errors import InputError
from edgeml_export.routers.linear import LinearRouter
from edgeml_export.routers.scar import ScarRouter
from edgeml_export.routers.sparse import Buckets
from edgeml_export.routers.stage import GroupRouter

__all__ = ["load_router", "save_router"]

METADATA = "edgeml"


def save_router(path: Path, router: GroupRouter, groups: Sequence[str]) -> None:
    """Write a `LinearRouter` or `ScarRouter` whose groups have these names."""
    about: dict[str, Any] = {"kind": "linear", "groups": list(groups), "sizes": {"hidden": router.hidden, "groups": router.groups}}
    if isinstance(router, ScarRouter):
        about["kind"] = "scar"
        about["sizes"] |= {"queries": router.queries, "width": router.width, "top": router.top, "heads": router.heads}
        if router.buckets is not None:
            about["buckets"] = {"theta": router.buckets.theta, "leading": router.buckets.leading}
    tensors = {name: value.contiguous() for name, value in router.state_dict().items()}
    save_file(tensors, path, {METADATA: json.dumps(about, sort_keys=True)})


def load_router(path: Path) -> tuple[GroupRouter, list[str]]:
    """The router and its groups' names. Raises `InputError` for a file that is none of ours."""
    try:
        with safe_open(path, "pt") as file:
            about: dict[str, Any] = json.loads(file.metadata()[METADATA])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        router: GroupRouter
        if about["kind"] == "scar":
            names = ("centroids", "prototypes", "temperature")
            saved = [state[f"buckets.{name}"] for name in names] if "buckets" in about else []
            buckets = Buckets(saved[0], saved[1], float(saved[2]), **about["buckets"]) if saved else None
            router = ScarRouter(**about["sizes"], buckets=buckets)
        else:
            router = LinearRouter(**about["sizes"])
        router.load_state_dict(state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: this is no saved router ({error})") from error
    if any(not bool(torch.isfinite(value).all()) for value in state.values()):
        raise InputError(f"{path}: the router's weights are not all finite; train it again")
    return router.eval(), list(about["groups"])
