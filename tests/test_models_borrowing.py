from typing import Any, List

import pytest
import torch
from torch import nn

from clda_core._models import evaluating, requiring_grad
from tests.models import ResNet


class FrozenNorm(nn.Module):
    """Overrides ``train()`` to keep its norm in eval mode, as detectors and segmenters do, and counts the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.calls = 0

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(mode)
        self.norm.training = False
        self.calls += 1
        return self


def modes(*models: nn.Module) -> List[bool]:
    return [module.training for model in models for module in model.modules()]


def mixed() -> nn.Module:
    model = ResNet((2, 1)).train()
    model.layer1[0].bn1.eval()
    model.layer2.eval()
    model.layer2[0].conv1.train()
    return model


@pytest.mark.parametrize("fails", [False, True])
def test_evaluating_restores_mixed_modes(fails: bool) -> None:
    model, other = mixed(), FrozenNorm().train()
    before, calls = modes(model, other), other.calls
    assert len(set(before)) == 2

    def borrow() -> None:
        with evaluating(model, other):
            assert not any(modes(model, other))
            if fails:
                raise ValueError("stop")

    if fails:
        with pytest.raises(ValueError, match="stop"):
            borrow()
    else:
        borrow()
    assert modes(model, other) == before
    assert other.calls == calls


def test_evaluating_may_be_nested_and_name_a_model_twice() -> None:
    model = mixed()
    before = modes(model)
    with evaluating(model, model):
        with evaluating(model):
            pass
        assert not any(modes(model))
    assert modes(model) == before


def test_evaluating_keeps_statistics_and_draws_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout()).train()
    state, rng = {name: tensor.clone() for name, tensor in model.state_dict().items()}, torch.get_rng_state()
    with evaluating(model):
        model(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("enabled", [False, True])
def test_requiring_grad_restores_flags_and_grad_mode(fails: bool, enabled: bool) -> None:
    a, b, c, outside = (nn.Parameter(torch.ones(2)) for _ in range(4))
    for parameter, flag in zip((a, b, c), (True, False, True)):
        parameter.requires_grad_(flag)

    def borrow() -> Any:
        with requiring_grad([b, b], of=[a, b, c]):
            assert [p.requires_grad for p in (a, b, c, outside)] == [False, True, False, True]
            found = torch.autograd.grad((a * b * c).sum(), [b])
            if fails:
                raise ValueError("stop")
            return found

    with torch.set_grad_enabled(enabled):
        if fails:
            with pytest.raises(ValueError, match="stop"):
                borrow()
        else:
            assert borrow()[0].tolist() == [1.0, 1.0]
        assert torch.is_grad_enabled() is enabled
    assert [p.requires_grad for p in (a, b, c, outside)] == [True, False, True, True]
    assert all(p.grad is None for p in (a, b, c, outside))


def test_requiring_grad_works_in_a_host_that_switched_gradients_off() -> None:
    parameter = nn.Parameter(torch.ones(1), requires_grad=False)
    with torch.no_grad(), requiring_grad([parameter]):
        assert (parameter * 2).requires_grad
    assert not parameter.requires_grad
