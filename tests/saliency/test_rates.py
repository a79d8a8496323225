"""Rates of a model without a learner, against float64 sums in NumPy and against a learner's."""

import math
from typing import Any, Dict, List

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clda_core import CldaError, Outputs, saliency_rates
from clda_core.saliency import (
    FixedThreshold,
    Hessian,
    Magnitude,
    MeanThreshold,
    QuantileThreshold,
    ReferenceThreshold,
    Taylor,
)
from tests import reference_saliency as reference
from tests.helpers import batch, every_step, make_learner, networks, no_traces


def network() -> nn.Sequential:
    own = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 40), nn.ReLU(), nn.Linear(40, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=own, dtype=torch.float64))
    return model


def inputs(count: int) -> List[Tensor]:
    own = torch.Generator().manual_seed(4)
    return [torch.randn(7, 5, generator=own, dtype=torch.float64) for _ in range(count)]


def scores(model: nn.Sequential, x: np.ndarray) -> List[np.ndarray]:
    """The Taylor scores of both layers under the cross-entropy against the network's own labels, by the chain rule."""
    first, bias, second, offset = (parameter.detach().numpy() for parameter in model.parameters())
    hidden = x @ first.T + bias
    used = np.maximum(hidden, 0.0)
    logits = used @ second.T + offset
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    slope = shares / shares.sum(axis=1, keepdims=True)
    slope[np.arange(len(x)), logits.argmax(axis=1)] -= 1.0
    slope /= len(x)
    back = (slope @ second) * (hidden > 0)
    pairs = [[(first, back.T @ x), (bias, back.sum(0))], [(second, slope.T @ used), (offset, slope.sum(0))]]
    return [np.concatenate([reference.taylor(*pair).reshape(-1) for pair in layer]) for layer in pairs]


def whole_mean(layers: List[np.ndarray]) -> float:
    return float(np.concatenate(layers).mean())


@pytest.mark.parametrize("threshold", [None, MeanThreshold(multiple=0.5), QuantileThreshold(quantile=0.7)], ids=repr)
def test_rates_are_those_of_the_definition(threshold: Any) -> None:
    model, batches = network(), inputs(4)
    found = saliency_rates(model, batches, threshold=threshold)
    exact, bounds = np.zeros(2), np.zeros(2)
    for x in batches:
        layers = scores(model, x.numpy())
        if isinstance(threshold, QuantileThreshold):
            value = reference.quantile(layers, threshold.quantile)
        else:
            value = whole_mean(layers) * (1.0 if threshold is None else threshold.multiple)
        exact += np.array(reference.rates(layers, value)) / len(batches)
        bounds += 2 * np.array(reference.in_bin_of(layers, value)) / len(batches)
    assert list(found) == ["0", "2"]
    assert (np.abs(np.array(list(found.values())) - exact) <= bounds + 1e-9).all()
    assert (bounds < 0.1).all()


def test_a_reference_is_the_source_data_read_so_far() -> None:
    model, batches, source = network(), inputs(3), [3.0 * x for x in inputs(2)]
    found = saliency_rates(model, batches, source=iter(source), threshold=ReferenceThreshold())
    exact, bounds = np.zeros(2), np.zeros(2)
    for index, x in enumerate(batches):
        layers, seen = scores(model, x.numpy()), [scores(model, other.numpy()) for other in source[: index + 1]]
        value = whole_mean([np.concatenate(parts) for parts in zip(*seen)])
        exact += np.array(reference.rates(layers, value)) / len(batches)
        bounds += np.array(reference.in_bin_of(layers, value)) / len(batches)
    assert (np.abs(np.array(list(found.values())) - exact) <= bounds + 1e-9).all()


@pytest.mark.parametrize(
    "options", [{}, {"saliency": Hessian(samples=2)}, {"saliency": Magnitude()}, {"threshold": FixedThreshold(1e-3)}]
)
def test_rates_are_those_that_a_learner_selects_by(options: Dict[str, Any]) -> None:
    teacher, student = networks()
    teacher.requires_grad_(True)
    batches = [batch(seed) for seed in range(3)]
    learner = make_learner(teacher, student, schedule=every_step(interval=3, observations=3), **options)
    with no_traces(teacher, student, values_too=True):
        found = saliency_rates(teacher, batches, **options)
    for x in batches:
        learner.distill(student(x), x)
        learner.step(step_fn=lambda: None)
    assert learner.report().rounds[0].rates == found


def test_frozen_and_left_over_gradients_are_no_matter() -> None:
    model, plain = network().requires_grad_(False), network()
    plain[0].weight.grad = torch.full_like(plain[0].weight, 9.0)
    with torch.no_grad(), no_traces(model, plain, values_too=True):
        assert saliency_rates(model, inputs(2)) == saliency_rates(plain, inputs(2))


def test_options_are_those_of_a_learner() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network()

        def forward(self, x: Tensor, *, scale: float) -> Any:
            return {"out": scale * self.net(x)}

    seen = []

    def probe(logits: Tensor, mask: Any) -> Tensor:
        seen.append((tuple(logits.shape), mask))
        return logits.square().sum()

    given = ({"x": x, "scale": 2.0} for x in inputs(2))
    found = saliency_rates(
        Wrapped(), given, probe=probe, extract=lambda raw: Outputs(raw["out"]), layers=["net"], saliency=Taylor()
    )
    assert list(found) == ["net"]
    assert seen == [((7, 3), None)] * 2


def test_a_layer_that_the_loss_does_not_use_is_absent() -> None:
    teacher, _ = networks()
    assert "unused" not in saliency_rates(teacher, [batch()])


def test_batches_that_are_not_finite_are_left_out_until_there_are_ten() -> None:
    good, bad = inputs(1)[0], torch.full((2, 5), math.nan, dtype=torch.float64)
    assert saliency_rates(network(), [bad, good, bad]) == saliency_rates(network(), [good])
    with pytest.raises(CldaError, match="the last 10 observations were all discarded"):
        saliency_rates(network(), [bad] * 10)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: saliency_rates(network(), inputs(1)[0]), "batches is one tensor"),
        (lambda: saliency_rates(network(), inputs(1), source=inputs(1)[0]), "source is one tensor"),
        (lambda: saliency_rates(network(), []), "nothing to observe the model on"),
        (lambda: saliency_rates(network().forward, inputs(1)), "the model is no model"),
        (lambda: saliency_rates(network(), inputs(1), saliency=Taylor), "saliency= is no saliency strategy"),
        (lambda: saliency_rates(network(), inputs(1), threshold=0.5), "threshold= is no threshold strategy"),
        (lambda: saliency_rates(network(), inputs(1), threshold=ReferenceThreshold()), "has no source data"),
        (lambda: saliency_rates(network(), inputs(1), extract="out"), "extract cannot be called"),
        (lambda: saliency_rates(network(), inputs(1), layers=["no such layer"]), "leaves every parameter out"),
        (lambda: saliency_rates(network(), inputs(1), probe=lambda z, m: z), "is not a loss that can be differ"),
        (lambda: saliency_rates(nn.Flatten(), inputs(1)), "the model has no parameters"),
    ],
)
def test_wrong_arguments(call: Any, match: str) -> None:
    with pytest.raises(CldaError, match=f"{match}.*Fix: ") as caught:
        call()
    assert "Fix: " in str(caught.value)
