"""Fitting an export to a device: every candidate is predicted under the device's profile, and the first that fits is what is written.

A candidate is a way to store the model and a way to run it: bits and residency of a mixture, a variant of a CNN. They are tried in
the order of what they are expected to lose, so the first that keeps to the limits is also the best of them; then the limits of the
recipe decide, on validation, as in any export. Here are the device with its limits, and what is predicted of a written candidate;
`fit_mixture` and `vision.fit_variant` make candidates, `fit_tried` keeps what became of them.

Latency is that of one request of the slowest task, opened and warm. Memory is the peak of the whole process with the largest task
once every slot of its budget is filled, which `edgeml device predict` does not wait for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from edgeml.bundle import Bundle
from edgeml.device import Profile, read_profile
from edgeml.errors import UsageError
from edgeml.graph_cost import GraphCost, graph_cost
from edgeml.manifest import Manifest, Preprocess, load_manifest
from edgeml.predict import MEMORY_STRUCTURE, Interval, Prediction, pages_of, predict
from edgeml.sizes import parse_bytes
from edgeml.store import Budget, plan_budget
from edgeml.variants import parse_seconds

__all__ = ["IMAGES", "TEXTS", "Estimate", "Sketch", "Target", "estimate", "others", "read_target"]

TOKENS = 64
#: Without these nothing can be predicted; a profile is checked for them before any work.
NEEDED = ("cpu.cores", "memory.usable_bytes", "process.bytes", "process.bytes_per_graph_byte", "process.request_s", "graphs.node_s")
IMAGES = ("graphs.conv_macs_per_s", "graphs.conv_int8_macs_per_s")
TEXTS = (
    *(f"kernels.{name}_macs_per_s" for name in ("int4", "int8", "f32")),
    *("kernels.int4_stream_bytes_per_s", "kernels.int8_stream_bytes_per_s", "memory.read_bytes_per_s"),
    *("kernels.values_per_s", "kernels.activations_per_s", "graphs.values_per_s", "graphs.matmul_macs_per_s"),
    "process.bytes_per_tokenizer_byte",
)


@dataclass(frozen=True)
class Target:
    """A device and the limits on it; None is no limit. `confident`: the whole predicted range must keep to them, not its value alone."""

    profile: Profile
    max_latency_s: float | None = None
    max_memory_bytes: int | None = None
    tokens: int | None = None
    confident: bool = False

    def check(self, keys: Iterable[str]) -> None:
        """Raise `UsageError` where the profile lacks a figure that predictions will need."""
        for key in (*NEEDED, *keys):
            self.profile.need(key)
        if self.threads > 1:
            self.profile.need("cpu.parallel_share")

    def check_reading(self) -> None:
        """The same for what paging needs: a read rate at any block size."""
        if not any(key.startswith("storage.") and "qd1" in key for key in self.profile.figures):
            self.profile.need("storage.64k_qd1_bytes_per_s")

    @property
    def threads(self) -> int:
        """The device's cores: what a session there computes with."""
        return int(self.profile.need("cpu.cores").value)

    @property
    def memory_bytes(self) -> int:
        """The limit on memory: what is asked, and never more than there is."""
        usable = int(self.profile.need("memory.usable_bytes").value)
        return usable if self.max_memory_bytes is None else min(self.max_memory_bytes, usable)

    def figure(self, found: Interval) -> float:
        """Which end of a range must keep to a limit."""
        return found.high if self.confident else found.value

    def on(self, profile: Profile) -> Target:
        """The same limits on another device."""
        return replace(self, profile=profile)


def read_target(
    device: str | None, max_latency: str | None, max_memory: str | None, tokens: int | None, confident: bool, quiet: bool
) -> Target | None:
    """The target of a command line, None without a device. Raises `UsageError` and `DataError`, before anything else is done."""
    if device is None:
        given = {"--max-latency": max_latency, "--max-memory": max_memory, "--tokens": tokens, "--confident": confident or None}
        odd = next((name for name, value in given.items() if value is not None), None)
        if odd is not None:
            raise UsageError(f"{odd} is about a device: name it with --device, such as raspberry-pi-4 (edgeml device list has all)")
        return None
    latency = None if max_latency is None else parse_seconds(max_latency)
    if max_memory is not None and (max_memory.endswith("%") or max_memory == "auto"):
        raise UsageError(f"--max-memory is a size such as 512MiB, and not {max_memory:.40}: it is a limit on the whole process")
    memory = None if max_memory is None else parse_bytes(max_memory)
    if latency == 0 or memory == 0:
        raise UsageError("a limit of 0 refuses everything; leave the option out for no limit")
    return Target(_profile(device, quiet), latency, memory, tokens, confident)


def _profile(device: str, quiet: bool) -> Profile:
    if device.endswith(".toml") or "/" in device:
        return read_profile(device)
    try:  # a distribution of its own: an export without a device does without it
        from edgeml_devices.commands.probe import measured
        from edgeml_devices.library import find
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("edgeml_devices"):
            raise
        raise UsageError(
            f"the device '{device:.60}' is looked up in edgeml-devices, which is not installed: pip install 'edgeml-runtime[devices]' "
            "(from a checkout: ./devices), or give the TOML file of a profile"
        ) from None
    return find(device, lambda: measured(Path.cwd(), quiet))


def others(profile: Profile) -> list[Profile]:
    """The other devices that come with edgeml-devices, by name; none where that is not installed."""
    try:
        from edgeml_devices.library import profiles
    except ModuleNotFoundError:
        return []
    return [one for name, one in profiles().items() if name != profile.name]


@dataclass(frozen=True)
class Sketch:
    """A written candidate as far as a prediction needs it: its index, manifest and the costs of its graphs. It outlives the file."""

    bundle: Bundle
    manifest: Manifest
    graphs: Mapping[int, GraphCost]

    @classmethod
    def read(cls, path: Path) -> Sketch:
        """Of a file; its descriptor is closed again."""
        with Bundle.open(path) as bundle:
            manifest = load_manifest(bundle)
            pages = {page for task in manifest.tasks for page in pages_of(manifest, task).values()}
            return cls(bundle, manifest, {page: graph_cost(bundle.read(page)) for page in pages})

    @property
    def bytes(self) -> int:
        """Of the file, without its manifest."""
        return self.bundle.header.manifest_offset

    def budget(self, target: Target, memory: str | int) -> Budget:
        """What a session on the device makes of a memory option."""
        return plan_budget(self.bundle, self.manifest, memory, target.threads)


@dataclass(frozen=True)
class Estimate:
    """What is predicted of a candidate: the worst latency over its tasks (`task`), and the worst peak with every slot filled."""

    latency: Interval
    memory: Interval
    task: str
    budget: Budget
    residency: str

    def missed(self, target: Target) -> tuple[str, ...]:
        """The limits that are not kept: `latency`, `memory`."""
        slow = target.max_latency_s is not None and target.figure(self.latency) > target.max_latency_s
        large = target.figure(self.memory) > target.memory_bytes
        return ("latency",) * slow + ("memory",) * large


def estimate(
    sketch: Sketch,
    target: Target,
    memory: str | int = "100%",
    residency: str = "exact",
    only: str | None = None,
    tick: Callable[[int], None] = lambda _: None,
) -> Estimate:
    """Predict every task of a bundle (or `only` one) under a budget. Raises `UsageError` where the profile lacks a figure."""
    budget, manifest = sketch.budget(target, memory), sketch.manifest
    found: list[tuple[str, Prediction]] = []
    for task in manifest.tasks:
        if only is None or task.name == only:
            graphs = {name: sketch.graphs[page] for name, page in pages_of(manifest, task).items()}
            longest = task.preprocess.max_tokens if isinstance(task.preprocess, Preprocess) else TOKENS
            prediction = predict(
                target.profile,
                sketch.bundle.pages,
                manifest,
                graphs,
                budget,
                task,
                tokens=min(target.tokens or TOKENS, longest),
                threads=target.threads,
                residency=residency,
                variant=manifest.variants[0] if manifest.variants else None,
            )
            found.append((task.name, prediction))
            tick(1)
    slowest, slow = max(found, key=lambda each: target.figure(each[1].latency_s))
    largest = max((_filled(prediction, budget) for _, prediction in found), key=target.figure)
    return Estimate(slow.latency_s, largest, slowest, budget, residency)


def _filled(prediction: Prediction, budget: Budget) -> Interval:
    """The peak once every slot is filled: other tasks fill what this one leaves."""
    left = budget.slots * budget.slot_bytes - prediction.memory_terms.get("experts in slots", 0.0)
    peak = prediction.peak_memory_bytes
    return Interval(peak.value + left, peak.low, peak.high + left * (1 + MEMORY_STRUCTURE))
