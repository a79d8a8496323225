from typing import Any, Dict, Tuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core._host.half import SCALE, loss_scale
from clda_core.saliency import Hessian, Taylor
from clda_core.update import MaskedDistillation
from tests.helpers import FakeScaler, images, make_learner, seeded


class Half(torch.autograd.Function):
    """Computes in float16, as autocast does on some devices and with some versions of torch."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.half().float()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tensor:
        return Half.apply(upstream)


class Dense(nn.Module):
    """Classifies pixels."""

    def __init__(self, half: bool) -> None:
        super().__init__()
        self.first, self.last, self.half = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 1), half

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(Half.apply(x) if self.half else x)


def probe(logits: Tensor, mask: Any) -> Tensor:
    return 1e-4 * F.cross_entropy(logits, logits.detach().argmax(1))


def after_a_round(scaler: Any, saliency: Any, *, half: bool) -> Tuple[Dict[str, float], Tensor]:
    """Return the rates, and how far the first layer of a teacher was moved that is close to its student."""
    teacher, student = seeded(lambda: Dense(half), 0), seeded(lambda: Dense(False), 0)
    with torch.no_grad():
        student.last.bias[0] += 1e-3
    before = teacher.first.weight.detach().clone()
    update = MaskedDistillation(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e5))
    learner = make_learner(teacher, student, update=update, saliency=saliency, probe=probe)
    optimizer, x = torch.optim.SGD(student.parameters(), lr=0.0), images(side=64)
    loss = learner.distill(student(x), x)
    (loss if scaler is None else scaler.scale(loss)).backward()
    learner.step(optimizer, scaler=scaler)
    return dict(learner.report().rounds[-1].rates), teacher.first.weight.detach() - before


@pytest.mark.parametrize("saliency", [Taylor(), Hessian()])
def test_rounds_of_a_model_in_half_precision_are_those_in_full_where_the_host_scales_its_loss(saliency: Any) -> None:
    rates, moved = after_a_round(None, saliency, half=False)
    of_half, moved_in_half = after_a_round(FakeScaler(), saliency, half=True)
    assert of_half == pytest.approx(rates, abs=0.02)
    assert (moved_in_half - moved).norm() < 0.1 * moved.norm()
    unscaled_rates, unscaled = after_a_round(None, saliency, half=True)
    assert unscaled.abs().max() == 0.0
    assert unscaled_rates["first"] == 0.0


def test_in_full_precision_scaling_rounds_nothing() -> None:
    rates, moved = after_a_round(None, Taylor(), half=False)
    of_scaled, moved_scaled = after_a_round(FakeScaler(), Taylor(), half=False)
    assert of_scaled == rates
    assert torch.equal(moved_scaled, moved)


def test_only_an_enabled_scaler_counts() -> None:
    class Scaler(FakeScaler):
        def is_enabled(self) -> bool:
            return self.factor > 1.0

    assert [loss_scale(one) for one in (None, FakeScaler(), Scaler(), Scaler(1.0))] == [1.0, SCALE, SCALE, 1.0]
