import itertools
import math
from typing import Dict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import rankdata

from clda_core.errors import CldaError
from clda_core.selection import (
    AllLayers,
    BelowRate,
    DomainShift,
    DrawnFraction,
    HighestFraction,
    LowestFraction,
    RandomFraction,
)
from tests import reference_saliency as reference

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
rates = st.dictionaries(st.text("abcdef.0123", min_size=1, max_size=4), st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]))
fractions = st.sampled_from([0.01, 0.3, 0.5, 0.75, 1.0])
TARGET = {"stem": 0.4, "block.0": 0.1, "block.1": 0.3, "block.2": 0.1, "head": 0.6}
SOURCE = {"stem": 0.5, "block.0": 0.2, "block.1": 0.6, "block.2": 0.1, "head": 0.5}


def counted(fraction: float, known: int) -> int:
    return max(1, math.floor(fraction * known + 0.5)) if known else 0


@quick
@given(rates, fractions)
def test_lowest_fraction(target, fraction) -> None:
    found = LowestFraction(fraction=fraction)(target, {})
    assert list(found) == reference.lowest(target, counted(fraction, len(target)))


@quick
@given(rates, fractions)
def test_highest_fraction(target, fraction) -> None:
    negated = {name: -rate for name, rate in target.items()}
    found = HighestFraction(fraction=fraction)(target, {})
    assert list(found) == reference.lowest(negated, counted(fraction, len(target)))


@quick
@given(rates, fractions, st.integers())
def test_random_fraction(target, fraction, seed) -> None:
    state = torch.get_rng_state()
    rule = RandomFraction(fraction=fraction, seed=seed)
    found = rule(target, {})
    assert len(found) == counted(fraction, len(target))
    assert found == tuple(name for name in target if name in found)
    assert found == RandomFraction(fraction=fraction, seed=seed)(target, {})
    assert torch.equal(torch.get_rng_state(), state)


def test_random_fraction_changes_with_the_rates_and_the_seed_and_is_even() -> None:
    target = {str(index): 0.0 for index in range(8)}
    chosen = [RandomFraction(fraction=0.25)({**target, "0": index / 400}, {}) for index in range(400)]
    assert len(set(chosen)) > 20
    counts = [sum(name in choice for choice in chosen) for name in target]
    assert all(60 <= count <= 140 for count in counts)
    assert len({RandomFraction(fraction=0.25, seed=seed)(target, {}) for seed in range(50)}) > 10


def test_random_fraction_is_the_same_in_every_process() -> None:
    assert RandomFraction(fraction=0.4, seed=3)(TARGET, {}) == ("stem", "block.2")


def test_below_rate_is_strict_and_may_select_none_or_all() -> None:
    assert BelowRate(rate=0.3)(TARGET, {}) == ("block.0", "block.2")
    assert BelowRate(rate=0.1)(TARGET, {}) == ()
    assert BelowRate(rate=1.0)(TARGET, {}) == tuple(TARGET)


def test_domain_shift_selects_what_fell_from_source_to_target() -> None:
    assert DomainShift(fraction=0.2)(TARGET, SOURCE) == ("block.1",)
    assert DomainShift(margin=0.05)(TARGET, SOURCE) == ("stem", "block.0", "block.1")
    assert DomainShift(margin=0.9)(TARGET, SOURCE) == ()
    assert DomainShift(margin=0.25)({"a": 0.25, "b": 0.125}, {"a": 0.5, "b": 0.5}) == ("b",), "more than the margin"
    assert DomainShift()(TARGET, SOURCE) == DomainShift(fraction=0.3)(TARGET, SOURCE)


def test_domain_shift_is_not_the_lowest_rate() -> None:
    assert LowestFraction(fraction=0.2)(TARGET, SOURCE) == ("block.0",)


def test_domain_shift_needs_source_data() -> None:
    with pytest.raises(CldaError, match="DomainShift has no source data.*observe source batches"):
        DomainShift()(TARGET, {})


def test_domain_shift_leaves_out_what_is_unknown_on_either_side() -> None:
    source = {name: rate for name, rate in SOURCE.items() if name != "block.1"}
    assert DomainShift(fraction=0.2)(TARGET, source) == ("block.0",)
    assert DomainShift(margin=0.01)({"new": 0.0}, SOURCE) == ()


def test_all_layers() -> None:
    assert AllLayers()(TARGET, {}) == tuple(TARGET)


RULES = [
    LowestFraction(fraction=1.0),
    HighestFraction(fraction=1.0),
    RandomFraction(fraction=1.0),
    DrawnFraction(fraction=1.0),
    BelowRate(rate=1.0),
    DomainShift(fraction=1.0),
    AllLayers(),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_unknown_layers_are_never_selected(rule) -> None:
    target = {"known": 0.5, "nan": math.nan}
    assert rule(target, {"known": 0.5, "nan": 0.5, "absent": 0.1}) == ("known",)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: LowestFraction(fraction=0), "fraction is out of range"),
        (lambda: HighestFraction(fraction=1.1), "fraction is out of range"),
        (lambda: RandomFraction(fraction=-0.1), "fraction is out of range"),
        (lambda: RandomFraction(seed=0.5), "seed is not an integer"),
        (lambda: DrawnFraction(fraction=0), "fraction is out of range"),
        (lambda: DrawnFraction(bias=-1), "bias is out of range"),
        (lambda: DrawnFraction(bias=math.inf), "bias is not a finite number"),
        (lambda: DrawnFraction(seed=0.5), "seed is not an integer"),
        (lambda: BelowRate(rate=0), "rate is out of range"),
        (lambda: BelowRate(rate=1.01), "rate is out of range"),
        (lambda: DomainShift(fraction=2), "fraction is out of range"),
        (lambda: DomainShift(margin=1), "margin is out of range"),
        (lambda: DomainShift(fraction=0.5, margin=0.1), "fraction and margin exclude each other"),
    ],
)
def test_wrong_arguments(build, match) -> None:
    with pytest.raises(CldaError, match=match):
        build()


# ------------------------------------------------------------------------------------------------ drawn in each round


def chances(weights: Dict[str, float], count: int) -> Dict[str, float]:
    """Return how likely each is among ``count`` drawn without replacement in proportion to the weights, exactly."""
    found = dict.fromkeys(weights, 0.0)
    for order in itertools.permutations(weights, count):
        chance, left = 1.0, sum(weights.values())
        for name in order:
            chance *= weights[name] / left
            left -= weights[name]
        for name in order:
            found[name] += chance
    return found


TIED = dict(zip(TARGET, itertools.cycle([0.5, 0.25, 0.5])))


@pytest.mark.parametrize("target", [TARGET, TIED, dict.fromkeys(TARGET, 0.0)], ids=["different", "tied", "equal"])
@pytest.mark.parametrize("bias", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("fraction", [0.2, 0.4])
def test_drawn_fraction_draws_by_the_weights_of_efraimidis_and_spirakis(target, bias: float, fraction: float) -> None:
    rule, draws = DrawnFraction(fraction=fraction, bias=bias), 4000
    places = rankdata(list(target.values()))  # equal rates share the mean of their places
    weights = {name: float(len(target) + 1 - place) ** bias for place, name in zip(places, target)}
    expected = chances(weights, counted(fraction, len(target)))
    drawn = [rule.draw(target, {}, step) for step in range(draws)]
    for name, chance in expected.items():
        deviation = math.sqrt(chance * (1 - chance) / draws)
        assert sum(name in one for one in drawn) / draws == pytest.approx(chance, abs=4 * deviation + 1e-12), name


@quick
@given(rates, fractions, st.integers(), st.integers(0, 10**9))
def test_drawn_fraction_depends_on_nothing_but_its_arguments(target, fraction, seed, step) -> None:
    state = torch.get_rng_state()
    rule = DrawnFraction(fraction=fraction, seed=seed)
    found = rule.draw(target, {}, step)
    rule.draw(target, {}, step + 1)
    assert found == rule.draw(target, {}, step) == DrawnFraction(fraction=fraction, seed=seed).draw(target, {}, step)
    assert len(found) == counted(fraction, len(target))
    assert found == tuple(name for name in target if name in found)
    assert rule(target, {}) == rule.draw(target, {}, 0)
    assert torch.equal(torch.get_rng_state(), state)


def test_drawn_fraction_differs_between_steps_and_seeds_and_not_between_processes() -> None:
    assert len({DrawnFraction(fraction=0.4).draw(TARGET, {}, step) for step in range(50)}) > 5
    assert len({DrawnFraction(fraction=0.4, seed=seed).draw(TARGET, {}, 1) for seed in range(50)}) > 5
    assert DrawnFraction(fraction=0.4, seed=3).draw(TARGET, {}, 10) == ("block.0", "block.1")


@pytest.mark.parametrize("bias", [1e3, 1e300])
def test_drawn_fraction_of_a_large_bias_is_the_lowest_fraction(bias: float) -> None:
    target = {str(index): index / 100 for index in range(80)}
    assert DrawnFraction(fraction=0.1, bias=bias).draw(target, {}, 7) == LowestFraction(fraction=0.1)(target, {})
