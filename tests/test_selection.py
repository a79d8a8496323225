import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clda_core.errors import CldaError
from clda_core.saliency import Histogram
from clda_core.selection import (
    AllLayers,
    BelowRate,
    DomainShift,
    FixedThreshold,
    HighestFraction,
    LowestFraction,
    MeanThreshold,
    QuantileThreshold,
    RandomFraction,
    ReferenceThreshold,
    layer_saliency_rates,
)
from tests import reference_saliency as reference

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
rates = st.dictionaries(st.text("abcdef.0123", min_size=1, max_size=4), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
fractions = st.sampled_from([0.01, 0.3, 0.5, 0.75, 1.0])
TARGET = {"stem": 0.4, "block.0": 0.1, "block.1": 0.3, "block.2": 0.1, "head": 0.6}
SOURCE = {"stem": 0.5, "block.0": 0.2, "block.1": 0.6, "block.2": 0.1, "head": 0.5}
SIZES = {"stem": 10, "block.0": 100, "block.1": 100, "block.2": 100, "head": 5}


def histogram_of(*layers) -> Histogram:
    histogram = Histogram.empty(len(layers))
    for index, scores in enumerate(layers):
        histogram.add(index, torch.tensor(scores))
    return histogram


def counted(fraction: float, known: int) -> int:
    return max(1, math.floor(fraction * known + 0.5)) if known else 0


def test_quantile_threshold_fixes_the_weighted_mean_of_the_rates() -> None:
    own = torch.Generator().manual_seed(0)
    histogram = Histogram.empty(3)
    for index, size in enumerate((10, 100, 1000)):
        histogram.add(index, torch.rand(size, generator=own) * (index + 1))
    for q in (0.1, 0.5, 0.9):
        found = layer_saliency_rates(histogram, QuantileThreshold(quantile=q)(histogram, None))
        assert float((found * histogram.sizes).sum() / 1110) == pytest.approx(1 - q, abs=1e-9)


def test_mean_threshold_lets_the_total_fall() -> None:
    even, uneven = histogram_of([3.0, 3.0, 1.0, 1.0]), histogram_of([7.0, 0.5, 0.25, 0.25])
    assert float(MeanThreshold()(even)) == float(MeanThreshold()(uneven)) == 2.0
    assert layer_saliency_rates(even, MeanThreshold()(even)).tolist() == [0.5]
    assert layer_saliency_rates(uneven, MeanThreshold()(uneven)).tolist() == [0.25]
    assert float(MeanThreshold(multiple=3)(even)) == 6.0


def test_fixed_threshold() -> None:
    assert layer_saliency_rates(histogram_of([1.0, 3.0]), FixedThreshold(2)(histogram_of([1.0]))).tolist() == [0.5]


def test_reference_threshold_is_the_sources() -> None:
    source, target = histogram_of([4.0, 8.0]), histogram_of([2.0, 5.0])
    assert float(ReferenceThreshold()(target, source)) == 6.0
    assert layer_saliency_rates(target, ReferenceThreshold()(target, source)).tolist() == [0.0]
    assert layer_saliency_rates(target, MeanThreshold()(target, source)).tolist() == [0.5]
    nested = ReferenceThreshold(of=QuantileThreshold(quantile=0.5))
    assert float(nested(target, source)) == float(QuantileThreshold()(source))
    with pytest.raises(CldaError, match="ReferenceThreshold has no source data"):
        ReferenceThreshold()(target, None)


@pytest.mark.parametrize("threshold", [MeanThreshold(), QuantileThreshold(), FixedThreshold(0.5)], ids=repr)
def test_thresholds_are_0_dim_tensors_and_ignore_the_reference(threshold) -> None:
    target, source = histogram_of([1.0, 2.0]), histogram_of([50.0])
    value = threshold(target, source)
    assert value.shape == ()
    assert value == threshold(target, None)


@quick
@given(rates, fractions)
def test_lowest_fraction(target, fraction) -> None:
    found = LowestFraction(fraction=fraction)(target, {}, {})
    assert list(found) == reference.lowest(target, counted(fraction, len(target)))


@quick
@given(rates, fractions)
def test_highest_fraction(target, fraction) -> None:
    negated = {name: -rate for name, rate in target.items()}
    found = HighestFraction(fraction=fraction)(target, {}, {})
    assert list(found) == reference.lowest(negated, counted(fraction, len(target)))


@quick
@given(rates, fractions, st.integers())
def test_random_fraction(target, fraction, seed) -> None:
    state = torch.get_rng_state()
    rule = RandomFraction(fraction=fraction, seed=seed)
    found = rule(target, {}, {})
    assert len(found) == counted(fraction, len(target))
    assert found == tuple(name for name in target if name in found)
    assert found == RandomFraction(fraction=fraction, seed=seed)(target, {}, {})
    assert torch.equal(torch.get_rng_state(), state)


def test_random_fraction_changes_with_the_rates_and_the_seed_and_is_even() -> None:
    target = {str(index): 0.0 for index in range(8)}
    chosen = [RandomFraction(fraction=0.25)({**target, "0": index / 400}, {}, {}) for index in range(400)]
    assert len(set(chosen)) > 20
    counts = [sum(name in choice for choice in chosen) for name in target]
    assert all(60 <= count <= 140 for count in counts)
    assert len({RandomFraction(fraction=0.25, seed=seed)(target, {}, {}) for seed in range(50)}) > 10


def test_random_fraction_is_the_same_in_every_process() -> None:
    assert RandomFraction(fraction=0.4, seed=3)(TARGET, {}, {}) == ("stem", "block.2")


def test_below_rate_is_strict_and_may_select_none_or_all() -> None:
    assert BelowRate(rate=0.3)(TARGET, {}, {}) == ("block.0", "block.2")
    assert BelowRate(rate=0.1)(TARGET, {}, {}) == ()
    assert BelowRate(rate=1.0)(TARGET, {}, {}) == tuple(TARGET)


def test_domain_shift_selects_what_fell_from_source_to_target() -> None:
    assert DomainShift(fraction=0.2)(TARGET, SOURCE, SIZES) == ("block.1",)
    assert DomainShift(margin=0.05)(TARGET, SOURCE, SIZES) == ("stem", "block.0", "block.1")
    assert DomainShift(margin=0.9)(TARGET, SOURCE, SIZES) == ()
    assert DomainShift(margin=0.25)({"a": 0.25, "b": 0.125}, {"a": 0.5, "b": 0.5}, {}) == ("b",), "more than the margin"
    assert DomainShift()(TARGET, SOURCE, SIZES) == DomainShift(fraction=0.3)(TARGET, SOURCE, SIZES)


def test_domain_shift_is_not_the_lowest_rate() -> None:
    assert LowestFraction(fraction=0.2)(TARGET, SOURCE, SIZES) == ("block.0",)


def test_domain_shift_needs_source_data() -> None:
    with pytest.raises(CldaError, match="DomainShift has no source data.*observe source batches"):
        DomainShift()(TARGET, {}, SIZES)


def test_domain_shift_leaves_out_what_is_unknown_on_either_side() -> None:
    source = {name: rate for name, rate in SOURCE.items() if name != "block.1"}
    assert DomainShift(fraction=0.2)(TARGET, source, SIZES) == ("block.0",)
    assert DomainShift(margin=0.01)({"new": 0.0}, SOURCE, SIZES) == ()


def test_all_layers() -> None:
    assert AllLayers()(TARGET, {}, {}) == tuple(TARGET)


RULES = [
    LowestFraction(fraction=1.0),
    HighestFraction(fraction=1.0),
    RandomFraction(fraction=1.0),
    BelowRate(rate=1.0),
    DomainShift(fraction=1.0),
    AllLayers(),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_unknown_layers_are_never_selected(rule) -> None:
    target = {"known": 0.5, "nan": math.nan}
    assert rule(target, {"known": 0.5, "nan": 0.5, "absent": 0.1}, {"absent": 3, **SIZES}) == ("known",)


@pytest.mark.parametrize("rule", [type(rule) for rule in RULES])
@pytest.mark.parametrize("threshold", [0.5, MeanThreshold, None])
def test_every_rule_checks_its_threshold(rule, threshold) -> None:
    with pytest.raises(CldaError, match=r"^threshold is not a threshold: .*or a callable, received "):
        rule(threshold=threshold)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: LowestFraction(fraction=0), "fraction is out of range"),
        (lambda: HighestFraction(fraction=1.1), "fraction is out of range"),
        (lambda: RandomFraction(fraction=-0.1), "fraction is out of range"),
        (lambda: RandomFraction(seed=0.5), "seed is not an integer"),
        (lambda: BelowRate(rate=0), "rate is out of range"),
        (lambda: BelowRate(rate=1.01), "rate is out of range"),
        (lambda: DomainShift(fraction=2), "fraction is out of range"),
        (lambda: DomainShift(margin=1), "margin is out of range"),
        (lambda: DomainShift(fraction=0.5, margin=0.1), "fraction and margin exclude each other"),
        (lambda: QuantileThreshold(quantile=1), "quantile is out of range"),
        (lambda: MeanThreshold(multiple=0), "multiple is out of range"),
        (lambda: FixedThreshold(-1), "value is out of range"),
        (lambda: FixedThreshold(math.nan), "value is not a finite number"),
        (lambda: LowestFraction(threshold=0.5), r"threshold is not a threshold.*FixedThreshold\(0.5\)"),
        (lambda: AllLayers(threshold=MeanThreshold), "threshold is not a threshold"),
        (lambda: ReferenceThreshold(of=None), "of is not a threshold"),
    ],
)
def test_wrong_arguments(build, match) -> None:
    with pytest.raises(CldaError, match=match):
        build()
