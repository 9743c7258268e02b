"""Upcycling divides the neurons of a dense layer: none is added, none is lost, and masks take away only what they name."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="the extra `export` is not installed")

from edgeml_export.encoder import Encoder, EncoderConfig, FeedForward, MultiTaskModel  # noqa: E402
from edgeml_export.upcycle import MixtureConfig, MultiTaskMixture, upcycle  # noqa: E402

CONFIG = MixtureConfig(shared=32, experts=6, width=32, top_k=2)
CLASSES = {"a": 3, "b": 2}


def batches(seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    out = []
    for task in range(2):
        ids = torch.randint(0, 50, (8, 12), generator=generator)
        mask = torch.ones(8, 12)
        mask[4:, 7:] = 0
        out.append((ids, mask, torch.zeros_like(ids), torch.full((8,), task)))
    return out


@pytest.fixture(scope="module")
def dense() -> MultiTaskModel:
    torch.manual_seed(0)
    return MultiTaskModel(Encoder(EncoderConfig(50, 64, 2, 4, CONFIG.intermediate, 32)), CLASSES).eval()


@pytest.fixture(scope="module")
def mixture(dense: MultiTaskModel) -> MultiTaskMixture:
    return upcycle(dense, CONFIG, batches()).eval()


def test_every_neuron_is_kept_once(dense: MultiTaskModel, mixture: MultiTaskMixture) -> None:
    for layer, site in zip(dense.encoder.layers, mixture.sites(), strict=True):
        assert isinstance(layer.feed_forward, FeedForward)
        before, after = layer.feed_forward.up.weight, site.up.weight
        assert torch.equal(before[before[:, 0].argsort()], after[after[:, 0].argsort()])


def test_two_runs_give_the_same_mixture(dense: MultiTaskModel, mixture: MultiTaskMixture) -> None:
    again = upcycle(dense, CONFIG, batches()).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in mixture.state_dict().items())


def test_the_dense_model_is_left_alone(dense: MultiTaskModel) -> None:
    before = {name: value.clone() for name, value in dense.state_dict().items()}
    upcycle(dense, CONFIG, batches(1))
    assert all(torch.equal(value, before[name]) for name, value in dense.state_dict().items())


def test_no_more_than_top_k_experts_are_chosen(mixture: MultiTaskMixture) -> None:
    ids, mask, types, task = batches(2)[0]
    mixture.pooled(ids, mask, types, mixture.task_bias[task])
    for site in mixture.sites():
        assert site.chosen is not None
        assert ((site.chosen > 0).sum(-1) == CONFIG.top_k).all()


def test_a_masked_expert_is_never_chosen_and_fewer_may_remain(mixture: MultiTaskMixture) -> None:
    ids, mask, types, task = batches(3)[1]
    bias = mixture.task_bias[task].clone()
    bias[..., 1:] = float("-inf")
    mixture.pooled(ids, mask, types, bias)
    for site in mixture.sites():
        assert site.chosen is not None
        assert (site.chosen[..., 1:] == 0).all()
        assert (site.chosen[..., 0] > 0).all()


def test_without_routed_experts_the_shared_one_answers(mixture: MultiTaskMixture) -> None:
    ids, mask, types, task = batches(4)[0]
    bias = torch.full_like(mixture.task_bias[task], float("-inf"))
    assert mixture.pooled(ids, mask, types, bias).isfinite().all()


def test_a_width_that_does_not_fit_is_refused(dense: MultiTaskModel) -> None:
    with pytest.raises(ValueError, match="224 neurons"):
        upcycle(dense, MixtureConfig(64, 6, 32, 2), batches())


def test_the_share_of_multiply_adds() -> None:
    assert MixtureConfig(256, 20, 64, 6).share_of(384, 1536) == pytest.approx(0.4232, abs=1e-4)
