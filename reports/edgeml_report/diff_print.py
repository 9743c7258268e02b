"""A diff as text for people: what was lost and where, part by part, then task by task or answer by answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from edgeml.commands._options import printable

__all__ = ["grown", "states", "table"]


def table(document: Mapping[str, Any], name: str, variant: str | None) -> Iterator[str]:
    """The lines that `edgeml diff` prints; `name` and `variant` of the bundle."""
    ours, theirs = (_named(*one) for one in ((name, variant), (document["reference_bundle"], document["reference_variant"])))
    of = f" ({document['split']})" if document["split"] is not None else ""
    asked = f"{_plural(document['rows'], 'input')} of {_plural(len(document['tasks']), 'task')}{of}"
    yield f"{printable(ours)} against {printable(theirs)}: {asked}"
    yield from _headline(document)
    if document["parts"]:
        yield ""
        yield from _parts(document["parts"])
    yield ""
    yield from _answers(document["answers"]) if "answers" in document else _tasks(document["by_task"])


def _named(name: str, variant: str | None) -> str:
    return name if variant is None else f"{name}, variant {variant}"


def _plural(amount: int, what: str) -> str:
    return f"{amount} {what}" + ("" if amount == 1 else "s")


def _headline(document: Mapping[str, Any]) -> Iterator[str]:
    """What was lost, and which part lost most of it, in sentences."""
    if document["score"] is not None:
        scores = f"mean score {100 * document['score']:.2f}, the reference {100 * document['reference_score']:.2f}"
        yield f"{scores}: {_points(document['lost'])} points"
    if not document["parts"]:
        yield "nothing differs: the two have the same weights and graphs"
        return
    yield f"logits are {_percent(document['error'])} off"
    worst = next((part for part in document["parts"] if part["name"] == document["worst"]), None)
    if worst is None and any(part["restored_error"] is not None for part in document["parts"]):
        yield "no stage or site brings anything back when it alone is restored"
    if worst is not None:
        yield f"{printable(worst['name'])} lost most of it: {_restored(worst, document)}"
        layers = [part for part in document["parts"] if part["within"] == worst["name"] and part["restored_error"] is not None]
        layer = min(layers, key=lambda part: part["restored_error"], default=None)
        if layer is not None:
            yield f"in it, {printable(layer['name'].rpartition(', ')[2])}: {_restored(layer, document)}"
    yield from _grown(document["parts"])
    if document["why"] is not None:
        yield document["why"]


def _restored(part: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    gain = "" if part["gain"] is None else f", {_points(part['gain'])} points"
    return f"restored alone, it leaves {_percent(part['restored_error'])} of {_percent(document['error'])}{gain}"


def states(parts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The parts behind which the state is looked at: embeddings and sites of experts, of models without sites all that have a state."""
    found = [part for part in parts if part.get("state_error") is not None]
    sites = [part for part in found if part.get("kind") in ("embedding", "experts")]
    return sites if len(sites) > 1 else found


def grown(parts: Sequence[Mapping[str, Any]], key: str = "state_error") -> tuple[Mapping[str, Any], Mapping[str, Any]] | None:
    """Between which two neighbours that error grows most; None where it grows nowhere."""
    steps = [(two[key] - one[key], one, two) for one, two in pairwise(parts)]
    step, before, most = max(steps, key=lambda one: one[0], default=(0, {}, {}))
    return (before, most) if step > 0 else None


def _grown(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    chain = states(parts)
    found = grown(chain)
    if found is not None:
        first, last = (f"{_percent(part['state_error'])} off after the {printable(part['name'])}" for part in (chain[0], chain[-1]))
        before, most = (printable(part["name"]) for part in found)
        yield f"the state is {first}, {last}; it grows most from the {before} to the {most}"


def _parts(parts: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    columns = ("KiB", "was KiB", "alone", "so far", "state", "choices", "left", "gain, points")
    rows = [
        (
            _size(part["bytes"]),
            _size(part["reference_bytes"]),
            "same" if part["same"] else _percent(part["alone_error"]),
            _percent(part["error"]),
            _percent(part["state_error"]),
            _percent(part["same_choices"]),
            _percent(part["restored_error"]),
            "-" if part["gain"] is None else _points(part["gain"]),
        )
        for part in parts
    ]
    used = [at for at in range(len(columns)) if any(row[at] != "-" for row in rows)]
    names = [("  " if part["within"] else "") + printable(_short(part)) for part in parts]
    wide = max(len("part"), *map(len, names))
    widths = {at: max(len(columns[at]), *(len(row[at]) for row in rows)) for at in used}
    yield "  ".join([f"{'part':<{wide}}", *(f"{columns[at]:>{widths[at]}}" for at in used)])
    for name, row in zip(names, rows, strict=True):
        yield "  ".join([f"{name:<{wide}}", *(f"{row[at]:>{widths[at]}}" for at in used)])
    yield ""
    meant = {
        "alone": "alone: error of what a part makes of the reference's inputs",
        "so far": "so far: error of what a part makes as a request meets it",
        "state": "state: error of the sum that goes on to the next part",
        "choices": "choices: experts chosen as the reference chooses them",
        "left": "left: error of the logits when this part alone is restored",
        "gain, points": "gain: the mean score that restoring it alone brings, with its 95 % interval (one in twenty misses by chance)",
    }
    yield from (meant[columns[at]] for at in used if columns[at] in meant)
    gains = [part["gain"] for part in parts if part["gain"] is not None]
    if gains and not any(gain["low"] is not None and gain["low"] > 0 for gain in gains):
        yield "no gain is sure: more rows (--limit) may tell; errors tell parts apart with fewer"


def _short(part: Mapping[str, Any]) -> str:
    """A layer without the name of its stage, which stands above it."""
    return str(part["name"]).removeprefix(f"{part['within']}, ") if part["within"] else str(part["name"])


def _tasks(tasks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    wide = max(len("task"), *(len(printable(task["task"])) for task in tasks))
    yield f"{'task':<{wide}}  {'n':>5}  {'score':>6}  {'reference':>9}  {'points':>7}  {'error':>7}  {'changed':>7}"
    for task in tasks:
        own, other = 100 * task["score"], 100 * task["reference_score"]
        figures = f"{task['rows']:>5}  {own:>6.2f}  {other:>9.2f}  {own - other:>+7.2f}  {_percent(task['error']):>7}"
        yield f"{printable(task['task']):<{wide}}  {figures}  {_percent(task['changed']):>7}"


def _answers(answers: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for answer in answers:
        share, same = answer["changed"], {None: "", 0.0: ", the same answer", 1.0: ", another answer"}
        changed = same.get(share) or f", {share:.2%} of it another" if share is not None else ""
        yield f"input {answer['input'] + 1}, {printable(answer['task'])}: logits {_percent(answer['error'])} off{changed}"
        wide = max((len("label"), *(len(printable(label)) for label in answer["reference"])))
        if answer["reference"]:
            yield f"  {'label':<{wide}}  {'reference':>9}  {'bundle':>7}  {'points':>7}"
        for label, share in answer["reference"].items():
            own = answer["bundle"][label]
            yield f"  {printable(label):<{wide}}  {share:>9.2%}  {own:>7.2%}  {100 * (own - share):>+7.2f}"


def _points(gain: Mapping[str, Any]) -> str:
    """A difference of scores in points, with its interval where there is one."""
    ends = "" if gain["low"] is None else f" ({100 * gain['low']:+.2f} to {100 * gain['high']:+.2f})"
    return f"{100 * gain['value']:+.2f}{ends}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2%}"


def _size(value: int | None) -> str:
    return "-" if value is None else f"{value / 1024:.0f}"
