"""The parts of a network for images: backbones and heads, and each layer inside them.

Stages can be exchanged where the backbones' features have one shape: a float network and its rounded copy, not two that were pruned
differently. Layers can where all layers of a stage have the same shapes as well: channels of pruned layers are other channels, even
where there happen to be as many. What cannot be exchanged is said in a sentence, and keeps the errors that can be had.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from numpy.typing import NDArray

from edgeml.errors import BundleError
from edgeml_report.diff_graph import Graph, exchanged, layers
from edgeml_report.diff_parts import Keys, Pair, Part, answer_places, shared
from edgeml_report.diff_run import Machine, Tensors, forward

__all__ = ["image_parts"]


def image_parts(pair: Pair, stack: ExitStack, inputs: Callable[[str], Tensors]) -> list[Part]:
    """In the order in which a request meets them; `inputs(task)` is a batch, machines close with the `stack`."""
    found: list[Part] = []
    for stages, tasks in shared(pair, "backbone").items():
        heads = {keys: some for keys, some in shared(pair, "head").items() if set(some) <= set(tasks)}
        inner = {keys: _layers(pair, keys, "backbone" if keys == stages else "head") for keys in (stages, *heads)}
        places = {task: answer_places(pair, keys, task) for keys, some in heads.items() for task in some}
        own, other = (
            stack.enter_context(Machine(opened, told=told)) for opened, told in zip((pair.bundle, pair.reference), pair.told, strict=True)
        )
        seen = [forward(machine, tasks, inputs(tasks[0])) for machine in (own, other)]
        features = [{name: seen[side][tasks[0]][name].shape for name in _made(pair, side, stages)} for side in (0, 1)]
        fits = features[0] == features[1]
        if not fits:
            shapes = [", ".join(str(shape[1:]) for shape in made.values()) for made in features]
            pair.why.append(
                f"backbone and heads cannot be exchanged: the reference's features are {shapes[1]}, the bundle's {shapes[0]} "
                "(pruned in another way), so no stage is restored alone and only logits are compared"
            )
        which = "" if len(shared(pair, "backbone")) == 1 else f" ({stages[0]})"
        both = [(name, name) for name in features[1] if name in features[0]]
        found.append(_stage(pair, own, f"backbone{which}", "backbone", stages, tasks, {tasks[0]: both if fits else []}, fits))
        found += _inside(pair, stack, found[-1], stages, inner[stages], seen) if fits else []
        for keys, some in heads.items():
            found.append(_stage(pair, own, f"head of {', '.join(some)}", "head", keys, some, {t: places[t] for t in some}, fits))
            found += _inside(pair, stack, found[-1], keys, inner[keys], seen) if fits else []
    return found


def _made(pair: Pair, side: int, stages: Keys) -> Sequence[str]:
    return (pair.bundle, pair.reference)[side].stage(stages[side]).outputs


def _stage(
    pair: Pair, machine: Machine, name: str, role: str, stages: Keys, tasks: tuple[str, ...], places: dict[str, list[Keys]], fits: bool
) -> Part:
    models = pair.models(stages)

    def alone(task: str, tensors: Tensors) -> Sequence[NDArray[Any]]:
        made = machine.run(stages[0], tensors, role)
        return [made[own] for own, _ in places[task]]

    alike = role == "backbone" or fits  # a backbone reads the image
    return Part(
        name,
        role,
        tasks,
        places,
        alone if alike and models else None,
        models=models if fits else {},
        bytes=pair.sizes(stages),
        same=not models,
    )


#: Of a stage: both graphs, and the places of their layers.
_Inner = tuple[Graph, Graph, list[tuple[str, ...]], list[tuple[str, ...]], list[Keys]]


def _layers(pair: Pair, stages: Keys, role: str) -> _Inner | None:
    """None where the stages are the same or have other layers."""
    own, other = pair.graphs(stages)
    ours, theirs = layers(own), layers(other)
    if not pair.models(stages) or len(ours) != len(theirs):
        return None
    told = [
        (pair.tell(0, stages[0], own, one[0], role), pair.tell(1, stages[1], other, two[0], role))
        for one, two in zip(ours, theirs, strict=True)
    ]
    return own, other, ours, theirs, told


def _inside(
    pair: Pair, stack: ExitStack, whole: Part, stages: Keys, inner: _Inner | None, seen: Sequence[dict[str, Tensors]]
) -> Iterator[Part]:
    """Each layer of a stage that differs."""
    if inner is None:
        if not whole.same:
            pair.why.append(f"the layers of the {whole.name} are not compared: the two have other layers")
        return
    own, other, ours, theirs, told = inner
    task = whole.tasks[0]
    if not all(seen[0][task][one].shape == seen[1][task][two].shape for one, two in told):
        pair.why.append(f"the layers of the {whole.name} are not compared: they have other channels (pruned in another way)")
        return
    for at, keys in enumerate(told):
        try:
            taken, restored = exchanged(other, own, theirs, ours, at).encode(), exchanged(own, other, ours, theirs, at).encode()
        except BundleError as error:
            pair.why.append(f"the layers of the {whole.name} are not compared: {error}")
            return
        place = theirs[at][0]
        machine = stack.enter_context(Machine(pair.reference, {stages[1]: taken}, {stages[1]: [place]}))
        yield Part(
            f"{whole.name}, layer {at + 1}",
            "layer",
            whole.tasks,
            {task: [keys]},
            _layer(machine, stages[1], place),
            within=whole.name,
            models={stages[0]: restored},
        )


def _layer(machine: Machine, stage: str, name: str) -> Any:
    def alone(task: str, tensors: Tensors) -> Sequence[NDArray[Any]]:
        return [machine.run(stage, tensors, "layer")[f"layer/{name}"]]

    return alone
