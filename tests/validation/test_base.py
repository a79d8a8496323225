"""Validators of a user's own: what is asked of them, and what is done with wrong, changing and non-finite results."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from clda_core import CldaError
from clda_core.validation import ByClass, HardConsistency, MakesView, MixVal, MutualInformation
from clda_core.validation.base import (
    check_statistics,
    check_validator,
    nothing_unless_finite,
    score_by_class,
    score_of,
)
from tests.validation.validators import logits


class Returns:
    """A validator that returns what it is told to."""

    needs_view = False

    def __init__(self, score: Any = None, by_class: Any = None) -> None:
        self._score = score
        self._by_class = by_class

    def statistics(self, logits: Tensor, view_logits: Any = None, mask: Any = None) -> Any:
        return torch.ones(2)

    def score(self, statistics: Tensor) -> Any:
        return self._score

    def score_by_class(self, statistics: Tensor) -> Any:
        return self._by_class


class WithoutScore:
    needs_view = False

    def statistics(self, logits: Tensor, view_logits: Any = None, mask: Any = None) -> Any:
        return torch.ones(2)


class UnknownView(Returns):
    needs_view = "sometimes"  # type: ignore[assignment]


def test_validators_that_are_some() -> None:
    for validator in (MutualInformation(), HardConsistency(), Returns()):
        check_validator(validator)
    assert isinstance(HardConsistency(), ByClass)
    assert not isinstance(MutualInformation(), ByClass)
    assert isinstance(MixVal(), MakesView)
    assert not isinstance(HardConsistency(), MakesView)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (None, r"None without \['statistics', 'score', 'needs_view'\]"),
        (MutualInformation, "received <class 'clda_core.validation.mutual_information.MutualInformation'>"),
        (lambda logits: logits.mean(), "'statistics', 'score', 'needs_view'"),
        (WithoutScore(), r"without \['score'\]"),
        (UnknownView(), r"without \['needs_view'\]"),
    ],
)
def test_what_is_no_validator(given: Any, match: str) -> None:
    with pytest.raises(CldaError, match=f"this is no validator.*{match}.*Fix: "):
        check_validator(given)


@pytest.mark.parametrize(
    ("given", "like", "match"),
    [
        (1.0, None, "received float"),
        ([1.0], None, "received list"),
        (torch.tensor(1.0), None, r"received torch.float32 of shape \(\)"),
        (torch.ones(2, 2), None, r"received torch.float32 of shape \(2, 2\)"),
        (torch.ones(0), None, r"received torch.float32 of shape \(0,\)"),
        (torch.ones(3).long(), None, "received torch.int64"),
        (torch.ones(3), torch.ones(2), r"expected 2 of them, as before, received torch.float32 of shape \(3,\)"),
    ],
)
def test_statistics_that_cannot_be_added_up(given: Any, like: Any, match: str) -> None:
    with pytest.raises(CldaError, match=f"the statistics of Returns cannot be added up.*{match}.*Fix: "):
        check_statistics(Returns(), given, like)


def test_statistics_are_taken_without_their_graph() -> None:
    given = torch.ones(3, requires_grad=True) * 2
    assert not check_statistics(Returns(), given, torch.zeros(3)).requires_grad
    assert torch.equal(check_statistics(Returns(), given), torch.full((3,), 2.0))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_statistics_of_both_networks_are_left_out_where_those_of_either_are_not_finite(bad: float) -> None:
    good, broken = torch.ones(3), torch.tensor([1.0, bad, 2.0])
    for given in ((good, broken), (broken, good)):
        assert all(torch.equal(one, torch.zeros(3)) for one in nothing_unless_finite(*given))
    assert all(torch.equal(one, good) for one in nothing_unless_finite(good, good))


def test_scores_are_numbers_and_nan_where_nothing_can_be_decided() -> None:
    assert score_of(Returns(torch.tensor([0.5])), torch.ones(2)) == 0.5
    assert score_of(Returns(torch.tensor(2)), torch.ones(2)) == 2.0
    for undecided in (math.nan, math.inf, -math.inf):
        assert math.isnan(score_of(Returns(torch.tensor(undecided)), torch.ones(2)))
    assert math.isnan(score_of(MutualInformation(), torch.zeros(5)))


@pytest.mark.parametrize("given", [None, 0.5, torch.ones(2), torch.ones(0), torch.tensor(1j)])
def test_what_is_no_score(given: Any) -> None:
    with pytest.raises(CldaError, match=r"the score of Returns is no score: expected a tensor with one.*Fix: "):
        score_of(Returns(given), torch.ones(2))


def test_scores_by_class_are_those_of_validators_that_have_some() -> None:
    assert score_by_class(MutualInformation(), torch.ones(5)) is None
    found = score_by_class(Returns(by_class=torch.tensor([0.5, math.inf, math.nan])), torch.ones(2))
    assert found is not None
    assert found[0] == 0.5
    assert torch.isnan(found[1:]).all()
    validator = HardConsistency()
    seen = validator.statistics(logits(4, 3), logits(4, 3))
    assert torch.equal(score_by_class(validator, seen), validator.score_by_class(seen))


@pytest.mark.parametrize("given", [None, [0.5], torch.tensor(0.5), torch.ones(2, 2), torch.ones(2).long()])
def test_what_are_no_scores_by_class(given: Any) -> None:
    with pytest.raises(CldaError, match=r"the scores by class of Returns are none.*Fix: "):
        score_by_class(Returns(by_class=given), torch.ones(2))
