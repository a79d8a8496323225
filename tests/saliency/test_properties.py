"""From parameters to selected layers against float64 oracles, over memory layouts, dtypes and degenerate scores."""

import math
from typing import Any, Dict, List, Tuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clda_core.layers import Layer
from clda_core.saliency import (
    Fisher,
    FixedThreshold,
    Histogram,
    Magnitude,
    MeanThreshold,
    QuantileThreshold,
    ReferenceThreshold,
    Taylor,
    layer_saliency_rates,
)
from clda_core.saliency.histogram import mean, quantile
from clda_core.saliency.scores import score_layers
from clda_core.selection import BelowRate, DomainShift, HighestFraction, LowestFraction
from tests import reference_saliency as reference

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)

LAYOUTS = {
    "contiguous": lambda value: value.contiguous(),
    "channels_last": lambda value: value.contiguous(memory_format=torch.channels_last),
    "permuted": lambda value: value.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "every second": lambda value: torch.stack([value, value + 1], dim=-1).flatten(3)[..., ::2],
    "with an offset": lambda value: torch.cat([value.new_ones(1, *value.shape[1:]), value])[1:],
    "expanded": lambda value: value[:, :, :, :1].expand(-1, -1, -1, 3),
    "requires a gradient": lambda value: value.clone().requires_grad_(),
}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

SMALLEST, LARGEST = 2.0**-126, float(np.finfo(np.float32).max)
SCORES = (0.0, -0.0, 2.0**-149, 2.0**-130, SMALLEST, 1.0, LARGEST)
EXACT = (0.0, 0.25, -0.5, 1.0, -2.0, 3.0, 8.0)  # whose products are exact in float32
shapes = st.sampled_from([(1, 1, 1, 1), (2, 3, 2, 2), (3, 2, 1, 4), (2, 0, 3, 3)])


def filled(seed: int, shape: Tuple[int, ...], dtype: torch.dtype, pool: Tuple[float, ...]) -> Tensor:
    """Values of the pool, and where it is one of scores, others spread over 24 octaves."""
    own = np.random.RandomState(seed)
    values = own.choice(pool, size=shape)
    if pool is SCORES:
        values = np.where(own.rand(*shape) < own.choice([0, 0.5, 1]), np.exp2(own.uniform(-12, 12, size=shape)), values)
    return torch.from_numpy(values).clamp(max=torch.finfo(dtype).max).to(dtype)


@st.composite
def tensors(draw: Any, pool: Tuple[float, ...] = SCORES) -> Tensor:
    value = filled(draw(st.integers(0, 999)), draw(shapes), draw(st.sampled_from(DTYPES)), pool)
    laid_out: Tensor = LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))](value)
    return laid_out


models = st.lists(st.lists(tensors(), min_size=1, max_size=3), min_size=1, max_size=4)


def read(*parts: Tensor) -> np.ndarray:
    """What a histogram reads: float32, element by element in logical order."""
    with np.errstate(over="ignore"):
        flat = [np.array(part.detach().double().tolist()).reshape(-1).astype(np.float32) for part in parts]
    return np.concatenate(flat)


def histogram_of(model: List[List[Tensor]]) -> Histogram:
    histogram = Histogram.empty(len(model))
    for index, parts in enumerate(model):
        histogram.add(index, *parts)
    return histogram


def known(layers: List[np.ndarray]) -> List[np.ndarray]:
    """Float64, what is subnormal in float32 as zero, as the histogram has it."""
    return [np.where(layer < np.float32(SMALLEST), 0, layer).astype(np.float64) for layer in layers]


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layouts_are_what_they_are_called(name: str) -> None:
    value = torch.arange(24.0).reshape(2, 3, 2, 2)
    laid_out = LAYOUTS[name](value)
    assert laid_out.is_contiguous() == (name in ("contiguous", "with an offset", "requires a gradient"))
    assert name == "expanded" or torch.equal(laid_out, value)


@quick
@given(models)
def test_counts_and_sums_are_those_of_the_elements_whatever_their_layout(model: List[List[Tensor]]) -> None:
    histogram = histogram_of(model)
    for index, parts in enumerate(model):
        scores = read(*parts)
        assert histogram.counts[index].tolist() == np.bincount(scores.view(np.uint32) >> 20, minlength=4096).tolist()
        assert float(histogram.sums[index]) == pytest.approx(float(scores.astype(np.float64).sum()), rel=1e-12)
        assert int(histogram.sizes[index]) == scores.size
    assert bool(histogram.finite) == all(np.isfinite(read(*parts)).all() for parts in model)
    assert not histogram.negative


@quick
@given(models, st.sampled_from([0.05, 0.5, 0.9]), st.sampled_from([0.0, SMALLEST, 1.0, 3.0, 1e30]))
def test_thresholds_and_rates_are_those_of_the_definition(model: List[List[Tensor]], q: float, fixed: float) -> None:
    histogram, layers = histogram_of(model), [read(*parts) for parts in model]
    assert histogram.finite
    everything = np.concatenate(layers).astype(np.float64)
    thresholds: Dict[Any, Tuple[float, float]] = {
        FixedThreshold(fixed): (fixed, 0.0),
        MeanThreshold(multiple=2.0): (2 * everything.mean() if everything.size else math.nan, 1e-12),
        QuantileThreshold(quantile=q): (reference.quantile(known(layers), q) if everything.size else math.nan, 0.125),
    }
    for threshold, (exact, tolerance) in thresholds.items():
        value = threshold(histogram, None)
        assert value.dtype == torch.float64
        assert float(value) == pytest.approx(exact, rel=tolerance, abs=0, nan_ok=True)
        rates = layer_saliency_rates(histogram, value)
        assert rates.dtype == torch.float64
        layers_known = known(layers)
        for rate, its, bound in zip(
            rates.tolist(),
            reference.rates(layers_known, float(value)),
            reference.in_bin_of(layers_known, float(value)) if everything.size else [0.0] * len(layers),
        ):
            expected = math.nan if math.isnan(float(value)) else its
            assert rate == pytest.approx(expected, rel=0, abs=bound + 1e-12, nan_ok=True)


@quick
@given(st.integers(1, 3), st.sampled_from([0.0, 2.0**-140, 1.0, LARGEST]), st.sampled_from([0.1, 0.5, 0.99]))
def test_layers_of_one_value_alone(layers: int, value: float, q: float) -> None:
    histogram = histogram_of([[torch.full((3,), value)]] * layers)
    assert float(mean(histogram)) == float(np.float32(value))
    found = float(quantile(histogram, q))
    assert found == 0 if value < SMALLEST else value * 7 / 8 <= found <= value * 9 / 8
    above_the_mean = layer_saliency_rates(histogram, mean(histogram)).tolist()
    assert len(set(above_the_mean)) == 1
    assert 0 <= above_the_mean[0] <= (1 if value >= SMALLEST else 0)
    twice = layer_saliency_rates(histogram, 2 * mean(histogram))
    assert twice.tolist() == [0.0] * layers


def test_one_huge_score_is_above_the_mean_alone() -> None:
    layers = [[torch.ones(1000)], [torch.tensor([LARGEST, 1.0])]]
    histogram = histogram_of(layers)
    assert layer_saliency_rates(histogram, MeanThreshold()(histogram)).tolist() == [0.0, 0.5]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("score", [math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "expanded"])
def test_one_score_that_is_not_finite_is_seen_in_every_layout(layout: str, score: float, dtype: torch.dtype) -> None:
    value = torch.ones(2, 3, 2, 2)
    value[1, 2, 0, 1] = score
    assert not histogram_of([[torch.ones(3)], [LAYOUTS[layout](value.to(dtype))]]).finite


def test_a_score_beyond_the_range_of_float32_is_infinite() -> None:
    assert not histogram_of([[torch.tensor([1e39], dtype=torch.float64)]]).finite


# --------------------------------------------------------------------------------------- from parameters to scores


@st.composite
def observed(draw: Any) -> Tuple[Dict[str, Tensor], Dict[str, Any], Tuple[Layer, ...]]:
    parameters, found, layers = {}, {}, []
    for index in range(draw(st.integers(1, 3))):
        names = tuple(f"{index}.{part}" for part in range(draw(st.integers(1, 2))))
        for name in names:
            parameters[name] = parameter = draw(tensors(EXACT)).detach()
            gradient = filled(draw(st.integers(0, 999)), tuple(parameter.shape), parameter.dtype, EXACT)
            layout = draw(
                st.sampled_from([name for name in LAYOUTS if name not in ("expanded", "requires a gradient")])
            )
            found[name] = None if draw(st.integers(0, 5)) == 0 else LAYOUTS[layout](gradient)
        layers.append(Layer(str(index), names, (), 1, None))
    return parameters, found, tuple(layers)


ORACLES = {
    Magnitude(): lambda theta, _: np.abs(theta),
    Taylor(): reference.taylor,
    Fisher(): reference.fisher,
}


@pytest.mark.parametrize("estimator", ORACLES, ids=repr)
@quick
@given(case=observed())
def test_scores_of_parameters_and_gradients_of_unequal_layouts(estimator: Any, case: Any) -> None:
    parameters, found, layers = case
    seen: Dict[str, np.ndarray] = {
        name: ORACLES[estimator](
            np.array(parameter.double().tolist()).reshape(parameter.shape),
            np.array([] if found[name] is None else found[name].double().tolist()).reshape(
                (0,) if found[name] is None else parameter.shape
            ),
        )
        for name, parameter in parameters.items()
        if found[name] is not None or estimator.order == 0
    }
    histogram = score_layers(estimator, layers, parameters, found)
    for index, layer in enumerate(layers):
        scores = [seen[name].reshape(-1) for name in layer.parameters if name in seen]
        flat = np.concatenate([np.zeros(0), *scores]).astype(np.float32)
        assert histogram.counts[index].tolist() == np.bincount(flat.view(np.uint32) >> 20, minlength=4096).tolist()


# ---------------------------------------------------------------------------------------------------- selections

rates = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 1.0, math.nan]), st.floats(0, 1))
names = st.text("abc.0", min_size=1, max_size=3)
both = st.dictionaries(names, st.tuples(rates, rates), max_size=8)
fractions = st.sampled_from([0.01, 0.3, 0.5, 0.75, 1.0])


def count(fraction: float, of: int) -> int:
    return max(1, int(np.floor(fraction * of + 0.5))) if of else 0


def split(drawn: Dict[str, Tuple[float, float]]) -> Tuple[Dict[str, float], Dict[str, float]]:
    return {name: pair[0] for name, pair in drawn.items()}, {name: pair[1] for name, pair in drawn.items()}


def without_nan(values: Dict[str, float]) -> Dict[str, float]:
    return {name: value for name, value in values.items() if value == value}


@quick
@given(both, fractions)
def test_selections_by_rank_are_those_of_a_slow_sort(drawn: Any, fraction: float) -> None:
    target, source = split(drawn)
    seen = without_nan(target)
    assert list(LowestFraction(fraction=fraction)(target, source)) == reference.lowest(seen, count(fraction, len(seen)))
    assert list(HighestFraction(fraction=fraction)(target, source)) == reference.lowest(
        {name: -rate for name, rate in seen.items()}, count(fraction, len(seen))
    )


@quick
@given(both, fractions, st.sampled_from([0.0, 0.25, 0.9]))
def test_selections_by_the_change_from_source_to_target(drawn: Any, fraction: float, margin: float) -> None:
    target, source = split({**drawn, "seen": (0.5, 0.75)})
    change = without_nan({name: np.float64(target[name]) - np.float64(source[name]) for name in target})
    expected = reference.lowest(change, count(fraction, len(change)))
    assert list(DomainShift(fraction=fraction)(target, source)) == expected
    fallen = [name for name in target if source[name] - target[name] > margin]
    assert list(DomainShift(margin=margin)(target, source)) == fallen
    assert list(DomainShift(margin=0)(target, target if without_nan(target) else source)) == []


@quick
@given(both, st.sampled_from([0.25, 0.5, 1.0]))
def test_selections_below_a_rate(drawn: Any, rate: float) -> None:
    target, source = split(drawn)
    assert list(BelowRate(rate=rate)(target, source)) == [name for name in target if target[name] < rate]


@quick
@given(models, models)
def test_a_reference_threshold_is_that_of_the_source_scores(target: Any, source: Any) -> None:
    of_target, of_source = histogram_of(target), histogram_of(source)
    for threshold in (MeanThreshold(multiple=0.5), QuantileThreshold(quantile=0.3)):
        value = ReferenceThreshold(of=threshold)(of_target, of_source)
        assert float(value) == pytest.approx(float(threshold(of_source, None)), rel=0, abs=0, nan_ok=True)
