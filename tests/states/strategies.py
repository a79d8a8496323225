"""States of learners with every strategy that a version offered, as `training.py` keeps a training of each version.

    PYTHONPATH=../former python tests/states/strategies.py tests/states/version-N-strategies.json

Without the state of the observer's generator, which says nothing here. version-2-strategies.json was written at commit
ffd5f54, before the package's files were moved.
"""

import inspect
import json
import sys
from functools import partial
from typing import Any, Dict

from torch import Tensor, nn

from clda_core import CollaborativeLearner, distillation
from clda_core.selection import LowestFraction
from clda_core.update import Guard, MaskedDistillation
from tests.strategies import CASES

WEIGHED = {
    f"{name} weighed": [("distillation", partial(getattr(distillation, name), weight=0.5))]
    for name in CASES
    if name.endswith(("Distillation", "Transfer")) and name != "MaskedDistillation"
}
"""Losses that had a weight of their own, by the former `weight=`."""


class Net(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.stem = nn.Linear(5, 6)
        self.blocks = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def options(role: str, strategy: Any) -> Dict[str, Any]:
    if role == "threshold" and role not in inspect.signature(CollaborativeLearner.__init__).parameters:
        return {"selection": partial(LowestFraction, threshold=strategy)()}
    if role == "criterion":
        return {"update": Guard(MaskedDistillation(), criterion=strategy)}
    return {role: strategy}


def main(path: str) -> None:
    states = {}
    for name, cases in {**CASES, **WEIGHED}.items():
        for index, (role, make) in enumerate(cases):
            if role != "feature function":
                state = CollaborativeLearner(Net(3), Net(2), **options(role, make())).state_dict()
                del state["observer"]["generator"]
                states[f"{name} {index}"] = state
    with open(path, "w") as file:
        file.write("{\n" + ",\n".join(f"{json.dumps(name)}: {json.dumps(of)}" for name, of in states.items()) + "\n}\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
