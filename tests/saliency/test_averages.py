"""Rates averaged over averages, against sums by hand."""

import math
from typing import Any, List

import pytest
import torch

from clda_core.errors import CldaError
from clda_core.saliency import FixedThreshold, Histogram, MeanThreshold, ReferenceThreshold
from clda_core.saliency.averages import Averages
from tests.helpers import bits, loaded, saved

NAMES = ["a", "b", "c"]
CPU, ABOVE_ONE = torch.device("cpu"), FixedThreshold(1.0)


def histogram_of(*layers: List[float]) -> Histogram:
    histogram = Histogram.empty(len(layers))
    for index, scores in enumerate(layers):
        histogram.add(index, torch.tensor(scores))
    return histogram


def plus(
    averages: Averages, domain: str, *layers: List[float], threshold: Any = ABOVE_ONE, known: Any = ()
) -> Averages:
    return averages.plus(domain, histogram_of(*layers), set(known), threshold)


def observed(*batches: Any, threshold: Any = ABOVE_ONE) -> Averages:
    averages = Averages()
    for domain, *layers in batches:
        averages = plus(averages, domain, *layers, threshold=threshold)
    return averages


FIRST, SECOND = ([4.0, 0.0], [2.0, 4.0, 8.0, 0.5], []), ([4.0, 4.0], [0.0, 0.0, 0.0, 4.0], [4.0])


def test_rates_are_means_over_the_batches_that_saw_a_layer() -> None:
    averages = observed(("target", *FIRST), ("target", *SECOND), ("source", *SECOND))
    target, source = averages.rates(NAMES, CPU)
    assert target == {"a": 0.75, "b": 0.5, "c": 1.0}
    assert source == {"a": 1.0, "b": 0.25, "c": 1.0}


def test_a_layer_that_was_never_seen_and_a_domain_without_observations_are_absent() -> None:
    assert observed(("target", *FIRST)).rates(NAMES, CPU) == ({"a": 0.5, "b": 0.75}, {})
    assert observed().rates(NAMES, CPU) == ({}, {})


def test_a_round_forgets_the_averages_of_the_last_and_keeps_its_rates() -> None:
    averages = observed(("target", *FIRST), ("source", *FIRST))
    rates = averages.rates(NAMES, CPU)
    averages = averages.after_round(rates)
    assert averages.rates(NAMES, CPU) == ({}, {})
    assert averages.last == rates
    assert plus(averages, "target", *SECOND).rates(NAMES, CPU) == ({"a": 1.0, "b": 0.25, "c": 1.0}, {})


def test_what_is_known_is_what_target_data_has_shown_since_the_last_round() -> None:
    averages = Averages()
    assert averages.known is None
    averages = plus(averages, "target", *FIRST, known=["a"])
    averages = plus(averages, "source", *FIRST, known=["b"])
    assert averages.known == {"a"}
    averages = plus(averages, "target", *FIRST, known=["c"])
    assert averages.known == {"a", "c"}
    averages = averages.after_round(averages.rates(NAMES, CPU))
    assert averages.known == {"a", "c"}, "whose rates may be used again"
    assert plus(averages, "target", *FIRST, known=["c"]).known == {"c"}


def test_what_nobody_noted_stays_unknown_until_the_round_is_over() -> None:
    averages = observed(("target", *FIRST))._replace(known=None)
    averages = plus(averages, "target", *FIRST, known=["a"])
    assert averages.known is None
    assert plus(averages.after_round(averages.rates(NAMES, CPU)), "target", *FIRST, known=["a"]).known == {"a"}


def reference(averages: Averages) -> float:
    """Return what a threshold is given as the reference, by the mean that it takes of it."""
    seen = []

    def threshold(target: Histogram, reference: Any) -> Any:
        seen.append(reference)
        return ABOVE_ONE(target, reference)

    plus(averages, "target", [9.0], [9.0], [9.0], threshold=threshold)
    return float(MeanThreshold()(seen[0]))


def test_the_reference_is_all_source_data_up_to_the_first_round() -> None:
    averages = observed(("source", [1.0], [2.0], []), ("target", [64.0], [64.0], [64.0]))
    assert reference(averages) == 1.5
    averages = plus(averages, "source", [6.0], [], [])
    assert reference(averages) == 3.0
    averages = averages.after_round(averages.rates(NAMES, CPU))
    assert reference(plus(averages, "source", [100.0], [100.0], [100.0])) == 3.0


def test_the_reference_is_open_until_a_round_has_seen_source_data() -> None:
    averages = observed(("target", *FIRST))
    averages = averages.after_round(averages.rates(NAMES, CPU))
    assert reference(plus(averages, "source", [2.0], [4.0], [])) == 3.0


def test_source_data_are_rated_with_themselves_in_the_reference() -> None:
    averages = observed(("source", [2.0], [4.0], []), ("source", [3.5], [9.0], []), threshold=ReferenceThreshold())
    assert averages.rates(NAMES, CPU).source == {"a": 0.0, "b": 1.0}


def test_an_observation_is_not_kept_but_counted() -> None:
    source = histogram_of([2.0], [], [])
    averages = Averages().plus("source", source, set(), ABOVE_ONE)
    averages = plus(averages, "source", [4.0], [], [])
    assert source.sizes.tolist() == [1, 0, 0]
    assert reference(averages) == 3.0


def test_averages_are_values() -> None:
    one = observed(("source", *FIRST), ("target", *FIRST))
    kept = bits(one.state_dict())
    for domain in ("source", "target"):
        plus(one, domain, *SECOND)
    one.after_round(one.rates(NAMES, CPU))
    assert bits(one.state_dict()) == kept


def test_negative_scores_are_refused() -> None:
    with pytest.raises(CldaError, match="negative scores.*received at least one below 0"):
        plus(Averages(), "source", [1.0], [-1.0], [])


@pytest.mark.parametrize(("value", "received"), [(torch.ones(1), r"shape \(1,\)"), (0.5, "float"), (None, "NoneType")])
def test_a_threshold_of_a_wrong_form(value: Any, received: str) -> None:
    class Odd:
        def __call__(self, target: Histogram, reference: Any) -> Any:
            return value

    with pytest.raises(CldaError, match=f"threshold Odd returned something else.*received {received}"):
        plus(Averages(), "target", *FIRST, threshold=Odd())

    def odd(target: Histogram, reference: Any) -> Any:
        return value

    with pytest.raises(CldaError, match="threshold odd returned something else"):
        plus(Averages(), "target", *FIRST, threshold=odd)


def test_an_unknown_threshold_makes_rates_unknown() -> None:
    averages = observed(("target", *FIRST), threshold=lambda *_: torch.tensor(math.nan))
    assert averages.rates(NAMES, CPU) == ({}, {})
    assert plus(averages, "target", *SECOND).rates(NAMES, CPU).target == {"a": 1.0, "b": 0.25, "c": 1.0}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_state_is_restored_and_shares_nothing(frozen: bool) -> None:
    one = observed(("source", *FIRST), ("target", *FIRST))
    if frozen:
        one = plus(one.after_round(one.rates(NAMES, CPU)), "target", *SECOND, known=["a"])
    state = one.state_dict()
    kept = bits(state)
    for restored in (Averages.restored(loaded(saved(state)), 3), Averages.restored(state, 3)):
        assert bits(restored.state_dict()) == kept
        assert restored.last == one.last
        assert restored.known == one.known
        assert restored.rates(NAMES, CPU) == one.rates(NAMES, CPU)
        later = plus(plus(restored, "source", [64.0], [64.0], [64.0]), "target", *SECOND)
        assert (reference(later) == reference(one)) == frozen
    for vector in (*one.sums.values(), *one.counts.values()):
        vector += 1
    assert bits(state) == kept


def test_a_state_without_source_data() -> None:
    one = observed(("target", *FIRST))
    assert one.state_dict()["reference"] is None
    assert Averages.restored(one.state_dict(), 3).rates(NAMES, CPU) == one.rates(NAMES, CPU)


@pytest.mark.parametrize("what", ["sums", "counts", "reference", "layers"])
def test_a_state_that_does_not_fit_is_refused(what: str) -> None:
    state = observed(("source", *FIRST), ("target", *FIRST)).state_dict()
    if what == "reference":
        state["reference"]["counts"] = state["reference"]["counts"][:2]
    elif what == "layers":
        state = Averages().plus("target", Histogram.empty(2), set(), ABOVE_ONE).state_dict()
    else:
        del state[what]["source"]
    with pytest.raises(CldaError, match="saved observations do not fit: expected vectors of 3 layers"):
        Averages.restored(state, 3)
