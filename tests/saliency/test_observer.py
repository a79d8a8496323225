"""The observer, which makes, discards and averages observations of one teacher."""

import math
import pickle
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn

from clda_core.errors import CldaError
from clda_core.layers import ModelView, group_layers
from clda_core.saliency import FixedThreshold, Hessian, Magnitude, PseudoLabelCrossEntropy, ReferenceThreshold, Taylor
from clda_core.saliency.observer import Observer
from tests.helpers import bits, loaded, saved


def network() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [4.0]]))
        model[1].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    return model


def observer(model: nn.Module, saliency: Any = None, threshold: Any = None) -> Observer:
    view = ModelView(model, group_layers(model))
    probe = PseudoLabelCrossEntropy()
    return Observer(view, saliency or Taylor(), threshold or FixedThreshold(1.5), probe, model)


def scaled(factor: float) -> Callable[[nn.Module], Tensor]:
    """A loss whose scores are |factor| times the parameters of the first layer and of the diagonal of the second."""
    return lambda model: factor * (model[0].weight.sum() + model[1].weight.diagonal().sum())


def step(one: Observer, *losses: Any) -> bool:
    return one.commit([one.observe(loss, domain, None, None) for domain, loss in losses])


def test_what_is_pending_counts_when_it_is_committed() -> None:
    one = observer(network())
    pending = one.observe(scaled(1.0), "target", None, None)
    assert one.rates(renewed=True) == ({}, {})
    assert one.commit([])
    assert one.rates(renewed=True) == ({}, {})
    assert one.commit([pending])
    assert one.rates(renewed=True) == ({"0": 0.5, "1": 0.25}, {})
    assert step(one, ("target", scaled(2.0)))
    assert one.rates(renewed=True) == ({"0": 0.75, "1": 0.375}, {})
    one.end_round(one.rates(renewed=True))
    assert one.rates(renewed=True) == ({}, {})


def test_source_data_of_the_same_step_comes_first() -> None:
    one = observer(network(), threshold=ReferenceThreshold())
    assert step(one, ("target", scaled(1.0)), ("source", scaled(2.0)))
    target, source = one.rates(renewed=True)
    assert target == {"0": 0.5, "1": 0.0}  # above the mean of 2, 8, 2, 4, 0, 0
    assert source == {"0": 0.5, "1": 0.25}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_observations_that_are_not_finite_are_discarded_and_counted(bad: float) -> None:
    one = observer(network())
    assert not step(one, ("target", scaled(bad)))
    assert (one.rates(renewed=True), one.discarded) == (({}, {}), 1)
    assert not step(one, ("source", scaled(bad)), ("target", scaled(1.0)))
    assert (one.rates(renewed=True)[0], one.discarded) == ({"0": 0.5, "1": 0.25}, 2)
    assert not step(one, ("source", scaled(1.0)), ("target", scaled(bad)))
    assert one.discarded == 3


def test_ten_discarded_observations_in_a_row_are_an_error() -> None:
    one = observer(network())
    for _ in range(9):
        step(one, ("target", scaled(math.nan)))
    step(one, ("target", scaled(1.0)))
    for _ in range(9):
        step(one, ("target", scaled(math.nan)))
    other = observer(network())
    other.load_state_dict(one.state_dict())
    for again in (one, other):
        with pytest.raises(CldaError, match="the last 10 observations were all discarded"):
            step(again, ("target", scaled(math.nan)))
        assert again.discarded == 19


def test_a_state_goes_on_as_the_observer_would() -> None:
    def curved(model: nn.Module) -> Tensor:
        return (model(torch.tensor([[1.0]])) ** 2).sum()

    one = observer(network(), saliency=Hessian(samples=2))
    step(one, ("source", curved), ("target", curved))
    state, other = loaded(saved(one.state_dict())), observer(network(), saliency=Hessian(samples=2))
    other.load_state_dict(state)
    third = pickle.loads(pickle.dumps(one))
    for _ in range(3):
        outcomes = []
        for again in (one, other, third):
            step(again, ("target", curved))
            outcomes.append(bits(again.state_dict()))
        assert outcomes[0] == outcomes[1] == outcomes[2]
    assert bits(state["generator"]) != bits(one.state_dict()["generator"])


def test_observing_is_in_eval_mode_with_the_teachers_flags_given_back() -> None:
    model, seen = network().train(), []
    model[1].weight.requires_grad_(False)

    def loss(teacher: nn.Module) -> Tensor:
        seen.append((teacher.training, teacher[0].weight.requires_grad, torch.is_grad_enabled()))
        return scaled(1.0)(teacher)

    with torch.no_grad():
        observer(model).observe(loss, "target", None, None)
    assert seen == [(False, True, True)]
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == [True, False]
    assert [parameter.grad for parameter in model.parameters()] == [None, None]


def test_the_hosts_gradients_are_taken_for_the_loss_but_not_those_from_before() -> None:
    model = network()
    model[0].weight.grad = torch.ones(2, 1)
    one = observer(model)
    assert not one.host_trains_teacher()
    model[0].weight.grad = torch.ones(2, 1)
    assert one.host_trains_teacher()
    step(one, ("target", None))
    assert one.rates(renewed=True) == ({"0": 0.5}, {})
    assert one.averages.known == {"0.weight"}


def test_what_is_known_is_what_target_data_has_shown_in_this_round() -> None:
    one = observer(network())
    assert one.averages.known is None
    other = observer(network())
    other.load_state_dict(loaded(saved(one.state_dict())))
    assert other.averages.known is None
    step(one, ("target", lambda model: model[0].weight.sum()))
    assert one.averages.known == {"0.weight"}
    step(one, ("source", lambda model: model[1].weight.sum()))
    assert one.averages.known == {"0.weight"}
    step(one, ("target", lambda model: model[1].weight.sum()))
    assert one.averages.known == {"0.weight", "1.weight"}
    one.end_round(one.rates(renewed=True))
    assert one.averages.known == {"0.weight", "1.weight"}, "whose rates may be used again"
    other.load_state_dict(loaded(saved(one.state_dict())))
    for again in (one, other):
        step(again, ("target", lambda model: model[1].weight.sum()))
        assert again.averages.known == {"1.weight"}


def test_a_loss_goes_before_the_hosts_gradients() -> None:
    model = network()
    one = observer(model)
    model[0].weight.grad = torch.full((2, 1), 100.0)
    assert step(one, ("target", scaled(1.0)))
    assert one.rates(renewed=True)[0] == {"0": 0.5, "1": 0.25}


def test_an_estimator_without_derivatives_needs_no_data() -> None:
    one = observer(network(), saliency=Magnitude())
    assert step(one, ("target", None), ("source", None))
    assert one.rates(renewed=True) == ({"0": 0.5, "1": 0.25}, {"0": 0.5, "1": 0.25})
    assert one.averages.known == {"0.weight", "1.weight"}


@pytest.mark.parametrize("domain", ["target", "source"])
def test_nothing_to_observe(domain: str) -> None:
    inputs = None if domain == "target" else torch.ones(1, 1)
    with pytest.raises(CldaError, match=f"there is nothing to observe on {domain} data"):
        observer(network()).observe(None, domain, inputs, None)


def test_the_probe_sees_the_logits_and_the_mask() -> None:
    model, given = network(), []

    def probe(logits: Tensor, mask: Any) -> Tensor:
        given.append((logits.tolist(), mask))
        return logits.sum()

    mask = torch.tensor([True])
    view = ModelView(model, group_layers(model))
    one = Observer(view, Taylor(), FixedThreshold(1.5), probe, lambda inputs: model(inputs[0]))
    one.observe(None, "target", (torch.ones(1, 1),), mask)
    assert given == [([[1.0, 8.0]], mask)]
