"""Rates averaged over observations, against sums by hand."""

import math
from typing import Any, List

import pytest
import torch

from clda_core.errors import CldaError
from clda_core.saliency import FixedThreshold, Histogram, MeanThreshold, ReferenceThreshold
from clda_core.saliency.rates import Observations
from tests.helpers import bits, loaded, saved

NAMES = ["a", "b", "c"]
CPU, ABOVE_ONE = torch.device("cpu"), FixedThreshold(1.0)


def histogram_of(*layers: List[float]) -> Histogram:
    histogram = Histogram.empty(len(layers))
    for index, scores in enumerate(layers):
        histogram.add(index, torch.tensor(scores))
    return histogram


def observed(*batches: Any, threshold: Any = ABOVE_ONE) -> Observations:
    observations = Observations(3)
    for domain, *layers in batches:
        observations.add(domain, histogram_of(*layers), threshold)
    return observations


FIRST, SECOND = ([4.0, 0.0], [2.0, 4.0, 8.0, 0.5], []), ([4.0, 4.0], [0.0, 0.0, 0.0, 4.0], [4.0])


def test_rates_are_means_over_the_batches_that_saw_a_layer() -> None:
    observations = observed(("target", *FIRST), ("target", *SECOND), ("source", *SECOND))
    target, source = observations.rates(NAMES, CPU)
    assert target == {"a": 0.75, "b": 0.5, "c": 1.0}
    assert source == {"a": 1.0, "b": 0.25, "c": 1.0}


def test_a_layer_that_was_never_seen_and_a_domain_without_observations_are_absent() -> None:
    assert observed(("target", *FIRST)).rates(NAMES, CPU) == ({"a": 0.5, "b": 0.75}, {})
    assert observed().rates(NAMES, CPU) == ({}, {})


def test_a_round_forgets_the_averages_of_the_last() -> None:
    observations = observed(("target", *FIRST), ("source", *FIRST))
    observations.start_next_round()
    assert observations.rates(NAMES, CPU) == ({}, {})
    observations.add("target", histogram_of(*SECOND), ABOVE_ONE)
    assert observations.rates(NAMES, CPU) == ({"a": 1.0, "b": 0.25, "c": 1.0}, {})


def reference(observations: Observations) -> float:
    return float(observations.threshold(ReferenceThreshold(), histogram_of([9.0], [9.0], [9.0])))


def test_the_reference_is_all_source_data_up_to_the_first_round() -> None:
    observations = observed(("source", [1.0], [2.0], []), ("target", [64.0], [64.0], [64.0]))
    assert reference(observations) == 1.5
    observations.add("source", histogram_of([6.0], [], []), MeanThreshold())
    assert reference(observations) == 3.0
    observations.start_next_round()
    observations.add("source", histogram_of([100.0], [100.0], [100.0]), MeanThreshold())
    assert reference(observations) == 3.0


def test_the_reference_is_open_until_a_round_has_seen_source_data() -> None:
    observations = observed(("target", *FIRST))
    observations.start_next_round()
    observations.add("source", histogram_of([2.0], [4.0], []), MeanThreshold())
    assert reference(observations) == 3.0


def test_an_observation_is_not_kept_but_counted() -> None:
    source = histogram_of([2.0], [], [])
    observations = Observations(3)
    observations.add("source", source, MeanThreshold())
    observations.add("source", histogram_of([4.0], [], []), MeanThreshold())
    assert source.sizes.tolist() == [1, 0, 0]
    assert reference(observations) == 3.0


def test_negative_scores_are_refused_and_leave_nothing() -> None:
    observations = observed()
    with pytest.raises(CldaError, match="negative scores.*received at least one below 0"):
        observations.add("source", histogram_of([1.0], [-1.0], []), MeanThreshold())
    assert observations.state_dict()["reference"] is None
    assert observations.rates(NAMES, CPU) == ({}, {})


@pytest.mark.parametrize(("value", "received"), [(torch.ones(1), r"shape \(1,\)"), (0.5, "float"), (None, "NoneType")])
def test_a_threshold_of_a_wrong_form(value: Any, received: str) -> None:
    class Odd:
        def __call__(self, target: Histogram, reference: Any) -> Any:
            return value

    with pytest.raises(CldaError, match=f"threshold Odd returned something else.*received {received}"):
        observed().threshold(Odd(), histogram_of(*FIRST))


def test_an_unknown_threshold_makes_rates_unknown() -> None:
    class Unknown:
        def __call__(self, target: Histogram, reference: Any) -> Any:
            return torch.tensor(math.nan)

    observations = observed(("target", *FIRST), threshold=Unknown())
    observations.add("target", histogram_of(*SECOND), ABOVE_ONE)
    assert observations.rates(NAMES, CPU)[0] == {"a": 1.0, "b": 0.25, "c": 1.0}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_state_is_restored_and_shares_nothing(frozen: bool) -> None:
    one = observed(("source", *FIRST), ("target", *FIRST))
    if frozen:
        one.start_next_round()
        one.add("target", histogram_of(*SECOND), ABOVE_ONE)
    state = one.state_dict()
    kept = bits(state)
    other = observed(("source", *SECOND))
    other.load_state_dict(loaded(saved(state)))
    third = Observations(3)
    third.load_state_dict(state)
    for restored in (other, third):
        assert bits(restored.state_dict()) == kept
        assert restored.rates(NAMES, CPU) == one.rates(NAMES, CPU)
        restored.add("source", histogram_of([64.0], [64.0], [64.0]), ABOVE_ONE)
        restored.add("target", histogram_of(*SECOND), ABOVE_ONE)
        assert (reference(restored) == reference(one)) == frozen
    assert bits(one.state_dict()) == bits(state) == kept


def test_a_state_is_a_copy() -> None:
    one = observed(("source", *FIRST), ("target", *FIRST))
    state = one.state_dict()
    kept = bits(state)
    for domain in ("source", "target"):
        one.add(domain, histogram_of(*SECOND), ABOVE_ONE)
    assert bits(state) == kept
    assert bits(one.state_dict()) != kept


def test_a_state_without_source_data() -> None:
    one, other = observed(("target", *FIRST)), observed(("source", *FIRST))
    other.load_state_dict(one.state_dict())
    assert other.rates(NAMES, CPU) == one.rates(NAMES, CPU)
    assert other.state_dict()["reference"] is None


@pytest.mark.parametrize("what", ["sums", "counts", "reference", "layers"])
def test_a_state_that_does_not_fit_changes_nothing(what: str) -> None:
    one = observed(("source", *FIRST), ("target", *FIRST))
    before, state = bits(one.state_dict()), one.state_dict()
    if what == "reference":
        state["reference"]["counts"] = state["reference"]["counts"][:2]
    elif what == "layers":
        small = Observations(2)
        small.add("target", histogram_of([1.0], [2.0]), ABOVE_ONE)
        state = small.state_dict()
    else:
        del state[what]["source"]
    with pytest.raises(CldaError, match="saved observations do not fit: expected vectors of 3 layers"):
        one.load_state_dict(state)
    assert bits(one.state_dict()) == before
