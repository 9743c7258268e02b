"""What `edgeml eval` evaluates: a bundle under settings, as the options and each `--also` say."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgeml.errors import UsageError
from edgeml.session import RESIDENCIES

__all__ = ["Kept", "Setting", "parse_also", "parse_kept", "specialised", "unique"]

KEYS = ("memory", "residency", "experts-kept", "kept-by", "kept-for", "variant")


@dataclass(frozen=True)
class Kept:
    """Which routed experts may be used, for measuring: `share` of each site, by the task's usage, by that of `domains` (whose tasks
    are `used_by`), or with a `seed` at random."""

    share: float
    seed: int | None = None
    domains: tuple[str, ...] = ()
    used_by: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """What a record says of it."""
        by = f"random:{self.seed}" if self.seed is not None else "usage"
        return {"experts_kept": self.share, "kept_by": by, "kept_for": list(self.domains) or None}


@dataclass(frozen=True)
class Setting:
    """One variant to run. `role`: "variant", "reference", "specialised" (for the domain that it is named after) or "none"."""

    name: str
    bundle: str
    memory: str | None = None
    residency: str = "exact"
    kept: Kept | None = None
    wish: Mapping[str, Any] = field(default_factory=dict)
    role: str = "variant"

    @property
    def opening(self) -> dict[str, Any]:
        """For `edgeml.open`: kept experts are measured with everything in memory."""
        return {"memory": "100%" if self.kept is not None else self.memory, "residency": self.residency, **self.wish}


def parse_kept(share: str, by: str, domains: str | None) -> Kept | None:
    """The options --experts-kept, --kept-by and --kept-for; None where all experts are kept. Raises `UsageError`."""
    match = re.fullmatch(r"usage|random:([0-9]{1,9})", by)
    if match is None:
        raise UsageError(f"--kept-by is usage or random:SEED with a whole number, not {by!r:.40}")
    seed = None if match[1] is None else int(match[1])
    chosen = () if domains is None else tuple(dict.fromkeys(name.strip() for name in domains.split("+")))
    if share == "all":
        if chosen:
            raise UsageError("--kept-for says by whose usage experts are kept: say how many with --experts-kept, such as 0.5")
        return None
    if share != "none" and not re.fullmatch(r"0?\.[0-9]{1,6}|[01](\.0{1,6})?", share):
        raise UsageError(f"--experts-kept is all, none or a share from 0 to 1, not {share!r:.40}")
    if chosen and seed is not None:
        raise UsageError("--kept-for is about usage, so it does not go with --kept-by random")
    return Kept(0.0 if share == "none" else float(share), seed, chosen)


def checked(setting: Setting) -> Setting:
    """The setting. Raises `UsageError` for kept experts under a budget."""
    if setting.kept is not None and (setting.memory is not None or setting.residency != "exact"):
        raise UsageError("--experts-kept measures with everything in memory: leave out --memory and --residency")
    return setting


def parse_also(text: str, bundle: str) -> Setting:
    """`NAME[=BUNDLE][,KEY=VALUE]...`, of the command's own bundle where none is named. Raises `UsageError`."""
    first, *rest = text.split(",")
    name, _, path = first.partition("=")
    options = {key.strip(): value.strip() for key, _, value in (part.partition("=") for part in rest)}
    for key, value in options.items():
        if key not in KEYS or not value or len(options) < len(rest):
            raise UsageError(f"--also {text!r:.80}: write NAME[=BUNDLE][,KEY=VALUE]... with the keys {', '.join(KEYS)}")
    if not name.strip() or name.strip() in KEYS:
        raise UsageError(f"--also {text!r:.80}: begin with a name for the variant, such as half,experts-kept=0.5")
    residency = options.get("residency", "exact")
    if residency not in RESIDENCIES:
        raise UsageError(f"--also {text!r:.80}: residency is one of {', '.join(RESIDENCIES)}")
    kept = parse_kept(options.get("experts-kept", "all"), options.get("kept-by", "usage"), options.get("kept-for"))
    wish = {"variant": options["variant"]} if "variant" in options else {}
    return checked(Setting(name.strip(), path.strip() or bundle, options.get("memory"), residency, kept, wish))


def specialised(bundle: str, share: float, domains: Sequence[str], shared: bool) -> list[Setting]:
    """A set of experts for each domain, and, where every site has `shared` experts, none at all; all run with everything in memory."""
    found = [Setting(name, bundle, kept=Kept(share, None, (name,)), role="specialised") for name in domains]
    return found + ([Setting("none", bundle, kept=Kept(0.0), role="none")] if shared else [])


def unique(settings: Sequence[Setting]) -> list[Setting]:
    """The settings. Raises `UsageError` where two have one name."""
    names = [setting.name for setting in settings]
    for name in names:
        if names.count(name) > 1:
            raise UsageError(f"two variants are called '{name}': give each --also a name of its own")
    return list(settings)


def named_after(bundle: str) -> str:
    """The name of the variant that the command's own options describe."""
    return Path(bundle).name.removesuffix(".edgeml")
