"""Whether something fits a machine, and how to run it there: a bundle under a profile, or a model's folder by the headers of its files.

What `edgeml doctor` and `edgeml device predict` say stands here; the arithmetic of time is `predict`'s. Nothing but headers and graphs
is read, so a model that has not been exported, or not even downloaded in full, can be judged.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgeml.bundle import Bundle
from edgeml.device import Profile
from edgeml.errors import BudgetError, DataError, UsageError
from edgeml.graph_cost import GraphCost, graph_cost
from edgeml.manifest import ImageStages, Manifest, Preprocess, Task
from edgeml.predict import Prediction, Routing, pages_of, predict
from edgeml.sizes import format_bytes
from edgeml.store import AUTO_RESERVE_BYTES, AUTO_SHARE, Budget, plan_budget
from edgeml.variants import Wish, choose_variant, with_variant

__all__ = ["Fit", "ModelFolder", "fit_bundle", "fit_folder", "read_folder"]

#: Bytes a weight in our formats, scales included: 16 x 32 tiles with 16 scales of 2 bytes.
BITS = {"float32": 4.0, "int8": 544 / 512, "int4": 288 / 512}
NO_WISH = Wish()
LONGEST_HEADER = 100 << 20
_WIDTHS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_ROUTED = re.compile(r"\bexperts?\.(\d+)\.|\bexperts\.(gate_up_proj|down_proj|up_proj|gate_proj)")
#: Waiting for pages is worth its while up to this many times the computing; the same bound as in `routing`.
BEARABLE = 1.0


@dataclass(frozen=True)
class Fit:
    """A bundle on a device: the budget, the prediction under it, whether it fits, and what to do."""

    task: str
    budget: Budget
    prediction: Prediction
    fits: bool
    advice: str
    threads: int
    tokens: int | None
    residency: str

    def as_json(self, profile: Profile) -> dict[str, Any]:
        """The document that --json prints."""
        return {
            "device": profile.name,
            "task": self.task,
            "tokens": self.tokens,
            "threads": self.threads,
            "residency": self.residency,
            "memory_budget_bytes": self.budget.total_bytes,
            "full_budget_bytes": self.budget.full_bytes,
            "usable_bytes": profile.value("memory.usable_bytes"),
            "fits": self.fits,
            "advice": self.advice,
            **self.prediction.as_json(),
        }


def fit_bundle(
    bundle: Bundle,
    manifest: Manifest,
    profile: Profile,
    *,
    task: str | None = None,
    memory: str | None = None,
    tokens: int = 64,
    threads: int | None = None,
    residency: str = "exact",
    wish: Wish = NO_WISH,
    routing: Routing | None = None,
) -> Fit:
    """Predict a bundle on a device and say what to do. Raises `UsageError` for a wrong wish, `BudgetError` below the floor."""
    variant = choose_variant(manifest, wish, str(bundle.path))
    chosen = _task(with_variant(manifest, variant), task, str(bundle.path))
    if isinstance(chosen.preprocess, Preprocess) and not 1 <= tokens <= chosen.preprocess.max_tokens:
        raise UsageError(f"task '{chosen.name}' reads 1 to {chosen.preprocess.max_tokens} tokens, not {tokens}")
    cores = int(profile.need("cpu.cores").value)
    count = min(threads or cores, cores)
    spare = int(max(profile.need("memory.usable_bytes").value - AUTO_RESERVE_BYTES, 0) * AUTO_SHARE)
    budget = _budget(bundle, manifest, profile, memory, spare, count)
    graphs = {name: _cost(bundle, page) for name, page in pages_of(manifest, chosen).items()}

    def said(how: str) -> Prediction:
        given = (profile, bundle.pages, manifest, graphs, budget, chosen)
        return predict(*given, tokens=tokens, threads=count, residency=how, variant=variant, routing=routing)

    prediction = said(residency)
    fits = prediction.peak_memory_bytes.value <= profile.need("memory.usable_bytes").value
    on_images = isinstance(chosen.stages, ImageStages)
    advice = _advice(manifest, chosen, budget, said("exact"), fits, profile)
    return Fit(chosen.name, budget, prediction, fits, advice, count, None if on_images else tokens, residency)


def _task(manifest: Manifest, name: str | None, where: str) -> Task:
    if name is None:
        if not manifest.tasks:
            raise UsageError(f"{where} answers no task, so there is nothing to predict")
        return next((task for task in manifest.tasks if task.kind != "embedding"), manifest.tasks[0])
    for task in manifest.tasks:
        if task.name == name:
            return task
    raise UsageError(f"{where} has no task {name!r:.80}; it has {', '.join(task.name for task in manifest.tasks[:20])}")


def _budget(bundle: Bundle, manifest: Manifest, profile: Profile, memory: str | None, spare: int, threads: int) -> Budget:
    """The budget asked for, or on that device as much as it can spare."""
    if memory is not None and memory.strip().lower() != "auto":
        return plan_budget(bundle, manifest, memory, threads)
    full = plan_budget(bundle, manifest, "100%", threads)
    if full.full_bytes <= spare:
        return full
    try:
        return plan_budget(bundle, manifest, spare, threads)
    except BudgetError as error:
        usable = format_bytes(int(profile.need("memory.usable_bytes").value))
        raise BudgetError(f"{error}; on {profile.title} {usable} are usable: export with fewer bits, or prune") from None


def _cost(bundle: Bundle, page: int) -> GraphCost:
    return graph_cost(bundle.read(page))


def _advice(manifest: Manifest, task: Task, budget: Budget, exact: Prediction, fits: bool, profile: Profile) -> str:
    if not fits:
        return "the process would not fit into this device's memory: give a smaller --memory, export with fewer bits, or prune"
    if isinstance(task.stages, ImageStages):
        return "graphs are held whole: nothing is paged; a smaller variant is what makes it quicker"
    if budget.complete:
        return f"everything fits: hold it all ({format_bytes(budget.full_bytes)} of weights)"
    held = f"{budget.pages} of {budget.pageable_pages} pages fit"
    cost = f"waiting for pages would take {_ms(exact.wait_s)} a request, computing takes {_ms(exact.compute_s)}"
    if exact.wait_s <= BEARABLE * exact.compute_s:
        return f"{held}, and {cost}: page (--residency exact)"
    if task.name in manifest.usage:
        return f"{held}, and {cost}: mask (--residency masked), and look at edgeml eval for what that loses; or prune"
    return f"{held}, and {cost}; the bundle records no usage to mask by: prune, use fewer bits, or export with data"


def _ms(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 0.995 else f"{seconds * 1e3:.3g} ms"


# ---- a model's folder ----


@dataclass(frozen=True)
class ModelFolder:
    """Weights of a folder of safetensors, counted from their headers; `routed` those of experts that tokens choose."""

    files: int
    bytes: int
    parameters: int
    routed: int
    experts: int | None
    top_k: int | None
    kind: str | None

    @property
    def active(self) -> float:
        """Parameters that a token uses, as far as the configuration says."""
        if not self.routed or not self.experts or not self.top_k:
            return float(self.parameters)
        return self.parameters - self.routed * (1 - self.top_k / self.experts)


def read_folder(folder: Path) -> ModelFolder:
    """Count the weights in a folder's safetensors files (or in one such file). Raises `DataError`."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise DataError(f"{folder}: holds no .safetensors files; give a bundle, or the folder of a Hugging Face model")
    total = parameters = routed = 0
    for file in files:
        for name, entry in _header(file).items():
            if name == "__metadata__":
                continue
            try:
                count, width = math.prod(entry["shape"]), _WIDTHS[entry["dtype"]]
            except (KeyError, TypeError):
                raise DataError(f"{file}: its header describes '{name:.80}' in a way this edgeml does not know") from None
            total, parameters = total + count * width, parameters + count
            routed += count if _ROUTED.search(name) else 0
    config = _config(folder / "config.json" if folder.is_dir() else folder.parent / "config.json")
    experts = _whole(config, "num_local_experts", "num_experts", "n_routed_experts")
    return ModelFolder(
        len(files), total, parameters, routed, experts, _whole(config, "num_experts_per_tok", "top_k"), config.get("model_type")
    )


def _header(file: Path) -> Mapping[str, Any]:
    try:
        with file.open("rb") as opened:
            start = opened.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else LONGEST_HEADER + 1
            header = opened.read(length) if length <= LONGEST_HEADER else b""
        document = json.loads(header)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise DataError(f"{file}: this is no safetensors file, or its header is damaged; copy it again") from None
    if not isinstance(document, dict):
        raise DataError(f"{file}: this is no safetensors file")
    return document


def _config(file: Path) -> Mapping[str, Any]:
    try:
        document = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    return next((config[name] for name in names if type(config.get(name)) is int and config[name] > 0), None)


def fit_folder(model: ModelFolder, profile: Profile, disk_free_bytes: int | None) -> dict[str, Any]:
    """What a model would take in each width of weights, against a device: bytes, and seconds a token that reading memory alone takes."""
    spare = max(profile.need("memory.usable_bytes").value - AUTO_RESERVE_BYTES, 0) * AUTO_SHARE
    rate = (profile.figures.get("memory.read_all_bytes_per_s") or profile.need("memory.read_bytes_per_s")).value
    rows = []
    for name, width in BITS.items():
        held, active = model.parameters * width, model.active * width
        rows.append(
            {
                "weights": name,
                "bytes": int(held),
                "fits_memory": held <= spare,
                "pinned_fits_memory": (model.parameters - model.routed) * width <= spare,
                "fits_disk": None if disk_free_bytes is None else held <= disk_free_bytes,
                "least_s_per_token": active / rate,
            }
        )
    return {
        "device": profile.name,
        "files": model.files,
        "bytes": model.bytes,
        "parameters": model.parameters,
        "routed_parameters": model.routed,
        "active_parameters": int(model.active),
        "model_type": model.kind,
        "spare_bytes": int(spare),
        "disk_free_bytes": disk_free_bytes,
        "widths": rows,
        "advice": _folder_advice(model, rows, spare),
    }


def _folder_advice(model: ModelFolder, rows: list[dict[str, Any]], spare: float) -> str:
    whole = next((row for row in rows if row["fits_memory"] and row["fits_disk"] is not False), None)
    if whole is not None:
        return f"fits whole in {whole['weights']} ({format_bytes(whole['bytes'])} of the {format_bytes(int(spare))} that can be spared)"
    least = rows[-1]
    if least["fits_disk"] is False:
        return f"does not fit on the disk even in {least['weights']} ({format_bytes(least['bytes'])}): prune it, or free space"
    if model.routed and least["pinned_fits_memory"]:
        share = model.routed / model.parameters
        return f"its experts ({share:.0%} of the weights) would have to be paged or masked: the rest fits in memory in {least['weights']}"
    return f"does not fit in memory even in {least['weights']} ({format_bytes(least['bytes'])}): prune it, or take a smaller model"
