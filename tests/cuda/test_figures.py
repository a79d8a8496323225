"""Figures computed on the device against float64 on the CPU."""

from typing import Any, Callable, Dict, Optional, Tuple

import pytest
import torch
from torch import Tensor, nn

from clda_core import saliency_rates
from clda_core.distillation import (
    attention_transfer,
    channel_wise_distillation,
    decoupled_distillation,
    dist_distillation,
    feature_distillation,
    kl_distillation,
)
from clda_core.saliency import Fisher, Hessian, Histogram, Magnitude, QuantileThreshold, Taylor
from clda_core.saliency.histogram import fraction_above, mean, quantile
from clda_core.update.alignment import CorrelationSums
from clda_core.validation import NeighbourhoodDensity
from tests import reference_distillation as reference
from tests.cuda.hosts import PAIRS, both, images
from tests.validation.validators import CASES as VALIDATORS
from tests.validation.validators import logits, view_of

LOSSES: Dict[str, Callable[..., Tensor]] = {
    "kl": lambda s, t, m: kl_distillation(s, t, m, temperature=1.0),
    "channel_wise": lambda s, t, m: channel_wise_distillation(s, t, m, temperature=1.0),
    "decoupled": lambda s, t, m: decoupled_distillation(s, t, m, temperature=1.0),
    "dist": lambda s, t, m: dist_distillation(s, t, m),
    "features": feature_distillation,
    "attention": attention_transfer,
}
HALF = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""How far a gradient of the dtype may be off, relative to its largest element: float32 as documented, else rounding."""


def sample(*shape: int, seed: int, scale: float, dtype: torch.dtype) -> Tensor:
    made = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return made.to(dtype)


def oracle(name: str, student: Tensor, teacher: Tensor, weights: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """Return value and gradient in float64 on the CPU, by plain compositions of autograd's functions."""
    leaf = student.double().flatten(2).requires_grad_()
    rows = None if weights is None else weights.double().flatten(1)
    value = reference.differentiable(name, leaf, teacher.double().flatten(2), rows)
    (slope,) = torch.autograd.grad(value, [leaf])
    return value.detach(), slope.reshape(student.shape)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [2.0, 30.0])
def test_losses(device: torch.device, name: str, dtype: torch.dtype, masked: bool, scale: float) -> None:
    shape = (2, 7, 33, 65)
    student, teacher = (sample(*shape, seed=seed, scale=scale, dtype=dtype) for seed in (0, 1))
    weights = None
    if masked:
        weights = torch.rand(2, 33, 65, generator=torch.Generator().manual_seed(2))
        weights = (weights * (weights > 0.3)).float()
        weights = weights / weights.max()
    value, slope = oracle(name, student, teacher, weights)
    leaf = student.to(device).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16):
        loss = LOSSES[name](leaf, teacher.to(device), None if weights is None else weights.to(device))
    assert (loss.dtype, loss.device.type) == (torch.float32, device.type)
    loss.backward()
    assert (leaf.grad.dtype, leaf.grad.device.type) == (dtype, device.type)
    assert loss.item() == pytest.approx(value.item(), rel=1e-5)
    apart = (leaf.grad.cpu().double() - slope).abs().max()
    assert float(apart / slope.abs().max()) < HALF[dtype]


@pytest.mark.parametrize("name", ["kl", "channel_wise", "decoupled", "dist"])
@pytest.mark.parametrize("size", [1e4, 3e38])
def test_extreme_logits_do_what_they_do_on_the_cpu(device: torch.device, name: str, size: float) -> None:
    student = torch.tensor([[-size, 0.0, size], [size, size, -size], [0.0, 0.0, 0.0]]).t().reshape(1, 3, 3)
    teacher = torch.tensor([[size, 0.0, -size], [size, -size, -size], [1.0, 0.0, 2.0]]).t().reshape(1, 3, 3)
    found = []
    for where in (device, torch.device("cpu")):
        leaf = student.to(where).requires_grad_()
        loss = LOSSES[name](leaf, teacher.to(where), None)
        loss.backward()
        found.append((loss.detach().cpu(), leaf.grad.cpu()))
    assert all(torch.isfinite(one).all() for one in found[0])
    for mine, its in zip(*found):
        assert torch.allclose(mine, its, rtol=1e-5, atol=1e-7 * float(its.abs().max()))


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_and_nonfinite_positions(device: torch.device, name: str) -> None:
    """NaN where nothing counts is not seen; NaN where it counts is passed on."""
    student, teacher = (sample(2, 5, 8, 8, seed=seed, scale=2.0, dtype=torch.float32) for seed in (0, 1))
    mask = torch.ones(2, 8, 8, dtype=torch.bool)
    mask[:, :4] = False
    student[:, :, 0], teacher[:, :, 1] = float("nan"), float("inf")
    leaf = student.to(device).requires_grad_()
    loss = LOSSES[name](leaf, teacher.to(device), mask.to(device))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(leaf.grad).all()
    assert float(leaf.grad[:, :, :4].abs().max()) == 0
    assert not torch.isfinite(LOSSES[name](leaf, teacher.to(device), None))
    nothing = LOSSES[name](leaf, teacher.to(device), torch.zeros_like(mask).to(device))
    assert float(nothing.detach()) == 0


@pytest.mark.parametrize("name", VALIDATORS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_validators(device: torch.device, name: str, dtype: torch.dtype, masked: bool) -> None:
    validator = VALIDATORS[name].make()
    given = logits(6, 5, 24, 31).to(dtype)
    view = view_of(given).to(dtype)
    mask = torch.rand(6, 24, 31, generator=torch.Generator().manual_seed(3)) if masked else None
    expected = validator.statistics(given.double(), view.double(), mask)
    with torch.autocast(device.type, torch.bfloat16):
        found = validator.statistics(given.to(device), view.to(device), None if mask is None else mask.to(device))
    assert found.device.type == device.type
    assert found.dtype == torch.float64
    assert torch.allclose(found.cpu(), expected, rtol=1e-6, atol=1e-6)
    assert float(validator.score(found)) == pytest.approx(float(validator.score(expected)), rel=1e-6)
    if hasattr(validator, "score_by_class"):
        by_class = validator.score_by_class(found).cpu()
        assert torch.allclose(by_class, validator.score_by_class(expected), rtol=1e-6, equal_nan=True)


def test_neighbourhoods_of_many_positions(device: torch.device) -> None:
    given = logits(3, 5, 64, 64)
    mask = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3)) > 0.7
    validator = NeighbourhoodDensity(samples=999)
    found = validator.statistics(given.to(device), None, mask.to(device)).cpu()
    assert torch.allclose(found, validator.statistics(given, None, mask), rtol=1e-9)


def test_histograms(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(size, generator=generator).abs().pow(3) for size in (1, 7, 70_000, 300_000)]
    scores += [torch.zeros(5), torch.tensor([1e-42, 1e-38, 3e38])]
    histograms = []
    for where in (device, torch.device("cpu")):
        histogram = Histogram.empty(3, where)
        for index, one in enumerate(scores):
            histogram.add(index % 2, one.to(where), one[:3].to(where))
        histograms.append(histogram)
    mine, its = histograms
    assert mine.counts.device.type == mine.sums.device.type == device.type
    assert torch.equal(mine.counts.cpu(), its.counts)
    assert torch.allclose(mine.sums.cpu(), its.sums, rtol=1e-9)
    for threshold in (0.0, 1e-39, 0.5, 2.0):
        above = [fraction_above(one, threshold).cpu() for one in histograms]
        assert torch.allclose(*above, rtol=1e-12, equal_nan=True)
    assert float(quantile(mine, 0.3)) == pytest.approx(float(quantile(its, 0.3)), rel=1e-12)
    assert float(mean(mine)) == pytest.approx(float(mean(its)), rel=1e-9)
    assert bool(mine.finite)
    mine.add(0, torch.tensor([float("nan")], device=device))
    assert not bool(mine.finite)
    assert not bool(mine.negative)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("saliency", [Magnitude, Taylor, Fisher, Hessian])
@pytest.mark.parametrize("threshold", [None, QuantileThreshold(quantile=0.6)], ids=["mean", "quantile"])
def test_rates(device: torch.device, name: str, saliency: Any, threshold: Any) -> None:
    if saliency is Hessian and name == "encoders":
        pytest.skip("fused attention has no second derivative")

    def rates(where: torch.device) -> Dict[str, float]:
        teacher: nn.Module = PAIRS[name](where)[0].double()
        batches = [images(where, step).double() for step in range(2)]
        return saliency_rates(teacher, batches, saliency=saliency(), threshold=threshold, extract=both)

    found, expected = rates(device), rates(torch.device("cpu"))
    assert found.keys() == expected.keys()
    assert any(0 < rate < 1 for rate in found.values())
    assert found == pytest.approx(expected, abs=0.02)  # an element at the edge of a bin may fall either way


def test_correlations(device: torch.device) -> None:
    x, y = (sample(500, width, seed=width, scale=1.0, dtype=torch.float32) for width in (6, 9))
    found = CorrelationSums.of(x.to(device), y.to(device)).correlation().cpu()
    expected = torch.corrcoef(torch.cat([x, y], 1).double().t())[:6, 6:]
    assert torch.allclose(found, expected, rtol=1e-6, atol=1e-9)
