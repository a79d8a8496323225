import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clda_core.errors import CldaError
from clda_core.saliency import (
    Fisher,
    Hessian,
    Histogram,
    Magnitude,
    MeanThreshold,
    QuantileThreshold,
    Taylor,
    layer_saliency_rates,
)
from tests import reference_saliency as reference

quick = settings(max_examples=30, deadline=None, derandomize=True, database=None)
numbers = st.lists(
    st.tuples(st.floats(-1e3, 1e3, width=32), st.floats(-1e3, 1e3, width=32)), min_size=1, max_size=20
).map(lambda pairs: np.array(pairs, dtype=np.float32))
ESTIMATORS = [Magnitude(), Taylor(), Fisher(), Hessian(samples=2)]


@quick
@given(numbers)
def test_scores_match_the_equations(pairs: np.ndarray) -> None:
    theta, derivative = pairs[:, 0], pairs[:, 1]
    ours = [torch.from_numpy(theta.copy()), torch.from_numpy(derivative.copy())]
    close = {"rtol": 1e-5, "atol": 1e-30}
    np.testing.assert_allclose(Magnitude().score(ours[0], None), np.abs(theta), **close)
    np.testing.assert_allclose(Taylor().score(*ours), reference.taylor(theta, derivative), **close)
    np.testing.assert_allclose(Fisher().score(*ours), reference.fisher(theta, derivative), **close)
    np.testing.assert_allclose(Hessian().score(*ours), reference.hessian(theta, derivative), **close)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_non_negative_and_leave_their_inputs(estimator, dtype) -> None:
    torch_generator = torch.Generator().manual_seed(0)
    theta = torch.randn(3, 4, generator=torch_generator).to(dtype)
    derivative = torch.randn(3, 4, generator=torch_generator).to(dtype)
    copies = theta.clone(), derivative.clone()
    state = torch.get_rng_state()
    scores = estimator.score(theta, derivative if estimator.order else None)
    assert scores.shape == theta.shape
    assert scores.dtype == dtype
    assert (scores >= 0).all()
    assert torch.equal(theta, copies[0])
    assert torch.equal(derivative, copies[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("estimator", ESTIMATORS[1:], ids=repr)
def test_a_missing_derivative_is_an_error(estimator) -> None:
    with pytest.raises(CldaError, match=f"{type(estimator).__name__} was given no derivative.*unknown"):
        estimator.score(torch.ones(2), None)


@pytest.mark.parametrize("samples", [0, -1, 1.5, True])
def test_hessian_samples_out_of_range(samples) -> None:
    with pytest.raises(CldaError, match="samples is"):
        Hessian(samples=samples)


def test_complex_parameters_are_scored_by_magnitude() -> None:
    theta, gradient = torch.tensor([3 + 4j, 1j]), torch.tensor([1j, 2 + 0j])
    assert Taylor().score(theta, gradient).tolist() == [5.0, 2.0]
    assert Fisher().score(theta, gradient).tolist() == [12.5, 2.0]
    assert Magnitude().score(theta, None).tolist() == [5.0, 1.0]


def test_the_default_number_of_random_vectors_is_one() -> None:
    assert (Hessian().samples, Hessian().order) == (1, 2)
    assert (Magnitude().order, Taylor().order, Fisher().order) == (0, 1, 1)


def rates(estimator, layers, threshold) -> torch.Tensor:
    histogram = Histogram.empty(len(layers))
    for index, (theta, derivative) in enumerate(layers):
        histogram.add(index, estimator.score(theta, derivative))
    return layer_saliency_rates(histogram, threshold(histogram, None))


def layers(zeroed: int = -1):
    own = torch.Generator().manual_seed(1)
    made = []
    for index, size in enumerate((2000, 500, 4000)):
        theta, derivative = torch.randn(size, generator=own) * (index + 1), torch.randn(size, generator=own)
        made.append((torch.zeros(size) if index == zeroed else theta, derivative))
    return made


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=repr)
@pytest.mark.parametrize("threshold", [MeanThreshold(), QuantileThreshold(), QuantileThreshold(quantile=0.1)], ids=repr)
@pytest.mark.parametrize("zeroed", [0, 1, 2])
def test_a_zeroed_layer_has_rate_zero(estimator, threshold, zeroed) -> None:
    found = rates(estimator, layers(zeroed), threshold)
    assert found[zeroed] == 0
    assert sum(found > 0) == 2


@pytest.mark.parametrize("estimator", ESTIMATORS[1:], ids=repr)
@pytest.mark.parametrize("threshold", [MeanThreshold(), QuantileThreshold()], ids=repr)
def test_scaling_the_loss_changes_no_rate(estimator, threshold) -> None:
    def scaled(by: float):
        return [(theta, derivative * by) for theta, derivative in layers()]

    expected = rates(estimator, layers(), threshold)
    assert torch.equal(rates(estimator, scaled(2.0**-12), threshold), expected)
    assert torch.allclose(rates(estimator, scaled(3.7), threshold), expected, atol=0.02)


def test_fisher_is_half_the_square_of_taylor_so_a_quantile_gives_both_the_same_rates() -> None:
    theta, derivative = layers()[0]
    assert torch.allclose(Fisher().score(theta, derivative), Taylor().score(theta, derivative) ** 2 / 2)
    for q in (0.2, 0.5, 0.8):
        threshold = QuantileThreshold(quantile=q)
        assert torch.allclose(rates(Fisher(), layers(), threshold), rates(Taylor(), layers(), threshold), atol=0.03)
