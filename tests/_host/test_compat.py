"""What differs between versions of torch behaves the same."""

from typing import Any

import pytest
import torch
from torch import nn

from clda_core._host.compat import adam, has_complex_adam, has_float64, norms

FEW = {
    "float32": lambda: [torch.ones(3)],
    "float64": lambda: [torch.ones(3).double()],
    "channels last": lambda: [torch.ones(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)],
    "slices": lambda: [torch.ones(3, 4)[:, :2]],
    "float32 and complex": lambda: [torch.ones(3), torch.ones(2, dtype=torch.complex64)],
    "float32 and a subclass": lambda: [torch.ones(3), torch.ones(2).as_subclass(Sub)],
}


class Sub(torch.Tensor):
    pass


@pytest.mark.parametrize("which", FEW)
def test_what_adam_returns_can_step_whatever_the_parameters_are(which: str) -> None:
    parameters = [nn.Parameter(tensor) for tensor in FEW[which]()]
    optimizer = adam(parameters, 0.1)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    if has_complex_adam() or not any(parameter.is_complex() for parameter in parameters):
        for parameter in parameters:
            assert torch.allclose(parameter.detach().abs(), torch.full(parameter.shape, 0.9).to(parameter.abs()))


def test_adam_is_not_fused_where_no_kernel_is() -> None:
    for one in (torch.ones(2, dtype=torch.complex64), torch.ones(3, 4)[:, :2]):
        assert not adam([nn.Parameter(torch.ones(3)), nn.Parameter(one)], 0.1).param_groups[0].get("fused")


def test_a_device_without_float64_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_float64(torch.device("cpu"))
    assert has_float64(torch.device("cuda"))

    def zeros(*size: Any, **options: Any) -> Any:
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    monkeypatch.setattr(torch, "zeros", zeros)
    has_float64.cache_clear()
    assert not has_float64(torch.device("xla"))
    has_float64.cache_clear()


def test_norms_of_no_tensor_and_of_empty_ones() -> None:
    assert norms([torch.zeros(0)]).tolist() == []
    assert norms([torch.zeros(0), torch.tensor([3.0, 4.0])]).tolist() == [5.0]
