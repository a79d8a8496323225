import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clda_core._host.compat import leading_bits, leading_bits_by_search
from clda_core.errors import CldaError
from clda_core.saliency import Histogram
from clda_core.saliency.histogram import fraction_above, mean, quantile
from tests import reference_saliency as reference

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)
positive = st.floats(0, 2.0**120, width=32)
models = st.lists(st.lists(positive, min_size=1, max_size=30), min_size=1, max_size=4).map(
    lambda lists: [np.array(scores, dtype=np.float32) for scores in lists]
)


def histogram_of(*layers) -> Histogram:
    histogram = Histogram.empty(len(layers))
    for index, scores in enumerate(layers):
        histogram.add(index, torch.as_tensor(scores))
    return histogram


def test_state_is_bounded_whatever_the_model() -> None:
    histogram = histogram_of(torch.rand(100_000), torch.rand(10))
    assert histogram.counts.shape == (2, 4096)
    assert histogram.counts.dtype == torch.int64
    assert histogram.sums.dtype == torch.float64
    assert histogram.sizes.tolist() == [100_000, 10]


@quick
@given(st.lists(st.floats(width=32), min_size=1, max_size=50))
def test_bins_are_the_leading_bits(values) -> None:
    bits = np.array(values, dtype=np.float32).view(np.uint32) >> 20
    found = leading_bits(torch.tensor(values, dtype=torch.float32), 12)
    assert found.tolist() == bits.tolist()


@quick
@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=1, max_size=50))
def test_bins_found_by_search_are_the_same(values) -> None:
    # The sign of zero is lost, which is harmless: both zeros are taken as zero.
    scores = torch.tensor(values, dtype=torch.float32) + 0.0
    assert leading_bits_by_search(scores, 12).tolist() == leading_bits(scores, 12).tolist()


def test_nan_found_by_search_is_no_number() -> None:
    histogram = Histogram.empty(1)
    found = leading_bits_by_search(torch.tensor([math.nan, math.inf, 1.0]), 12)
    histogram.counts[0] += torch.bincount(found, minlength=4096)
    assert not histogram.finite
    assert histogram.counts[0, :2040].sum() == 1


@quick
@given(models, st.floats(0.01, 0.99))
def test_quantile_is_in_the_bin_of_the_exact_one(layers, q) -> None:
    exact = reference.quantile(layers, q)
    found = float(quantile(histogram_of(*layers), q))
    if exact < 2.0**-126:
        assert found == 0
    else:
        assert exact / (1 + 1 / 8) <= found <= exact * (1 + 1 / 8)


@quick
@given(models, st.floats(0, 2.0**120))
def test_rates_are_exact_outside_the_thresholds_bin(layers, threshold) -> None:
    layers = [np.where(layer < 2.0**-126, np.float32(0), layer) for layer in layers]
    found = fraction_above(histogram_of(*layers), threshold)
    bounds = reference.in_bin_of(layers, threshold)
    for ours, exact, bound in zip(found.tolist(), reference.rates(layers, threshold), bounds):
        assert abs(ours - exact) <= bound + 1e-12


@quick
@given(models, st.floats(0.01, 0.99))
def test_weighted_mean_of_the_rates_above_a_quantile_is_fixed(layers, q) -> None:
    histogram = histogram_of(*layers)
    threshold = quantile(histogram, q)
    weighted = (fraction_above(histogram, threshold) * histogram.sizes).sum() / histogram.sizes.sum()
    if threshold > 0:
        assert float(weighted) == pytest.approx(1 - q, abs=1e-9)
    else:
        assert float(weighted) <= 1 - q + 1e-9


@quick
@given(models)
def test_mean_is_exact(layers) -> None:
    scores = np.concatenate(layers).astype(np.float64)
    assert float(mean(histogram_of(*layers))) == pytest.approx(scores.mean(), rel=1e-12)


@quick
@given(models, st.integers(-20, 5))
def test_a_power_of_two_moves_everything_and_changes_no_rate(layers, exponent) -> None:
    layers = [np.where(layer < 2.0**-100, np.float32(0), layer) for layer in layers]
    before = histogram_of(*layers)
    after = histogram_of(*[layer * np.float32(2.0**exponent) for layer in layers])
    for threshold in (mean, lambda histogram: quantile(histogram, 0.4)):
        assert threshold(after) == threshold(before) * 2.0**exponent
        assert torch.equal(fraction_above(after, threshold(after)), fraction_above(before, threshold(before)))


def test_smooth_scores_are_estimated_far_better_than_a_bin() -> None:
    own = torch.Generator().manual_seed(0)
    layers = [torch.randn(20_000, generator=own).abs() * scale for scale in (0.5, 1.0, 3.0)]
    exact = reference.quantile([layer.numpy() for layer in layers], 0.5)
    histogram = histogram_of(*layers)
    assert float(quantile(histogram, 0.5)) == pytest.approx(exact, rel=2e-3)
    expected = reference.rates([layer.numpy() for layer in layers], exact)
    assert fraction_above(histogram, exact).tolist() == pytest.approx(expected, abs=2e-3)


def test_parts_of_any_size_add_up_to_the_whole() -> None:
    scores = torch.rand(150_001, generator=torch.Generator().manual_seed(0))
    whole, parts = histogram_of(scores), Histogram.empty(1)
    for part in torch.split(scores, 33_333):
        parts.add(0, part)
    assert torch.equal(whole.counts, parts.counts)
    assert float(whole.sums) == pytest.approx(float(parts.sums), rel=1e-13)
    again = histogram_of(scores)
    assert torch.equal(whole.sums, again.sums)


def test_merge_adds_in_place() -> None:
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([3.0])
    first, second = histogram_of(a, b), histogram_of(b, a)
    counts = first.counts
    first.merge(second)
    assert first.counts is counts
    both = histogram_of(torch.cat([a, b]), torch.cat([b, a]))
    assert torch.equal(first.counts, both.counts)
    assert torch.equal(first.sums, both.sums)
    with pytest.raises(CldaError, match="different layers: expected 2 layers, received 1 layers"):
        first.merge(histogram_of(a))


def test_zeros_never_exceed_and_may_be_the_quantile() -> None:
    histogram = histogram_of([0.0, -0.0, 0.0, 1e-42], [0.0, 1.0])
    assert float(quantile(histogram, 0.5)) == 0
    assert fraction_above(histogram, 0.0).tolist() == [0.0, 0.5]
    assert histogram.finite
    assert not histogram.negative


def test_thresholds_at_the_ends_of_the_range() -> None:
    histogram = histogram_of([2.0**-126, 3.4e38])
    assert fraction_above(histogram, 0.0).tolist() == [1.0]
    assert fraction_above(histogram, 2.0**-127).tolist() == [1.0]
    assert fraction_above(histogram, 1.0).tolist() == [0.5]
    assert fraction_above(histogram, 2.0**128).tolist() == [0.0]
    assert fraction_above(histogram, 1e300).tolist() == [0.0]


@pytest.mark.parametrize("score", [math.inf, math.nan, -math.inf, -math.nan])
def test_non_finite_scores_are_flagged(score) -> None:
    histogram = histogram_of([1.0], [1.0, score])
    assert histogram.finite.shape == ()
    assert not histogram.finite
    assert histogram_of([1.0], [1.0]).finite
    assert not histogram_of([math.nan]).negative
    assert fraction_above(histogram, 0.5).tolist() == [1.0, 1.0]


def test_negative_scores_are_flagged() -> None:
    histogram = histogram_of([1.0], [-1e-3])
    assert histogram.negative
    assert histogram.finite
    assert not histogram_of([1.0], [0.0, -0.0]).negative


def test_a_layer_without_scores_is_unknown() -> None:
    assert histogram_of([0.0], [1.0, 3.0], []).seen.tolist() == [True, True, False]
    histogram = histogram_of([1.0, 3.0], [])
    assert float(mean(histogram)) == 2.0
    rates = fraction_above(histogram, mean(histogram))
    assert rates[0] == 0.5
    assert torch.isnan(rates[1])


def test_a_model_without_scores_is_unknown() -> None:
    histogram = Histogram.empty(2)
    assert torch.isnan(mean(histogram))
    assert torch.isnan(quantile(histogram, 0.5))
    assert torch.isnan(fraction_above(histogram, 1.0)).all()
    assert histogram.finite


def test_an_unknown_threshold_gives_unknown_rates() -> None:
    assert torch.isnan(fraction_above(histogram_of([1.0], [2.0]), torch.tensor(math.nan))).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_read_as_float32(dtype) -> None:
    scores = torch.tensor([0.0, 0.5, 1.0, 96.0]).to(dtype)
    assert torch.equal(histogram_of(scores).counts, histogram_of(scores.float()).counts)


def test_scores_may_be_strided_and_require_a_gradient() -> None:
    scores = torch.arange(12.0).reshape(3, 4).t().requires_grad_()
    histogram = histogram_of(scores[::2])
    assert histogram.sums.tolist() == [2.0 + 6 + 10 + 0 + 4 + 8]
    assert not histogram.sums.requires_grad


def test_results_are_0_dim_float64_tensors() -> None:
    histogram = histogram_of([1.0])
    for value in (mean(histogram), quantile(histogram, 0.5)):
        assert value.shape == ()
        assert value.dtype == torch.float64


@pytest.mark.parametrize("q", [0, 1, -0.1, "a"])
def test_quantile_out_of_range(q) -> None:
    with pytest.raises(CldaError, match="q is"):
        quantile(histogram_of([1.0]), q)


@pytest.mark.parametrize("layers", [0, 1.5])
def test_layers_out_of_range(layers) -> None:
    with pytest.raises(CldaError, match="layers is"):
        Histogram.empty(layers)


def test_a_device_without_float64_counts_and_the_cpu_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    expected = histogram_of(scores)
    monkeypatch.setattr("clda_core.saliency.histogram.has_float64", lambda device: False)
    assert Histogram.empty(2, "cuda:3").sums.device.type == "cpu"
    found = histogram_of(scores)
    assert torch.equal(found.counts, expected.counts)
    assert found.sums.dtype == torch.float64
    assert found.sums.item() == pytest.approx(expected.sums.item(), rel=1e-6)
    assert quantile(found, 0.7).item() == pytest.approx(quantile(expected, 0.7).item())
