"""One run of the launcher in a process of its own, and the facts about it that verify judges.

python -m examples.mic.cls.inspection FACTS.json ARGUMENTS OF examples.mic.cls.train
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence, Tuple
from unittest import mock

import torch

from clda_core import CldaError, group_layers

from . import compatibility, host, train
from .plugin import Plugin
from .teacher import teacher_weights


def inspect(arguments: Sequence[str]) -> Dict[str, Any]:
    """Run the launcher with ``arguments`` and return plain facts."""
    ours, theirs = train.split(list(arguments))
    options = train.parser().parse_args(ours)
    compatibility.apply()
    records: List[Tuple[str, float]] = []
    begun: List[float] = []
    seconds: List[float] = []
    with host.entered(host.find(options.host)):
        meter = importlib.import_module("common.utils.meter").AverageMeter
    update = meter.update

    def recording(self: Any, value: Any, n: int = 1) -> None:
        records.append((self.name, float(value)))
        # Within the host's training "Data" is noted once the batch is there, "Time" at the end of the iteration.
        if self.name == "Data":
            begun.append(_clock())
        elif self.name == "Time" and begun:
            seconds.append(_clock() - begun.pop())
        update(self, value, n)

    with mock.patch.object(meter, "update", recording):
        plugin = train.run(options, theirs)
    return {
        "first_iteration": _first_iteration(records),
        "seconds": sum(seconds[1:]) / max(len(seconds[1:]), 1),
        "peak_mib": _peak_mib(),
        **({} if plugin is None else _facts(plugin, options)),
    }


def _clock() -> float:
    # On the CPU other programs are not to count; a GPU's work takes no CPU time.
    return time.perf_counter() if torch.cuda.is_initialized() else time.process_time()


def _first_iteration(records: Sequence[Tuple[str, float]]) -> Dict[str, float]:
    found: Dict[str, float] = {}
    for name, value in records:
        if name in ("Loss", "Trans Loss", "Cls Acc", "Domain Acc"):
            found.setdefault(name, value)
    return found


def _facts(plugin: Plugin, options: Any) -> Dict[str, Any]:
    learner = plugin.learner
    assert learner is not None
    teacher, student = learner.teacher, learner.student
    stepped = {id(p) for group in getattr(plugin.optimizer, "param_groups", []) for p in group["params"]}
    before = teacher_weights(options.clda_resume or options.clda_teacher)
    after = {name: value.cpu() for name, value in teacher.state_dict().items()}
    layer_of = {name: layer.name for layer in group_layers(teacher) for name in layer.parameters}
    return {
        "student_in_optimizer": all(id(p) in stepped for p in student.parameters()),
        "teacher_in_optimizer": any(id(p) in stepped for p in teacher.parameters()),
        "teacher_trains": any(module.training for module in teacher.modules()),
        "teacher_requires_grad": any(p.requires_grad for p in teacher.parameters()),
        "teacher_device": str(next(teacher.parameters()).device),
        "student_device": str(next(student.parameters()).device),
        "student_hooks": len(student._forward_hooks),
        "teacher_changed": {
            name: layer_of.get(name, "") for name in after if not torch.equal(before[name], after[name])
        },
        "rounds": [
            {"step": record.step, "updated": list(record.updated), "accepted": record.accepted}
            for record in learner.report().rounds
        ],
    }


def _peak_mib() -> float:
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(arguments: Sequence[str]) -> int:
    """Write the facts to the first argument."""
    file = Path(os.path.abspath(arguments[0]))
    try:
        facts = inspect(arguments[1:])
    except CldaError as error:
        print(f"mic-cls: {error}", file=sys.stderr)
        return 2
    file.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
