import math

import pytest
import torch

from clda_core.errors import CldaError
from clda_core.saliency import (
    FixedThreshold,
    Histogram,
    MeanThreshold,
    QuantileThreshold,
    ReferenceThreshold,
    layer_saliency_rates,
)


def histogram_of(*layers) -> Histogram:
    histogram = Histogram.empty(len(layers))
    for index, scores in enumerate(layers):
        histogram.add(index, torch.tensor(scores))
    return histogram


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


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: QuantileThreshold(quantile=1), "quantile is out of range"),
        (lambda: MeanThreshold(multiple=0), "multiple is out of range"),
        (lambda: FixedThreshold(-1), "value is out of range"),
        (lambda: FixedThreshold(math.nan), "value is not a finite number"),
        (lambda: ReferenceThreshold(of=0.5), r"of is not a threshold.*FixedThreshold\(0.5\)"),
        (lambda: ReferenceThreshold(of=MeanThreshold), "of is not a threshold"),
        (lambda: ReferenceThreshold(of=None), "of is not a threshold"),
    ],
)
def test_wrong_arguments(build, match) -> None:
    with pytest.raises(CldaError, match=match):
        build()
