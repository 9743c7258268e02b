"""Every router three times: its torch module, its graph in onnxruntime, and the paper's equations written plainly in NumPy."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from edgeml_export.routers import (
    BiasRouter,
    Buckets,
    GliderRouter,
    GroupRouter,
    LinearRouter,
    PhatgooseRouter,
    ScarRouter,
    SharedRoutedRouter,
    TaskTableRouter,
    attach_bias_router,
    attach_group_router,
    bias_graph,
    density,
    group_graph,
    load_router,
    plain_norm,
    save_router,
    train_gate,
)
from native_case import make_case
from numpy.typing import NDArray

import edgeml
from edgeml import native
from edgeml.bundle import Bundle
from edgeml.errors import InputError, UsageError
from edgeml.made import make_mixture
from edgeml.manifest import load_manifest

HIDDEN, GROUPS, SITES, EXPERTS = 32, 4, 2, 8
LENGTHS = (20, 12, 3, 1)
Floats = NDArray[np.float32]


def drawn(*shape: int, seed: int = 0, spread: float = 1.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * spread


@pytest.fixture(scope="module")
def requests() -> tuple[torch.Tensor, torch.Tensor]:
    """hidden0 (4, 20, d) with padding that is not zero, and mask."""
    mask = torch.zeros(len(LENGTHS), max(LENGTHS))
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    return drawn(len(LENGTHS), max(LENGTHS), HIDDEN, seed=1), mask


def buckets() -> Buckets:
    x = plain_norm(drawn(600, HIDDEN, seed=2))
    return Buckets.fitted(x, torch.arange(600) % GROUPS, clusters=6, groups=GROUPS, theta=0.3)


def norm(x: Floats) -> Floats:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)


def softmax(z: Floats) -> Floats:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def largest(row: Floats, count: int) -> list[int]:
    return sorted(range(len(row)), key=lambda place: (-row[place], place))[:count]


def per_request(requests: tuple[torch.Tensor, torch.Tensor], answer: Callable[[Floats], Floats]) -> Floats:
    """`answer` on the real tokens of each request alone."""
    hidden0, mask = (value.numpy() for value in requests)
    return np.stack([answer(x[real > 0]) for x, real in zip(hidden0, mask, strict=True)])


# Group routers


def linear_oracle(router: LinearRouter) -> Callable[[Floats], Floats]:
    weight, bias = router.classify.weight.detach().numpy(), router.classify.bias.detach().numpy()
    return lambda x: softmax(weight @ norm(x.mean(0)) + bias)


def allowed(router: Buckets, x: Floats) -> NDArray[np.bool_]:
    """x (n, d), normalised -> which pairs attend."""
    centroids, prototypes, temperature = router.centroids.numpy(), router.prototypes.numpy(), float(router.temperature)
    cluster = [int(((token - centroids) ** 2).sum(-1).argmin()) for token in x]
    p = softmax(x @ prototypes.T / (np.sqrt(len(x[0])) * temperature))
    domain, sure = p.argmax(-1), p.max(-1) > router.theta
    out = np.zeros((len(x), len(x)), bool)
    for i in range(len(x)):
        for j in range(len(x)):
            same = domain[i] == domain[j] and sure[i] and sure[j]
            out[i, j] = i == j or min(i, j) < router.leading or cluster[i] == cluster[j] or same
    return out


def scar_oracle(router: ScarRouter) -> Callable[[Floats], Floats]:
    state = {name: value.numpy() for name, value in router.state_dict().items()}

    def attended(x: Floats) -> Floats:
        assert router.buckets is not None
        near, width = allowed(router.buckets, x), router.width // router.heads
        qkv = (x @ state["qkv.weight"].T).reshape(len(x), 3, router.heads, width)
        out = np.zeros((len(x), router.heads, width), np.float32)
        for head in range(router.heads):
            q, k, v = qkv[:, 0, head], qkv[:, 1, head], qkv[:, 2, head]
            for i in range(len(x)):
                keys = np.flatnonzero(near[i])
                out[i, head] = softmax(k[keys] @ q[i] / np.sqrt(width)) @ v[keys]
        return out.reshape(len(x), -1) @ state["output.weight"].T

    def answer(x: Floats) -> Floats:
        x = norm(x)
        t = x @ state["key.weight"].T
        t = t if router.buckets is None else t + attended(x)
        a = state["query"] @ t.T / np.sqrt(router.width)
        r = np.array([np.sort(row)[::-1][: router.top].mean() for row in a])
        return softmax(state["read.weight"] @ r + state["read.bias"])

    return answer


GROUP_ROUTERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Callable[[Floats], Floats]]]] = {
    "linear": (lambda: LinearRouter(HIDDEN, GROUPS), linear_oracle),
    "scar without attention": (lambda: ScarRouter(HIDDEN, GROUPS, 10, 16, top=5), scar_oracle),
    "scar": (lambda: ScarRouter(HIDDEN, GROUPS, 10, 16, top=5, buckets=buckets()), scar_oracle),
    "scar with more reach than tokens": (lambda: ScarRouter(HIDDEN, GROUPS, 10, 16, top=64, buckets=buckets()), scar_oracle),
}


@pytest.mark.parametrize("name", GROUP_ROUTERS)
def test_group_routers_agree(requests: tuple[torch.Tensor, torch.Tensor], name: str, context: native.Context) -> None:
    torch.manual_seed(0)
    make, oracle = GROUP_ROUTERS[name]
    router: GroupRouter = make()
    table = drawn(GROUPS, SITES, EXPERTS).numpy()
    groups, bias = run(group_graph(router, table), requests, context)
    with torch.no_grad():
        np.testing.assert_allclose(router(*requests).numpy(), groups, atol=1e-6)
    np.testing.assert_allclose(per_request(requests, oracle(router)), groups, atol=1e-5)
    assert (bias == table[groups.argmax(-1)]).all()
    assert len(run(group_graph(router), requests, context)) == 1
    with pytest.raises(ValueError, match="bias table"):
        group_graph(router, table[:2])


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[native.Context]:
    with make_case(tmp_path_factory.mktemp("routers")).open(threads=1) as opened:
        yield opened


def run(graph: bytes, requests: tuple[torch.Tensor, torch.Tensor], context: native.Context | None = None) -> list[Any]:
    """The graph's outputs; only with a context may it use our operators."""
    model = onnx.load_from_string(graph)
    onnx.checker.check_model(model)
    used = {node.domain for node in model.graph.node}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17), ("edgeml", 1)][: len(used)]
    options = onnxruntime.SessionOptions()
    if context is not None:
        options.add_session_config_entry("edgeml.context", context.handle)
        options.register_custom_ops_library(native.LIBRARY_PATH)
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, {"hidden0": requests[0].numpy(), "mask": requests[1].numpy()}))


def test_sparse_attention_is_sparse(requests: tuple[torch.Tensor, torch.Tensor]) -> None:
    near = buckets().allowed(plain_norm(requests[0]), requests[1])
    expected = np.mean([allowed(buckets(), norm(x[:n].numpy())).mean() for x, n in zip(requests[0], LENGTHS, strict=True)])
    assert density(near, requests[1]) == pytest.approx(expected)
    assert expected < 0.9


def test_tokens_that_are_not_numbers_are_nobodys_domain() -> None:
    x = torch.full((1, 2, HIDDEN), float("nan"))
    assert not buckets()(x)[2].any()


# Bias routers


def phatgoose_oracle(router: PhatgooseRouter) -> Callable[[Floats], Floats]:
    gates = router.gates.numpy()

    def answer(x: Floats) -> Floats:
        out = np.zeros((router.sites, router.experts), np.float32)
        for site in range(router.sites):
            z = norm(x) @ norm(gates[site]).T / np.sqrt(router.hidden)
            out[site] = z.mean(0)
            if router.keep is not None:
                weights = np.zeros_like(z)
                for token, row in enumerate(softmax(z)):
                    chosen = largest(row, router.top_k)
                    weights[token, chosen] = row[chosen] / (row[chosen].sum() + 1e-6)
                kept = largest(weights.mean(0), router.keep)
                out[site] = [out[site, e] if e in kept else -np.inf for e in range(router.experts)]
        return out

    return answer


def glider_oracle(router: GliderRouter) -> Callable[[Floats], Floats]:
    local, described = phatgoose_oracle(router.local), router.described.numpy()

    def answer(x: Floats) -> Floats:
        u = router.project.numpy() @ x.mean(0)
        cosine = described @ u / np.linalg.norm(u) / np.linalg.norm(described, axis=-1)
        return local(x) + router.alpha * cosine

    return answer


def table_oracle(router: TaskTableRouter) -> Callable[[Floats], Floats]:
    gate, keys = router.gate.numpy(), router.keys.numpy()

    def answer(x: Floats) -> Floats:
        key = np.zeros(len(gate))
        for z in x @ gate.T:
            chosen = largest(z, router.candidates)
            for e, pi in zip(chosen, softmax(z[chosen]), strict=True):
                key[e] += (pi if router.repaired else z[e] * (pi >= router.threshold)) / len(x)
        distance = 1 - keys @ key / np.linalg.norm(key)
        best = int(distance.argmin())
        return router.table.numpy()[best if distance[best] <= router.cutoff else router.patterns]

    return answer


def shared_oracle(router: SharedRoutedRouter) -> Callable[[Floats], Floats]:
    def answer(x: Floats) -> Floats:
        out = np.full((router.sites, router.experts), -np.inf, np.float32)
        for site, centroids in enumerate(router.centroids.numpy()):
            gates = np.zeros((len(x), router.experts))
            for token, s in enumerate(softmax(x @ centroids.T)):
                chosen = largest(s, router.top_k)
                gates[token, chosen] = s[chosen]
            out[site, largest(gates.mean(0), router.keep)] = 0
        return out

    return answer


def table(cutoff: float = 2.0, repaired: bool = True) -> TaskTableRouter:
    usage = torch.softmax(drawn(3, SITES, EXPERTS, seed=6), dim=-1)
    keys = drawn(3, EXPERTS, seed=7).abs()
    return TaskTableRouter(drawn(EXPERTS, HIDDEN, seed=5), keys, usage, cutoff, 3, 0.2, repaired, share=0.6)


def phatgoose(keep: int | None = None) -> PhatgooseRouter:
    return PhatgooseRouter(drawn(SITES, EXPERTS, HIDDEN, seed=3), 2, keep)


def glider(alpha: float = 3.0) -> GliderRouter:
    return GliderRouter(phatgoose(), drawn(SITES, EXPERTS, 6, seed=4), drawn(6, HIDDEN, seed=8), alpha)


def shared(keep: int = 4) -> SharedRoutedRouter:
    return SharedRoutedRouter(drawn(SITES, EXPERTS, HIDDEN, seed=9, spread=0.3), 2, keep)


BIAS_ROUTERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Callable[[Floats], Floats]]]] = {
    "phatgoose": (phatgoose, phatgoose_oracle),
    "phatgoose, three experts a site": (lambda: phatgoose(3), phatgoose_oracle),
    "glider": (glider, glider_oracle),
    "task table": (table, table_oracle),
    "task table, as published": (lambda: table(repaired=False), table_oracle),
    "task table, nothing near": (lambda: table(cutoff=1e-3), table_oracle),
    "shared and routed": (shared, shared_oracle),
}


@pytest.mark.parametrize("name", BIAS_ROUTERS)
def test_bias_routers_agree(requests: tuple[torch.Tensor, torch.Tensor], name: str) -> None:
    make, oracle = BIAS_ROUTERS[name]
    router: BiasRouter = make()
    (bias,) = run(bias_graph(router), requests)
    with torch.no_grad():
        np.testing.assert_allclose(router(*requests).numpy(), bias, atol=1e-6)
    np.testing.assert_allclose(per_request(requests, oracle(router)), bias, atol=1e-5)
    assert bias.shape == (len(LENGTHS), SITES, EXPERTS)


# What each paper promises


def test_an_expert_more_changes_no_other(requests: tuple[torch.Tensor, torch.Tensor]) -> None:
    before, row = phatgoose(), drawn(SITES, HIDDEN, seed=11)
    after = before.with_expert(row)
    (old,), (new,) = run(bias_graph(before), requests), run(bias_graph(after), requests)
    assert new.shape == (len(LENGTHS), SITES, EXPERTS + 1)
    np.testing.assert_allclose(new[..., :EXPERTS], old, atol=1e-6)
    z = after.token_logits(requests[0])
    alone = PhatgooseRouter(row[:, None]).token_logits(requests[0])
    torch.testing.assert_close(z[..., EXPERTS:], alone)


def test_a_gate_learns_where_its_expert_helps() -> None:
    """The expert is right on one half of the space and wrong on the other."""
    direction = drawn(HIDDEN, seed=12)
    frozen = drawn(HIDDEN, HIDDEN, seed=13, spread=0.2)
    batches = []
    for step in range(100):
        x = drawn(64, HIDDEN, seed=100 + step)
        base = torch.zeros(64, HIDDEN)
        batches.append((x, base, torch.where((x @ direction > 0)[:, None], x @ frozen, -x @ frozen)))
    gate = train_gate(lambda x: x @ frozen, torch.nn.functional.mse_loss, batches, 0.05)
    assert torch.cosine_similarity(gate, direction, dim=0) > 0.8
    assert (train_gate(lambda x: x, torch.nn.functional.mse_loss, batches[:0] or batches[:1], 0.0) == 0).all()


def test_alpha_gives_both_terms_the_same_median_margin() -> None:
    hidden0, mask = drawn(40, 9, HIDDEN, seed=14), torch.ones(40, 9)
    router = glider(1000.0).calibrated(hidden0, mask)

    def margin(values: torch.Tensor) -> float:
        best = values.flatten(0, -2).sort(descending=True).values
        return float((best[:, 0] - best[:, 1]).median())

    local, overall = margin(router.local.token_logits(hidden0)), margin(router.alpha * router.cosines(hidden0, mask))
    assert overall == pytest.approx(local, rel=1e-4)


def test_a_fitted_table_knows_its_tasks_and_what_is_none() -> None:
    """Two tasks whose tokens come from different halves of the space."""
    gate = torch.eye(EXPERTS, HIDDEN) * 4
    centre = torch.zeros(2, HIDDEN)
    centre[0, :3], centre[1, 3:6] = 2.0, 2.0
    task = torch.arange(60) % 2
    hidden0, mask = centre[task][:, None] + drawn(60, 8, HIDDEN, seed=15, spread=0.4), torch.ones(60, 8)
    usage = torch.softmax(drawn(2, SITES, EXPERTS, seed=16), dim=-1)
    router = TaskTableRouter.fitted(gate, usage, hidden0, mask, task, candidates=3)
    found = router.pattern(hidden0, mask)
    assert ((found == task) | (found == 2)).all()
    assert float((found == task).float().mean()) >= 0.9
    stranger = torch.zeros(1, 8, HIDDEN)
    stranger[..., 6:8] = 3.0
    assert router.pattern(stranger, torch.ones(1, 8)).tolist() == [2]


def test_a_table_keeps_the_fewest_that_reach_the_share() -> None:
    usage = torch.tensor([[[0.5, 0.3, 0.1, 0.1]]])
    for share, least, kept in ((0.5, 1, 1), (0.51, 1, 2), (0.8, 1, 2), (0.81, 1, 3), (0.1, 2, 2), (1.0, 1, 4)):
        router = TaskTableRouter(torch.zeros(4, HIDDEN), torch.ones(1, 4), usage, 1.0, 2, share=share, least=least)
        assert int((router.table[0] == 0).sum()) == kept


def test_choosing_shared_and_routed_does_not_renormalise() -> None:
    router, x = shared(), drawn(50, HIDDEN, seed=17)
    bias = torch.zeros(50, EXPERTS)
    bias[10:, 1:] = -torch.inf  # one expert left
    bias[:10, :3] = 0.2  # a preference, which must not show in the weights
    session = onnxruntime.InferenceSession(router.choice_graph(1), providers=["CPUExecutionProvider"])
    ids, weights = session.run(None, {"x": x.numpy(), "bias": bias.numpy()})
    torch_ids, torch_weights = router.choose(1, x, bias)
    assert (torch_ids.numpy() == ids).all()
    np.testing.assert_allclose(torch_weights.numpy(), weights, atol=1e-6)
    s = softmax(x.numpy() @ router.centroids[1].numpy().T)
    assert (ids[10:] == [0, -1]).all()
    np.testing.assert_allclose(weights[10:], np.stack([s[10:, 0], np.zeros(40)], 1), atol=1e-6)
    np.testing.assert_allclose(weights[:10], np.take_along_axis(s[:10], ids[:10], -1), atol=1e-6)
    with pytest.raises(ValueError, match="in this order"):
        SharedRoutedRouter(router.centroids, 4, 2)


# In a bundle


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hidden size 32, tasks weather and mood, two sites of 8 experts."""
    path = tmp_path_factory.mktemp("toy") / "toy.edgeml"
    make_mixture(path, hidden=HIDDEN)
    return path


TEXTS = ["Will it rain tomorrow?", "a bad film", "sun and snow and fog and wind and rain"]


@pytest.mark.parametrize("name", BIAS_ROUTERS)
@pytest.mark.parametrize("residency", ["exact", "masked"])
def test_a_bundle_with_a_bias_router_runs(toy: Path, tmp_path: Path, name: str, residency: str) -> None:
    attach_bias_router(toy, tmp_path / "m.edgeml", bias_graph(BIAS_ROUTERS[name][0]()), "router_paper", ["weather"])
    with edgeml.open(tmp_path / "m.edgeml", residency=residency) as session, edgeml.open(toy, residency=residency) as before:
        assert np.isfinite(session.run("weather", texts=TEXTS).scores).all()
        assert (session.run("mood", texts=TEXTS).scores == before.run("mood", texts=TEXTS).scores).all()
    with pytest.raises(UsageError, match="no task 'other'"):
        attach_bias_router(toy, tmp_path / "m.edgeml", b"", "router_paper", ["other"])


@pytest.mark.parametrize("name", GROUP_ROUTERS)
def test_a_bundle_with_a_group_router_runs(toy: Path, tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    groups = {"sky": ["weather"], "feeling": ["mood"]}
    make = GROUP_ROUTERS[name][0]()
    router = type(make)(HIDDEN, 2) if isinstance(make, LinearRouter) else ScarRouter(HIDDEN, 2, 10, 16, top=5, buckets=make.buckets)
    save_router(tmp_path / "r.safetensors", router, list(groups))
    loaded, names = load_router(tmp_path / "r.safetensors")
    assert names == list(groups)
    graph = group_graph(loaded, drawn(2, SITES, EXPERTS).numpy())
    assert graph == group_graph(router, drawn(2, SITES, EXPERTS).numpy())
    attach_group_router(toy, tmp_path / "m.edgeml", graph, groups, biased=True)
    with edgeml.open(tmp_path / "m.edgeml") as session:
        answer = session.run_auto(texts=TEXTS)
        assert set(answer.groups) <= set(groups)
        assert sum(len(result.labels) for result in answer.results.values()) == len(TEXTS)
    with pytest.raises(UsageError, match="a router already"):
        attach_group_router(tmp_path / "m.edgeml", tmp_path / "n.edgeml", graph, groups, biased=True)
    with Bundle.open(tmp_path / "m.edgeml") as bundle:
        assert load_manifest(bundle).router is not None
        assert json.loads(json.dumps(bundle.manifest))["router"]["stage"] == "router"


def test_a_saved_router_is_data_from_outside(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    router = LinearRouter(HIDDEN, 2)
    for content in (b"", b"nothing of the kind" * 9):
        path.write_bytes(content)
        with pytest.raises(InputError, match="no saved router"):
            load_router(path)
    router.classify.weight.data[0, 0] = float("nan")
    save_router(path, router, ["a", "b"])
    with pytest.raises(InputError, match="not all finite"):
        load_router(path)
