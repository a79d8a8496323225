"""Scores by layer, from derivatives."""

from typing import Any, Callable

import pytest
import torch
from torch import Tensor

from clda_core.errors import CldaError
from clda_core.layers import Layer
from clda_core.saliency import Magnitude, Taylor
from clda_core.saliency.histogram import CHUNK
from clda_core.saliency.scores import score_layers

LAYERS = (Layer("a", ("a.w", "a.b"), (), 3, None), Layer("b", ("b.w",), (), 2, None))
PARAMETERS = {"a.w": torch.tensor([1.0, -2.0]), "a.b": torch.tensor([0.5]), "b.w": torch.tensor([4.0, 8.0])}
DERIVATIVES = {"a.w": torch.tensor([1.0, 1.0]), "a.b": None, "b.w": torch.tensor([0.5, -0.5])}


def test_parameters_without_a_derivative_are_scored_by_an_estimator_that_needs_none() -> None:
    taylor, magnitude = (score_layers(kind(), LAYERS, PARAMETERS, DERIVATIVES) for kind in (Taylor, Magnitude))
    assert taylor.sizes.tolist() == [2, 2]
    assert taylor.sums.tolist() == [3.0, 6.0]
    assert magnitude.sizes.tolist() == [3, 2]
    assert magnitude.sums.tolist() == [3.5, 12.0]


@pytest.mark.parametrize("sizes", [(CHUNK, 1), (CHUNK - 1, 1, 1), (1, CHUNK + 1), (3, 3 * CHUNK, 5)])
def test_layers_of_any_size_are_counted_whole(sizes: Any) -> None:
    names = [str(index) for index in range(len(sizes))]
    parameters = {name: torch.full((size,), 2.0 ** int(name)) for name, size in zip(names, sizes)}
    layers = [Layer("both", tuple(names), (), 1, None), Layer("none", (), (), 1, None)]
    layers.append(Layer("last", ("last",), (), 1, None))
    parameters["last"] = torch.ones(2)
    histogram = score_layers(Magnitude(), layers, parameters, dict.fromkeys(parameters))
    assert histogram.sizes.tolist() == [sum(sizes), 0, 2]
    assert histogram.sums.tolist() == [sum(size * 2.0**index for index, size in enumerate(sizes)), 0.0, 2.0]


def test_half_precision_is_scored_in_float32() -> None:
    seen = []

    class Seeing(Taylor):
        def score(self, parameter: Tensor, derivative: Any) -> Tensor:
            seen.append((parameter.dtype, derivative.dtype))
            return super().score(parameter, derivative)

    for dtype, other in (
        (torch.float16, torch.float16),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float64),
    ):
        parameters = {"a.w": torch.ones(2, dtype=dtype)}
        score_layers(Seeing(), (Layer("a", ("a.w",), (), 2, None),), parameters, {"a.w": torch.ones(2, dtype=other)})
    assert seen == [(torch.float32, torch.float32)] * 2 + [(torch.float64, torch.float64)]


def test_an_estimator_that_goes_by_the_place_in_a_tensor_gets_every_tensor_as_it_is() -> None:
    shapes = []

    class ByRow(Taylor):
        def score(self, parameter: Tensor, derivative: Any) -> Tensor:
            shapes.append(tuple(parameter.shape))
            return super().score(parameter, derivative)

    class Joined(ByRow):
        elementwise = True

        def score(self, parameter: Tensor, derivative: Any) -> Tensor:
            return super().score(parameter, derivative)

    parameters = {"a.w": torch.ones(2, 3), "a.b": torch.ones(2)}
    layers = (Layer("a", ("a.w", "a.b"), (), 8, None),)
    one, other = (score_layers(kind(), layers, parameters, parameters) for kind in (ByRow, Joined))
    assert shapes == [(2, 3), (2,), (8,)]
    assert torch.equal(one.counts, other.counts)
    assert torch.equal(one.sums, other.sums)


class Itself:
    """Returns what it was given."""

    order = 0
    elementwise = True

    def score(self, parameter: Tensor, derivative: Any) -> Tensor:
        return parameter


@pytest.mark.parametrize("size", [3, CHUNK + 1])
def test_what_an_estimator_returns_is_not_written(size: int) -> None:
    parameters = {"a": torch.ones(size, requires_grad=True)}
    assert score_layers(Itself(), (Layer("a", ("a",), (), size, None),), parameters, {"a": None}).sums.item() == size
    assert bool((parameters["a"] == 1).all())


@pytest.mark.parametrize(
    ("score", "received"),
    [
        (lambda parameter: parameter[:1], r"\(1,\)"),
        (lambda parameter: 3.0, "float"),
        (lambda parameter: None, "NoneType"),
    ],
)
def test_an_estimator_that_returns_no_scores(score: Callable[[Tensor], Any], received: str) -> None:
    class Odd(Taylor):
        def score(self, parameter: Tensor, derivative: Any) -> Any:
            return score(parameter)

    with pytest.raises(CldaError, match=rf"Odd returned no scores for 'a.w'.*shape \(2,\), received {received}"):
        score_layers(Odd(), LAYERS, PARAMETERS, DERIVATIVES)
