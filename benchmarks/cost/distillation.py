"""The KD loss on logits of full resolution: peak memory and time against the plain composition and torchdistill's."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterator, Tuple

import torch
from torch import Tensor

from benchmarks.cost.figures import Figure, figure
from benchmarks.cost.others import missing, other
from benchmarks.cost.peak import peak
from benchmarks.cost.settings import plain_kl
from benchmarks.cost.timing import interleaved, ratio
from clda_core.distillation import dist_distillation, kl_distillation

SHAPE = (2, 19, 512, 512)
MEMORY, TIME, OTHERS = 0.6, 1.0, 1.0

Loss = Callable[[Tensor, Tensor], Tensor]
_KL, _DIST = "KL", "DIST, the default"
_PLAIN = "plain F.kl_div (mmrazor's KLDivergence is the same)"
_TORCHDISTILL = "torchdistill's KDLoss"


def distillation(device: torch.device, repeats: int, shape: Tuple[int, ...] = SHAPE) -> Iterator[Figure]:
    """Compare forward and backward pass together."""
    where = f"float32 logits {shape}"
    losses = _losses()
    peaks = {name: peak(work, name, shape, device=device) for name in losses}
    times = interleaved({name: work(name, shape, device) for name in losses}, repeats=repeats, device=device)
    for name, found in peaks.items():
        yield Figure("distillation", f"peak memory, {name}", where, found / 2**20, "MiB")
    note = "forward and backward pass, the gradient and all; beyond the two logits"
    for ours, other_, memory, time in (
        (_KL, _PLAIN, MEMORY, TIME),
        (_KL, _TORCHDISTILL, OTHERS, OTHERS),
        (_DIST, _PLAIN, MEMORY, TIME),
    ):
        if other_ in peaks:
            value = peaks[ours] / max(1, peaks[other_])
            yield Figure("distillation", f"{ours}: peak memory / {other_}", where, value, at_most=memory, note=note)
            yield figure("distillation", f"{ours}: time / {other_}", where, ratio(times, ours, other_), at_most=time)
        else:
            yield Figure(
                "distillation", f"{ours}: time / {other_}", where, None, at_most=time, note=missing("torchdistill")
            )


def work(name: str, shape: Tuple[int, ...], device: torch.device) -> Callable[[], Any]:
    """Return a forward and backward pass of a loss."""
    loss = _losses()[name]
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator).to(device).requires_grad_(True)
    teacher = torch.randn(shape, generator=generator).to(device)
    small = torch.zeros(1, 2, 1, 1, device=device, requires_grad=True)
    loss(small, small.detach()).backward()  # what the first call imports and allocates is no part of it

    def run() -> None:
        student.grad = None
        loss(student, teacher).backward()

    return run


def _losses() -> Dict[str, Loss]:
    losses: Dict[str, Loss] = {
        _KL: lambda student, teacher: kl_distillation(student, teacher),
        _DIST: lambda student, teacher: dist_distillation(student, teacher),
        _PLAIN: plain_kl,
    }
    torchdistill = other("torchdistill.losses.mid_level")
    if torchdistill is not None:
        io = {"student_module_path": ".", "student_module_io": "output"}
        io.update(teacher_module_path=".", teacher_module_io="output")
        module = torchdistill.KDLoss(**io, temperature=2.0, alpha=1.0, reduction="batchmean")
        losses[_TORCHDISTILL] = lambda student, teacher: module(
            {".": {"output": student}}, {".": {"output": teacher}}, None
        )
    return losses
