"""Memory on the device: of the losses at full resolution, and of a learner over many steps."""

import gc
from typing import Any, Callable, Dict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from clda_core.distillation import FeatureDistillation, dist_distillation, kl_distillation
from clda_core.lead import LinearTrust
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation
from tests.cuda.hosts import PAIRS, images, iteration, learner_of

SHAPE = (2, 19, 512, 512)


def plain_kl(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """Return the distillation loss as it is usually composed."""
    q, p = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(q, p, reduction="sum") / (student.numel() // student.shape[1])


def peak(loss: Callable[[Tensor, Tensor], Tensor], device: torch.device) -> int:
    """Return the most bytes that forward and backward pass need beside the logits."""
    student, teacher = torch.randn(SHAPE, device=device, requires_grad=True), torch.randn(SHAPE, device=device)
    small = torch.zeros(1, 2, 1, 1, device=device, requires_grad=True)
    loss(small, small.detach()).backward()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(student, teacher).backward()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("loss", [kl_distillation, dist_distillation])
def test_losses_need_less_than_the_plain_composition(cuda: torch.device, loss: Any) -> None:
    ours, plain = peak(loss, cuda), peak(plain_kl, cuda)
    assert ours <= 0.6 * plain, f"{ours / 2**20:.0f} MiB of {plain / 2**20:.0f} MiB, {ours / plain:.2f}"


OPTIONS: Dict[str, Callable[[], Dict[str, Any]]] = {
    "default": dict,
    "feature loss": lambda: {"distillation": FeatureDistillation()},
    "average": lambda: {"update": Average(decay=0.9)},
    "aligned": lambda: {"update": AlignedAverage(decay=0.9)},
    "guarded": lambda: {"update": Guard(MaskedDistillation())},
    "on the view": lambda: {"update": MaskedDistillation(learns_on="view", own_targets=True)},
}


def allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_learner_holds_no_more_and_more(device: torch.device, name: str, options: str) -> None:
    pair = PAIRS[name](device, alike=options == "average")
    learner = learner_of(pair, selection=AllLayers(), trust=LinearTrust(zero=-9.0), **OPTIONS[options]())
    optimizer = torch.optim.AdamW(pair[1].parameters(), lr=1e-3)
    held = []
    for step in range(30 if device.type == "cuda" else 3):
        iteration(learner, optimizer, step, device, view=images(device, step) + 0.1)
        optimizer.zero_grad(set_to_none=True)
        held.append(allocated(device))
    assert len(learner.report().rounds) == len(held)
    # The allocator's first steps may differ by a block; what grows, grows in every step.
    assert len(set(held[-10:])) == 1, held
