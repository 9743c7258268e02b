"""What is cut is what was masked; what Torch-Pruning's graph gets wrong is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="the extra `export` is not installed")
pytest.importorskip("torch_pruning", reason="the extra `export` is not installed")

from edgeml_export.prune.find import find_groups  # noqa: E402
from edgeml_export.prune.groups import cut, flatten  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from prune_nets import Concatenated, Depthwise, Masked, Residual, Shared, settled  # noqa: E402
from torch import nn  # noqa: E402

from edgeml.errors import UsageError  # noqa: E402

EXAMPLE = torch.zeros(1, 2, 7, 7)
WIDTH = st.integers(2, 9)


def networks() -> st.SearchStrategy[Masked]:
    return st.one_of(
        st.builds(Residual, WIDTH, WIDTH, st.integers(1, 3)),
        st.builds(Concatenated, WIDTH, WIDTH, WIDTH),
        st.builds(Depthwise, WIDTH, WIDTH),
        st.builds(Shared, WIDTH, WIDTH),
    )


@given(data=st.data(), seed=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_the_cut_network_equals_the_masked_original(data: st.DataObject, seed: int) -> None:
    """Every stream loses random channels, one group after the other; outputs stay within 1e-5 of the masks set by hand."""
    torch.manual_seed(seed)
    net = settled(data.draw(networks()), seed)
    groups, _ = find_groups(net, EXAMPLE)
    masks, smaller = {}, net
    for stream, layer in net.streams.items():
        group = next(group for group in groups if layer in group.members)
        drop = data.draw(st.lists(st.integers(0, group.channels - 1), unique=True, max_size=group.channels - 1))
        masks[stream] = torch.ones(group.channels)
        masks[stream][drop] = 0
        smaller = cut(smaller, EXAMPLE, group.name, drop)
        assert smaller.get_submodule(group.name).weight.shape[0] == group.channels - len(drop)
    assert {group.name for group in groups} == {group.name for group in groups if any(m in net.streams.values() for m in group.members)}
    inputs = torch.randn(3, 2, 7, 7)
    with torch.no_grad():
        for one, other in zip(flatten(net(inputs, masks)), flatten(smaller(inputs)), strict=True):
            assert torch.allclose(one, other, atol=1e-5, rtol=1e-5)


class Flat(nn.Module):
    """Two branches side by side, flattened into a linear layer: wrong in Torch-Pruning 1.6.1."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.left, self.right = nn.Conv2d(6, 4, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
        self.head = nn.Linear(10 * 49, 3)

    def forward(self, x: Any) -> Any:
        x = torch.relu(self.stem(x))
        return self.head(torch.cat([self.left(x), self.right(x)], 1).relu().flatten(1))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3, groups=2)
        self.last, self.head = nn.Conv2d(8, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.last(torch.relu(self.inner(torch.relu(self.stem(x))))).relu().mean((2, 3)))


class Normed(nn.Module):
    """A group normalisation: removing a channel changes what the others are divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.mid, self.head = nn.Conv2d(2, 8, 3), nn.GroupNorm(1, 8), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x: Any) -> Any:
        return self.head(self.mid(self.norm(self.stem(x)).relu()).relu())


def test_concatenation_then_flatten_is_left_or_refused_by_name() -> None:
    groups, refused = find_groups(Flat().eval(), EXAMPLE)
    assert "stem" in {group.name for group in groups}
    named = {refusal.name: refusal.reason for refusal in refused}
    assert "Torch-Pruning's graph" in named["left"] or "Torch-Pruning's graph" in named["right"]
    bad = next(name for name in ("left", "right") if "Torch-Pruning's graph" in named.get(name, ""))
    with pytest.raises(UsageError, match=f"'{bad}' cannot be pruned"):
        find_groups(Flat().eval(), EXAMPLE, only=[bad])


def test_grouped_convolutions_are_left_or_refused_by_name() -> None:
    groups, refused = find_groups(Grouped().eval(), EXAMPLE)
    assert [group.name for group in groups] == ["last"]
    assert all("grouped convolution 'inner'" in refusal.reason for refusal in refused if refusal.name in ("stem", "inner"))
    with pytest.raises(UsageError, match="'inner' cannot be pruned"):
        find_groups(Grouped().eval(), EXAMPLE, only=["inner"])


def test_a_normalisation_over_channels_is_seen_by_the_probe() -> None:
    groups, refused = find_groups(Normed().eval(), EXAMPLE)
    assert [group.name for group in groups] == ["mid"]
    assert "normalisation over channels" in next(refusal.reason for refusal in refused if refusal.name == "stem")


def test_outputs_are_never_cut() -> None:
    groups, refused = find_groups(settled(Residual(4, 4, 1), 0), EXAMPLE)
    assert not {"heads.0", "heads.1"} & {member for group in groups for member in group.members}
    assert {"heads.0", "heads.1"} <= {refusal.name for refusal in refused if "output" in refusal.reason}


def test_protect_takes_layers_and_containers() -> None:
    net = settled(Residual(4, 4, 2), 0)
    layers = lambda groups: {member for group in groups for member in group.members}  # noqa: E731
    assert "a.0.0" not in layers(find_groups(net, EXAMPLE, protect=["a.0.0"])[0])
    assert not {"a.0.0", "a.1.0"} & layers(find_groups(net, EXAMPLE, protect=["a"])[0])
    assert not {"stem.0", "b.0.0", "b.1.0"} & layers(find_groups(net, EXAMPLE, protect=["b.1.1"])[0])
    with pytest.raises(UsageError, match="no module 'nope'"):
        find_groups(net, EXAMPLE, protect=["nope"])


def test_only_leaves_the_rest() -> None:
    groups, _ = find_groups(settled(Residual(4, 4, 2), 0), EXAMPLE, only=["a.1"])
    assert [group.name for group in groups] == ["a.1.0"]


def test_looking_for_groups_changes_nothing() -> None:
    net = settled(Residual(4, 4, 1), 0).train()
    net.stem[0].weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    groups, _ = find_groups(net, EXAMPLE)
    assert len(groups) == 2
    assert all(layer.training for layer in net.modules())
    assert not net.stem[0].weight.requires_grad
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_nothing_to_prune_is_said() -> None:
    with pytest.raises(UsageError, match="nothing in Residual can be pruned"):
        find_groups(settled(Residual(4, 4, 1), 0), EXAMPLE, protect=[""])


def test_weights_under_two_names_are_left() -> None:
    net = settled(Residual(4, 4, 2), 0)
    net.a[1][0].weight = net.a[0][0].weight
    with pytest.raises(UsageError, match=r"'a.0.0' shares its weights with 'a.1.0'"):
        find_groups(net, EXAMPLE)


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.odd, self.head = nn.Conv2d(2, 4, 3), nn.Linear(9, 4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Any) -> Any:
        return self.head(self.odd(self.stem(x)))


class Detached(Residual):
    def forward(self, x: Any, masks: Any = None) -> Any:
        return {name: out.detach() for name, out in super().forward(x).items()}


def test_a_network_that_cannot_be_followed_names_the_module() -> None:
    with pytest.raises(UsageError, match="cannot follow module 'odd'"):
        find_groups(Loose(), EXAMPLE)
    with pytest.raises(UsageError, match="no gradient reaches its output 0"):
        find_groups(Detached(4, 4, 1), EXAMPLE)
