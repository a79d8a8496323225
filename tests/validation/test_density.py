"""Soft neighbourhood density: of how many positions, of which, and by which mean over batches."""

import math
from typing import Any

import pytest
import torch

from clda_core import CldaError
from clda_core.validation import NeighbourhoodDensity
from clda_core.validation.density import _evenly
from tests import reference_validation as reference
from tests.validation.validators import logits, same, scored


def test_bounds_are_none_but_one_neighbour_and_all_alike() -> None:
    """Of n positions: 0 where each has one neighbour, and that twice as near as any other; log (n - 1) where alike."""
    pairs = 99 * torch.eye(3, dtype=torch.float64)[[0, 1, 2, 0, 1, 2]]
    assert scored(NeighbourhoodDensity(temperature=0.01), pairs) == pytest.approx(0, abs=1e-9)
    assert scored(NeighbourhoodDensity(), torch.zeros(6, 3)) == pytest.approx(math.log(5))


def test_the_score_is_the_mean_over_batches() -> None:
    validator = NeighbourhoodDensity()
    batches = [logits(6, 3, 2, seed=seed) for seed in range(3)]
    total = sum(validator.statistics(batch) for batch in batches)
    assert total[0] == 3
    assert same(validator.score(total).item(), sum(scored(validator, batch) for batch in batches) / 3)


def test_a_batch_without_neighbours_is_no_batch() -> None:
    validator = NeighbourhoodDensity()
    first = logits(4, 3, 2)
    lonely = torch.zeros(4, 2)
    lonely[1, 1] = 1.0
    assert (validator.statistics(first, None, lonely) == 0).all()
    total = validator.statistics(first, None, lonely) + validator.statistics(first)
    assert same(validator.score(total).item(), scored(validator, first))


def test_weights_say_who_is_a_neighbour_and_weigh_the_mean() -> None:
    validator = NeighbourhoodDensity(temperature=0.1)
    first = logits(5, 3, 2)
    weights = torch.rand(5, 2, generator=torch.Generator().manual_seed(1)) + 0.1
    seen = reference.positions(first, None, weights)
    assert same(scored(validator, first, None, weights), reference.density(seen, 0.1))
    assert same(scored(validator, first, None, 1000 * weights), scored(validator, first, None, weights), 1e-6)
    assert not same(scored(validator, first, None, weights), scored(validator, first))


@pytest.mark.parametrize("grid", [(37,), (6, 5)])
def test_of_many_positions_evenly_spaced_ones_of_each_image_are_taken(grid: Any) -> None:
    validator = NeighbourhoodDensity(temperature=0.1, samples=31)
    first = logits(4, 3, *grid)
    flat = first.flatten(2)
    size = flat.shape[2]
    index = [slot * size // 7 for slot in range(7)]
    seen = reference.positions(flat[:, :, index])
    assert same(scored(validator, first), reference.density(seen, 0.1))
    order = torch.tensor([2, 0, 3, 1])
    assert same(scored(validator, first[order]), scored(validator, first))


def test_of_many_positions_those_are_taken_that_count() -> None:
    validator = NeighbourhoodDensity(temperature=0.1, samples=20)
    first = logits(2, 3, 30)
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, 5:] = False
    mask[1, ::2] = False
    index, valid = _evenly(mask, 10)
    assert valid.sum(1).tolist() == [5, 10]
    assert index[0][valid[0]].tolist() == [0, 1, 2, 3, 4]
    assert index[1].tolist() == [1, 3, 7, 9, 13, 15, 19, 21, 25, 27]
    taken = torch.zeros(2, 30).scatter_(1, index, valid.float())
    seen = reference.positions(first, None, taken)
    assert same(scored(validator, first, None, mask), reference.density(seen, 0.1))


def test_of_more_images_than_samples_each_gives_one_position() -> None:
    first = logits(9, 3)
    assert same(scored(NeighbourhoodDensity(samples=2), first), scored(NeighbourhoodDensity(), first))


def test_similarities_are_taken_some_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    first = logits(40, 3)
    whole = scored(NeighbourhoodDensity(), first)
    monkeypatch.setattr("clda_core.validation.density._ELEMENTS", 130)
    assert same(scored(NeighbourhoodDensity(), first), whole)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"temperature": 0.0}, "temperature is out of range"),
        ({"temperature": "low"}, "temperature is not a finite number"),
        ({"samples": 1}, "samples is out of range"),
        ({"samples": 10.5}, "samples is not an integer"),
    ],
)
def test_wrong_options(options: Any, match: str) -> None:
    with pytest.raises(CldaError, match=f"{match}.*Fix: "):
        NeighbourhoodDensity(**options)
