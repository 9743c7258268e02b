"""Dense feed-forward layers become a shared expert and routed experts.

Strategy. The neurons of one feed-forward layer are divided, none is added and none is lost:

1. The neurons that matter most everywhere, by RMS(activation) x length of their output column, become the shared expert.
2. The rest is grouped by co-activation on calibration text (balanced k-means), so that a token needs few groups.
3. A ridge regression from the layer's input to each group's output energy starts the router; its offset puts the mean
   weight of the chosen experts at 1.
4. The mean of what top-k leaves out is folded into the output bias.

A task's learned bias is added to the router's logits. It starts at 0 for the `inside` experts of a site that are more active
on that task than on others, and at `outside` for the rest: routing is by task and by token from the first step.

Weights are 2 sigmoid(logit), not renormalised: masking an expert takes its contribution away and changes no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from edgeml_export.encoder import Encoder, FeedForward, Layer, MultiTaskModel

__all__ = ["MixtureConfig", "MixtureFeedForward", "MultiTaskMixture", "upcycle"]


@dataclass(frozen=True)
class MixtureConfig:
    """Neurons of the shared expert, number of routed experts, neurons of each, experts chosen per token."""

    shared: int
    experts: int
    width: int
    top_k: int

    @property
    def intermediate(self) -> int:
        return self.shared + self.experts * self.width

    def share_of(self, hidden: int, dense: int) -> float:
        """Multiply-adds per token, router included, as a share of the dense layer of width `dense`."""
        return (2 * (self.shared + self.top_k * self.width) + self.experts) / (2 * dense)


class MixtureFeedForward(nn.Module):
    """`down(g * gelu(up(x)))`: g is 1 for shared neurons and the expert's weight for routed ones.

    Neurons are ordered: shared, expert 0, expert 1, ... This masked dense form computes every neuron; it is exact and
    quick to train. The runtime computes only the chosen experts.
    """

    def __init__(self, hidden: int, config: MixtureConfig) -> None:
        super().__init__()
        self.config = config
        self.up = nn.Linear(hidden, config.intermediate)
        self.down = nn.Linear(config.intermediate, hidden)
        self.router = nn.Linear(hidden, config.experts)
        self.chosen: Tensor | None = None  # weights (B, T, E) of the last forward, for usage and agreement

    def weights(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, T, d), bias (B, E) with -inf for "not now" -> combine weight of each expert (B, T, E), 0 if not chosen."""
        logits = self.router(x)
        if bias is not None:
            logits = logits + bias[:, None, :]
        # A stable sort keeps the lowest index first on a tie, as ONNX's TopK does.
        chosen = torch.sort(logits.detach(), dim=-1, descending=True, stable=True).indices[..., : self.config.top_k]
        keep = torch.zeros_like(logits).scatter_(-1, chosen, 1.0)
        return 2 * torch.sigmoid(logits) * keep

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        weights = self.weights(x, bias)
        self.chosen = weights.detach()
        h = F.gelu(self.up(x))
        shared, routed = h[..., : self.config.shared], h[..., self.config.shared :]
        routed = routed.unflatten(-1, (self.config.experts, self.config.width)) * weights[..., None]
        return cast(Tensor, self.down(torch.cat([shared, routed.flatten(-2)], dim=-1)))


class MultiTaskMixture(MultiTaskModel):
    """A multi-task model whose encoder is a mixture; `task_bias` (tasks + 1, sites, E), the last row for sentence vectors."""

    def __init__(self, encoder: Encoder, classes: dict[str, int], config: MixtureConfig) -> None:
        super().__init__(encoder, classes)
        self.config = config
        for layer in self.layers():
            layer.feed_forward = MixtureFeedForward(encoder.config.hidden, config)
        self.task_bias = nn.Parameter(torch.zeros(len(classes) + 1, encoder.config.layers, config.experts))

    def layers(self) -> list[Layer]:
        return [cast(Layer, layer) for layer in self.encoder.layers]

    def sites(self) -> list[MixtureFeedForward]:
        """The feed-forward parts in layer order: one site each."""
        return [cast(MixtureFeedForward, layer.feed_forward) for layer in self.layers()]


@dataclass
class _Observed:
    """One layer on calibration tokens: inputs (N, d), activations (N, f), and each token's task (N,)."""

    x: Tensor
    h: Tensor
    task: Tensor


@torch.no_grad()
def upcycle(
    model: MultiTaskModel,
    config: MixtureConfig,
    batches: list[tuple[Tensor, Tensor, Tensor, Tensor]],
    seed: int = 0,
    inside: int | None = None,
    outside: float = -3.0,
) -> MultiTaskMixture:
    """Turn a dense model into a mixture of the same neurons.

    `batches` are calibration inputs (ids, mask, types, task); the dense layers' width must be `config.intermediate`.
    `inside` experts of each site start as a task's own (None: half of them).
    """
    encoder = model.encoder
    classes = {name: cast(nn.Linear, head).out_features for name, head in model.heads.items()}
    mixture = MultiTaskMixture(Encoder(encoder.config), classes, config)
    state = {name: value for name, value in model.state_dict().items() if ".feed_forward." not in name}
    mixture.load_state_dict(state, strict=False)
    mixture.encoder.eval()
    for site, observed in enumerate(_observe(model, batches)):
        dense = cast(FeedForward, cast(Layer, encoder.layers[site]).feed_forward)
        if dense.up.out_features != config.intermediate:
            raise ValueError(f"layer {site} has {dense.up.out_features} neurons, the mixture would have {config.intermediate}")
        part = mixture.sites()[site]
        order = _group(observed.h, dense.down.weight, config, seed)
        part.up.weight.data, part.up.bias.data = dense.up.weight[order].clone(), dense.up.bias[order].clone()
        part.down.weight.data, part.down.bias.data = dense.down.weight[:, order].clone(), dense.down.bias.clone()
        energy = _energy(observed.h[:, order], part.down.weight, config)
        _start_router(part, observed.x, energy)
        mixture.task_bias.data[:, site] = _task_bias(energy, observed.task, len(classes), inside or config.experts // 2, outside)
        bias = mixture.task_bias[observed.task, site]
        for _ in range(2):  # the offset moves the weights, the weights move what is left out
            weights = part.weights(observed.x[:, None], bias)[:, 0]
            part.router.bias.data -= torch.logit(weights[weights > 0].clamp(1e-3, 2 - 1e-3) / 2).mean()
        kept = part(observed.x[:, None], bias)[:, 0]
        part.down.bias.data += (F.linear(observed.h, dense.down.weight, dense.down.bias) - kept).mean(0)
    return mixture


def _observe(model: MultiTaskModel, batches: list[tuple[Tensor, Tensor, Tensor, Tensor]]) -> list[_Observed]:
    """Inputs and activations of every feed-forward layer on the calibration tokens of the dense model."""
    model.eval()
    inputs: list[list[Tensor]] = [[] for _ in model.encoder.layers]
    tasks: list[Tensor] = []
    real: Tensor = torch.zeros(0)
    hooks = []
    for site, layer in enumerate(model.encoder.layers):

        def keep(_: nn.Module, arguments: tuple[Tensor, ...], site: int = site) -> None:
            inputs[site].append(arguments[0][real])

        hooks.append(cast(Layer, layer).feed_forward.register_forward_pre_hook(keep))
    for ids, mask, types, task in batches:
        real = mask > 0
        tasks.append(task[:, None].expand_as(mask)[real])
        model.encoder(ids, mask, types)
    for hook in hooks:
        hook.remove()
    task = torch.cat(tasks)
    observed = []
    for site, layer in enumerate(model.encoder.layers):
        x = torch.cat(inputs[site])
        observed.append(_Observed(x, F.gelu(cast(FeedForward, cast(Layer, layer).feed_forward).up(x)), task))
    return observed


def _group(h: Tensor, down: Tensor, config: MixtureConfig, seed: int) -> Tensor:
    """Order of the neurons: shared first (strongest), then balanced k-means groups of co-active ones."""
    strength = h.square().mean(0).sqrt() * down.norm(dim=0)
    ranked = strength.argsort(descending=True)
    shared, rest = ranked[: config.shared], ranked[config.shared :]
    generator = torch.Generator().manual_seed(seed)
    # Johnson-Lindenstrauss: 256 random directions of token space keep the distances between neurons.
    profile = h[:, rest] - h[:, rest].mean(0)
    profile = profile.T @ (torch.randn(len(h), 256, generator=generator) / 16)
    profile = F.normalize(profile, dim=-1)
    centres = profile[torch.randperm(len(rest), generator=generator)[: config.experts]]
    member = torch.zeros(len(rest), dtype=torch.long)
    for _ in range(20):
        member = _balanced(profile @ F.normalize(centres, dim=-1).T, config.width)
        centres = torch.stack([profile[member == e].mean(0) for e in range(config.experts)])
    return torch.cat([shared, *(rest[member == e] for e in range(config.experts))])


def _balanced(similarity: Tensor, size: int) -> Tensor:
    """Greedy assignment (neurons, groups) -> group of each neuron, every group exactly `size`: best pairs first."""
    neurons, groups = similarity.shape
    member = torch.full((neurons,), -1)
    room = [size] * groups
    for flat in similarity.flatten().argsort(descending=True).tolist():
        neuron, group = divmod(flat, groups)
        if member[neuron] < 0 and room[group] > 0:
            member[neuron] = group
            room[group] -= 1
    return member


def _energy(h: Tensor, down: Tensor, config: MixtureConfig) -> Tensor:
    """Root of the summed squared contributions of each routed expert's neurons, (N, E)."""
    parts = (h * down.norm(dim=0))[:, config.shared :].unflatten(-1, (config.experts, config.width))
    return cast(Tensor, parts.square().sum(-1).sqrt())


def _start_router(part: MixtureFeedForward, x: Tensor, energy: Tensor, ridge: float = 10.0) -> None:
    """Ridge regression of the standardised energies on the inputs."""
    target = (energy - energy.mean()) / energy.std()
    mean = x.mean(0)
    centred = x - mean
    gram = centred.T @ centred + ridge * torch.eye(x.shape[1])
    weight = torch.linalg.solve(gram, centred.T @ (target - target.mean(0))).T
    part.router.weight.data = weight.contiguous()
    part.router.bias.data = target.mean(0) - weight @ mean


def _task_bias(energy: Tensor, task: Tensor, tasks: int, count: int, outside: float) -> Tensor:
    """(tasks + 1, E): 0 for a task's `count` own experts, `outside` for others; the last row, for all texts, is 0.

    An expert that would be nobody's own goes to the task that has most use for it: one that no task chooses never learns.
    """
    means = torch.stack([energy[task == t].mean(0) for t in range(tasks)])
    special = (means - means.mean(0)) / means.std(0).clamp(min=1e-6)
    general = (means.mean(0) - means.mean()) / means.mean(0).std().clamp(min=1e-6)
    score = special + 0.25 * general
    own = score.argsort(dim=-1, descending=True)[:, :count]
    bias = torch.full_like(score, outside).scatter_(-1, own, 0.0)
    orphans = (bias < 0).all(0).nonzero()[:, 0]
    bias[score[:, orphans].argmax(0), orphans] = 0.0
    return torch.cat([bias, torch.zeros(1, energy.shape[1])])
