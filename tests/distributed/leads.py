"""What the ranks of `test_lead.py` do: each has a part of the data, or the last one none."""

from typing import Any, Dict, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from clda_core.distillation import KLDistillation
from clda_core.lead import LinearTrust
from clda_core.selection import AllLayers
from clda_core.update import MaskedDistillation
from clda_core.validation import MixVal
from tests.distributed.host import BATCH, INPUTS, Net
from tests.helpers import bits, make_learner, seeded, values

SCENARIOS: Dict[str, Tuple[Any, str]] = {
    "a part each": (None, "nothing"),
    "none on the last rank": (None, "images"),
    "a mix of its own, none on the last rank": (MixVal, "images"),
    "all masked out on the last rank": (None, "positions"),
}
"""The validator, and what the last rank lacks."""


def data(seed: int) -> Tensor:
    return torch.randn(BATCH, INPUTS, generator=torch.Generator().manual_seed(seed))


def source(network: nn.Module) -> Tensor:
    inputs = data(90)
    return F.cross_entropy(network(inputs), (inputs.sum(1) > 0).long())


def train(name: str, rank: int, ranks: int) -> Dict[str, Any]:
    """Train for three steps, each with a round; in one process on all the data."""
    validator, lacks = SCENARIOS[name]
    empty = lacks != "nothing"
    teacher, student = seeded(lambda: Net(3), 0).requires_grad_(False), seeded(lambda: Net(2), 1)
    with torch.no_grad():
        for model in (teacher, student):  # so that both predict every class
            model.head.bias -= model(data(80)).mean(0)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    learner = make_learner(
        teacher,
        student,
        distillation=KLDistillation(),  # a mean over samples, so that the ranks' gradients average to those of all data
        validator=None if validator is None else validator(),
        trust=LinearTrust(zero=-5.0, full=5.0),
        update=MaskedDistillation(),
        selection=AllLayers(),
    )
    for number in range(3):
        whole = data(number)
        mine, mask = whole if empty else whole.chunk(ranks)[rank], None
        if empty and rank == ranks - 1 and ranks > 1:
            mine = whole[:0] if lacks == "images" else whole
            mask = torch.zeros(len(mine), dtype=torch.bool) if lacks == "positions" else None
        view = None if validator is MixVal else mine + 0.3 * mine.sin()
        optimizer.zero_grad()
        learner.distill(student(mine), mine, mask=mask, view=view, source_loss=source).backward()
        if dist.is_available() and dist.is_initialized():
            for parameter in student.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad.div_(1 if empty else ranks)
        learner.step(optimizer)
    state = learner.state_dict()
    return {"rounds": state["history"], "lead": bits(state["lead"]), "teacher": values(teacher)}


def work(rank: int, ranks: int) -> Dict[str, Any]:
    return {name: train(name, rank, ranks) for name in SCENARIOS}
