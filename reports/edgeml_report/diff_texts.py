"""The parts of a text model: embeddings, routers, each operator with weights inside the trunk, the trunk's graph, the heads.

Weights are pages, with the same numbers in both bundles; an operator alone is a graph of its own that the bundle's weights run. What
an operator makes is taken up by a sum, the state that goes on to the next: where its error begins to grow, quality begins to go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

from numpy.typing import NDArray

from edgeml.errors import DataError
from edgeml.layout import Page
from edgeml_report.diff_graph import Graph, Operator, operators
from edgeml_report.diff_parts import ONE_MODEL, Alone, Keys, Pair, Part, answer_places, shared
from edgeml_report.diff_run import Machine, Tensors, roles

__all__ = ["text_parts"]


def text_parts(pair: Pair, stack: ExitStack) -> list[Part]:
    """In the order in which a request meets them; machines close with the `stack`. Raises `DataError` for another model's bundle."""
    if pair.bundle.manifest.sites != pair.reference.manifest.sites:
        raise DataError(f"{pair.where} have other sites of experts: {ONE_MODEL}")
    plain = stack.enter_context(Machine(pair.bundle))
    found = [_stages(pair, plain, "embeddings", "embedding", "embed", shared(pair, "embed"), "hidden0")]
    if routers := shared(pair, "router"):
        found.append(_stages(pair, plain, "routers", "router", "router", routers, "bias"))
    trunks = shared(pair, "trunk")
    for stages, tasks in trunks.items():
        found += _trunk(pair, stack, stages, tasks, f" ({stages[0]})" if len(trunks) > 1 else "")
    return found + list(_heads(pair, stack))


def _stages(pair: Pair, plain: Machine, name: str, kind: str, role: str, stages: dict[Keys, tuple[str, ...]], output: str) -> Part:
    """All stages of a role as one part."""
    weights = set[int]()
    for keys in stages:
        own, other = (_numbers(graph) for graph in pair.graphs(keys))
        if own != other:
            raise DataError(f"{pair.where}: stage '{keys[0]}' has its weights on other pages in the two: {ONE_MODEL}")
        weights |= own
    tasks = tuple(task for some in stages.values() for task in some)
    models = {stage: model for keys in stages for stage, model in pair.models(keys).items()}
    pages = _differing(pair, weights)
    return Part(
        name,
        kind,
        tasks,
        {task: [(output, output)] for task in tasks},
        lambda task, tensors: [plain.run(roles(pair.bundle.task(task))[role], tensors)[output]],
        tokens=role == "embed",
        state=(output, output) if role == "embed" else None,
        pages=pages,
        models=models,
        bytes=_bytes(pair, weights, list(stages)),
        same=not models and not pages,
    )


def _numbers(graph: Graph) -> set[int]:
    return {node.numbers["page"] for node in graph.nodes if node.domain and "page" in node.numbers}


def _trunk(pair: Pair, stack: ExitStack, stages: Keys, tasks: tuple[str, ...], which: str) -> Iterator[Part]:
    own, other = pair.graphs(stages)
    ours, theirs = operators(own), operators(other)
    if [(one.op, one.number) for one in ours] != [(one.op, one.number) for one in theirs]:
        raise DataError(f"{pair.where}: the trunks run other operators, or with other pages: {ONE_MODEL}")
    alone = stack.enter_context(Machine(pair.bundle, own={f"alone/{at}": _model(one) for at, one in enumerate(ours)}))
    for at, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        sides = ((stages[0], own, one), (stages[1], other, two))
        places = [pair.tell(side, stage, graph, op.output, "trunk") for side, (stage, graph, op) in enumerate(sides)]
        states = [pair.tell(side, stage, graph, op.state, "trunk") for side, (stage, graph, op) in enumerate(sides) if op.state]
        inputs = {f"in_{number}": pair.tell(1, stages[1], other, name, "trunk") for number, name in enumerate(two.inputs) if name}
        weights, chosen = {one.number}, None
        if one.op == "PagedExperts":
            site = pair.bundle.manifest.sites[one.number]
            weights = {expert.page for expert in (*site.experts, *site.shared)}
            chosen = tuple(pair.tell(side, stage, graph, op.inputs[1], "trunk") for side, (stage, graph, op) in enumerate(sides))
        pages = _differing(pair, weights)
        yield Part(
            _name(pair, ours, at) + which,
            "experts" if one.op == "PagedExperts" else "dense",
            tasks,
            {task: [(places[0], places[1])] for task in tasks},
            _operator(alone, f"alone/{at}", inputs),
            tokens=True,
            state=(states[0], states[1]) if len(states) == 2 else None,
            choices=None if chosen is None else (chosen[0], chosen[1]),
            pages=pages,
            bytes=_bytes(pair, weights, []),
            same=not pages,
        )
    models = pair.models(stages)
    taken = stack.enter_context(Machine(pair.reference, {stages[1]: pair.bundle.graph(stages[0])}))
    yield Part(
        f"trunk{which}",
        "trunk",
        tasks,
        {task: [("hidden", "hidden")] for task in tasks},
        lambda task, tensors: [taken.run(stages[1], tensors)["hidden"]],
        tokens=True,
        models=models,
        bytes=pair.sizes(stages),
        same=not models,
    )


def _operator(machine: Machine, stage: str, inputs: dict[str, str]) -> Alone:
    def alone(task: str, tensors: Tensors) -> Sequence[NDArray[Any]]:
        return [machine.run(stage, {name: tensors[key] for name, key in inputs.items()})["out"]]

    return alone


def _model(operator: Operator) -> tuple[bytes, list[str], list[str]]:
    return operator.alone, [f"in_{number}" for number, name in enumerate(operator.inputs) if name], ["out"]


def _name(pair: Pair, found: Sequence[Operator], at: int) -> str:
    """`experts of SITE`; a dense layer is named after the site that it leads to, or comes after."""
    sites = pair.bundle.manifest.sites
    if found[at].op == "PagedExperts":
        return f"experts of {sites[found[at].number].name}"
    place = [one.op == "PagedExperts" for one in found]
    first = max((number + 1 for number in range(at) if place[number]), default=0)
    following = next((one for one in found[at:] if one.op == "PagedExperts"), None)
    if following is not None:
        return f"dense {at - first + 1} of {sites[following.number].name}"
    return f"dense {at - first + 1}" + (f" after {sites[found[first - 1].number].name}" if first else "")


def _heads(pair: Pair, stack: ExitStack) -> Iterator[Part]:
    """Each head that differs; those that do not as one part."""
    heads = shared(pair, "head")
    places = {task: answer_places(pair, stages, task) for stages, tasks in heads.items() for task in tasks}
    machine = stack.enter_context(Machine(pair.bundle, told=pair.told[0]))

    def alone(task: str, tensors: Tensors) -> Sequence[NDArray[Any]]:
        made = machine.run(roles(pair.bundle.task(task))["head"], tensors, "head")
        return [made[own] for own, _ in places[task]]

    same: list[str] = []
    for stages, tasks in heads.items():
        weights = set[int]().union(*(_numbers(graph) for graph in pair.graphs(stages)))
        models, pages = pair.models(stages), _differing(pair, weights)
        if models or pages:
            about = {task: places[task] for task in tasks}
            size = _bytes(pair, weights, [stages])
            yield Part(f"head of {', '.join(tasks)}", "head", tasks, about, alone, models=models, pages=pages, bytes=size)
        else:
            same += tasks
    if same:
        size = _bytes(pair, set(), [stages for stages, tasks in heads.items() if tasks[0] in same])
        name = "heads" if len(same) == len(places) else "other heads"
        yield Part(name, "head", tuple(same), {task: places[task] for task in same}, bytes=size, same=True)


def _differing(pair: Pair, weights: set[int]) -> frozenset[int]:
    """Those of the pages that differ. Raises `DataError` where they cannot be exchanged."""
    found = set()
    for number in weights:
        own, other = (_page(pair, one.bundle.pages, number) for one in (pair.bundle, pair.reference))
        shapes = [[(matrix.rows, matrix.cols) for matrix in page.matrices] for page in (own, other)]
        if (own.kind, own.count, own.activation) != (other.kind, other.count, other.activation) or shapes[0] != shapes[1]:
            raise DataError(f"{pair.where}: page {number} is of another kind or shape: {ONE_MODEL}")
        if own.sha256 != other.sha256:
            found.add(number)
    return frozenset(found)


def _page(pair: Pair, pages: Sequence[Page], number: int) -> Page:
    if not 0 <= number < len(pages):
        raise DataError(f"{pair.where}: a graph names page {number}, which one of them does not have; edgeml verify says more")
    return pages[number]


def _bytes(pair: Pair, weights: set[int], stages: Sequence[Keys]) -> tuple[int, int]:
    own, other = (sum(one.bundle.pages[number].length for number in weights) for one in (pair.bundle, pair.reference))
    models = [pair.sizes(keys) for keys in stages]
    return own + sum(one for one, _ in models), other + sum(two for _, two in models)
