"""What differs between versions of torch behaves the same."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clda_core._compat import uncompiled


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
