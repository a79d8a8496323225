"""What the ranks of `test_ddp.py` do."""

from typing import Any, Dict, List

from torch.nn.parallel import DistributedDataParallel

from clda_core.lead import FixedTrust
from clda_core.saliency import Fisher
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, MaskedDistillation, agreement
from tests import helpers
from tests.distributed.host import Scenario, train


def masked_distillation(**options: Any) -> Dict[str, Any]:
    return {"update": MaskedDistillation(learning_rate=1e-2, steps=2, **options)}


SCENARIOS: Dict[str, Scenario] = {
    "average": Scenario(lambda: {"update": Average(decay=0.9)}),
    "aligned average": Scenario(lambda: {"update": AlignedAverage(decay=0.9), "saliency": Fisher()}),
    "masked distillation": Scenario(masked_distillation),
    "own targets": Scenario(lambda: {**masked_distillation(own_targets=True), "trust": FixedTrust(0.5)}, view=True),
    "guarded, agreement": Scenario(
        lambda: {"update": Guard(Average(decay=0.5), criterion=agreement), "selection": AllLayers()}
    ),
    "guarded, the default": Scenario(dict),
    "find_unused_parameters": Scenario(
        masked_distillation,
        student={"find_unused_parameters": True},
        teacher={"find_unused_parameters": True},
        spare=True,
    ),
    "static_graph": Scenario(masked_distillation, student={"static_graph": True}, teacher={"static_graph": True}),
    "find_unused_parameters, bare teacher": Scenario(
        masked_distillation, student={"find_unused_parameters": True}, spare=True
    ),
    "static_graph, bare teacher": Scenario(masked_distillation, student={"static_graph": True}),
    "wrapped teacher": Scenario(masked_distillation, teacher={}),
    "co-trained teacher": Scenario(masked_distillation, teacher={}, co_trained=True),
    "co-trained teacher, static_graph": Scenario(masked_distillation, teacher={"static_graph": True}, co_trained=True),
    "co-trained teacher, find_unused_parameters": Scenario(
        masked_distillation,
        student={"find_unused_parameters": True},
        teacher={"find_unused_parameters": True},
        co_trained=True,
        spare=True,
    ),
}


def round_leaves_buffers(rank: int, ranks: int) -> bool:
    """Return whether a round leaves this rank's BatchNorm statistics, where the wrapper would broadcast rank 0's."""
    teacher, student = helpers.networks()
    student.unused.requires_grad_(False)
    host = DistributedDataParallel(student)
    learner = helpers.make_learner(teacher, host)
    target = helpers.batch(rank)
    learner.distill(host(target), target).backward()
    before = helpers.bits(dict(student.named_buffers()))
    learner.step(helpers.sgd(student))
    return bool(helpers.bits(dict(student.named_buffers())) == before)


def work(rank: int, ranks: int, names: List[str]) -> Dict[str, Any]:
    results: Dict[str, Any] = {name: train(rank, ranks, SCENARIOS[name]) for name in names}
    return {**results, "buffers": round_leaves_buffers(rank, ranks)}
