"""What differs between versions of torch behaves the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clda_core._host import compat as _compat
from clda_core._host.compat import adam, has_complex_adam, has_float64, norms, uncompiled


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(torch, "compile"), reason="torch.compile came with torch 2.0")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("in_place", [False, True])
def test_uncompiled_runs_the_model_itself_and_leaves_it_compiled(in_place: bool) -> None:
    if in_place and not hasattr(nn.Module, "compile"):
        pytest.skip("Module.compile came with torch 2.2")
    pytest.importorskip("torch._dynamo").reset()  # forget what an earlier test compiled
    runs, hooked = [], []

    def backend(graph: Any, _: Any) -> Any:
        def run(*inputs: Tensor) -> Any:
            runs.append(graph)
            return graph.forward(*inputs)

        return run

    network, x = Network(), torch.randn(4, 3)
    if in_place:
        compiled = network
        network.compile(backend=backend)
    else:
        compiled = torch.compile(network, backend=backend)
    expected = compiled(x)
    assert len(runs) == 1
    with uncompiled(compiled):
        handle = network.linear.register_forward_hook(lambda *_: hooked.append(True))
        assert torch.equal(compiled(x), expected)
        handle.remove()
    assert hooked
    assert len(runs) == 1
    compiled(x)
    assert len(runs) == 2
    assert runs[0] is runs[1]


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
    _compat._makes_float64.cache_clear()
    assert not has_float64(torch.device("xla"))
    _compat._makes_float64.cache_clear()


def test_norms_of_no_tensor_and_of_empty_ones() -> None:
    assert norms([torch.zeros(0)]).tolist() == []
    assert norms([torch.zeros(0), torch.tensor([3.0, 4.0])]).tolist() == [5.0]
