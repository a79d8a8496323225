import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from clda_core.errors import CldaError
from clda_core.update.alignment import CorrelationSums, linear_assignment, match_channels
from tests import reference_relation as reference

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def costs(kind: str, size: int, seed: int) -> np.ndarray:
    generator = np.random.RandomState(seed)
    if kind == "ties":
        return generator.randint(0, 4, (size, size)).astype(float)
    if kind == "products":
        return -np.outer(generator.rand(size), generator.rand(size))
    return generator.randn(size, size) * 10.0 ** generator.randint(-3, 4)


def total(cost: np.ndarray, columns: Any) -> float:
    return float(cost[np.arange(len(cost)), columns].sum())


@given(st.sampled_from(["real", "ties", "products"]), st.integers(1, 24), st.integers(0, 10**6))
@quick
def test_assignment_costs_what_scipys_does(kind: str, size: int, seed: int) -> None:
    cost = costs(kind, size, seed)
    columns = linear_assignment(torch.from_numpy(cost))
    assert sorted(columns) == list(range(size))
    best = total(cost, linear_sum_assignment(cost)[1])
    assert total(cost, columns) == pytest.approx(best, rel=1e-9, abs=1e-9)


def test_assignment_of_512_channels_is_exact_and_takes_less_than_2_seconds() -> None:
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(1024, 64, generator=generator)
    x, y = (latent @ torch.randn(64, 512, generator=generator) for _ in range(2))
    cost = -CorrelationSums.of(x.relu(), y.relu()).correlation()
    # Processor time: other work on the machine is not this solver's.
    start = time.process_time()
    columns = linear_assignment(cost)
    assert time.process_time() - start < 2
    best = total(cost.numpy(), linear_sum_assignment(cost.numpy())[1])
    assert total(cost.numpy(), columns) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("scale", [1.7e308, 1e300, 1e-300, 1e-310], ids=str)
@pytest.mark.parametrize("kind", ["real", "ties", "products"])
def test_assignment_ends_and_is_exact_at_the_ends_of_the_range(kind: str, scale: float) -> None:
    """Differences of costs near 1e308 overflow, and infinite path lengths never end."""
    for size in range(1, 9):
        unit = costs(kind, size, size)
        unit = unit / max(1.0, np.abs(unit).max())
        columns = linear_assignment(torch.from_numpy(unit * scale))
        assert sorted(columns) == list(range(size))
        assert total(unit, columns) == pytest.approx(total(unit, linear_sum_assignment(unit)[1]), abs=1e-9)


def test_assignment_of_equal_costs_keeps_the_order() -> None:
    assert linear_assignment(torch.full((40, 40), 7.0)) == list(range(40))


@pytest.mark.parametrize("kind", ["products", "ties"])
def test_assignment_of_degenerate_costs_of_384_channels_takes_less_than_5_seconds(kind: str) -> None:
    cost = costs(kind, 384, 0)
    start = time.process_time()
    columns = linear_assignment(torch.from_numpy(cost))
    assert time.process_time() - start < 5
    assert total(cost, columns) == pytest.approx(total(cost, linear_sum_assignment(cost)[1]), rel=1e-9)


def test_assignment_of_nothing() -> None:
    assert linear_assignment(torch.zeros(0, 0)) == []


@pytest.mark.parametrize("cost", [torch.zeros(2, 3), torch.zeros(4), torch.tensor([[float("nan")]])], ids=str)
def test_assignment_refuses_what_is_not_square_or_finite(cost: torch.Tensor) -> None:
    with pytest.raises(CldaError, match="expected a square matrix of finite costs, received shape"):
        linear_assignment(cost)


@given(st.integers(2, 9), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
@quick
def test_correlation_equals_numpys(n: int, p: int, q: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in (p, q))
    x[:, 0] = 0.1
    found = CorrelationSums.of(x, y).correlation().numpy()
    assert np.allclose(found, reference.correlation(x.numpy(), y.numpy()), atol=1e-9)


def test_channels_that_do_not_vary_are_told_from_those_that_do() -> None:
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    x[:, 1], y[:, 0] = 0.1, 0.0
    first, second = CorrelationSums.of(x, y).varying()
    assert first.tolist() == [True, False, True]
    assert second.tolist() == [False, True]


def test_moments_add_up_over_parts() -> None:
    x, y = torch.randn(8, 3), torch.randn(8, 2)
    halves = zip(CorrelationSums.of(x[:3], y[:3]), CorrelationSums.of(x[3:], y[3:]))
    assert torch.allclose(
        CorrelationSums(*[a + b for a, b in halves]).correlation(), CorrelationSums.of(x, y).correlation()
    )


@given(st.permutations(list(range(6))), st.integers(0, 10**6))
@quick
def test_equal_widths_match_one_to_one(order: "list[int]", seed: int) -> None:
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(seed))
    found = match_channels(CorrelationSums.of(x, 3 * x[:, order] + 1).correlation())
    assert [order[match] for match in found] == list(range(6))


def test_unequal_widths_take_the_most_correlated() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    assert match_channels(CorrelationSums.of(x[:, [2, 0, 2, 1, 0]], x).correlation()) == [2, 0, 2, 1, 0]
    assert match_channels(CorrelationSums.of(x[:, [2, 0]], x).correlation()) == [2, 0]


def test_channels_without_a_counterpart() -> None:
    table = torch.tensor([[0.0, 0.0], [0.3, 0.4], [-0.9, -0.2]])
    assert match_channels(table) == [-1, 1, -1]
    assert match_channels(table, minimum=0.5) == [-1, -1, -1]
    assert match_channels(torch.zeros(2, 2)) == [-1, -1]
    assert match_channels(torch.zeros(2, 0)) == [-1, -1]


def test_ties_keep_the_order() -> None:
    assert match_channels(torch.ones(5, 5)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("minimum", [-0.1, 1.0, float("nan")])
def test_minimum_out_of_range(minimum: float) -> None:
    with pytest.raises(CldaError, match="^minimum is"):
        match_channels(torch.zeros(1, 1), minimum=minimum)
