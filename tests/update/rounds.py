"""Rounds made by hand, and what must be the same after them."""

from typing import Any, Dict, List, Optional, Sequence

import torch
from torch import Tensor, nn

from clda_core.layers import ModelView, group_layers
from clda_core.outputs import as_outputs, call_model
from clda_core.relation import ByRelativeDepth
from clda_core.update import RoundContext


def forward(model: nn.Module, inputs: Any) -> Any:
    return as_outputs(call_model(model, inputs), None, "model")


def round_context(
    teacher: nn.Module, student: nn.Module, selected: Optional[Sequence[str]] = None, **options: Any
) -> RoundContext:
    """Return the context of a round that selects the named layers, or all."""
    of_teacher, of_student = group_layers(teacher), group_layers(student)
    defaults = {
        "related": ByRelativeDepth()(ModelView(teacher, of_teacher), ModelView(student, of_student)).pairs,
        "inputs": None,
        "mask": None,
        "forward": forward,
    }
    layers = tuple(layer for layer in of_teacher if selected is None or layer.name in selected)
    return RoundContext(teacher=teacher, student=student, layers=layers, **{**defaults, **options})


def images(seed: int = 0, count: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter and floating-point buffer a value of its own, and put some modules into eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3 + (parameter.dim() == 1))
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
    for module in list(model.modules())[1::3]:
        module.training = False
    return model


def values(model: nn.Module) -> Dict[str, Tensor]:
    """Return copies of all parameters and buffers, also of those that no checkpoint holds."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def changed(model: nn.Module, before: Dict[str, Tensor]) -> List[str]:
    """Return the names of the tensors whose bits differ."""
    now = values(model)
    assert list(now) == list(before)
    return [name for name in now if not same_bits(now[name], before[name])]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.numpy().tobytes() == b.numpy().tobytes()
