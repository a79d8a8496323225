"""What is asked of an update beyond apply(), and what stands in for it."""

from typing import Any, List

import pytest
from torch import Tensor, nn

from clda_core.outputs import Outputs
from clda_core.update import RoundContext, UpdateResult
from clda_core.update.base import rehearse
from tests.models import mlp
from tests.update.rounds import changed, randomise, round_context, values


class Plain:
    """An update that has nothing but apply(), which a rehearsal must not call."""

    def apply(self, context: RoundContext) -> UpdateResult:
        raise AssertionError("a rehearsal writes nothing")


@pytest.mark.parametrize("broken", ["teacher", "student"])
def test_a_rehearsal_of_an_update_that_has_none_runs_both_models(broken: str) -> None:
    models = {"teacher": randomise(mlp(), 1), "student": randomise(mlp(), 2)}
    before = {name: values(model) for name, model in models.items()}
    runs: List[str] = []

    def forward(model: nn.Module, inputs: Tensor) -> Outputs:
        runs.extend(name for name, one in models.items() if one is model)
        return Outputs(model(inputs))

    def breaks(*_: Any) -> None:
        raise ZeroDivisionError

    context = round_context(*models.values(), inputs=randomise(nn.Linear(5, 40)).weight.detach(), forward=forward)
    rehearse(Plain(), context)
    assert sorted(runs) == ["student", "teacher"]
    handle = models[broken].register_forward_pre_hook(breaks)
    with pytest.raises(ZeroDivisionError):
        rehearse(Plain(), round_context(*models.values(), inputs=context.inputs, forward=forward))
    handle.remove()
    assert not any(changed(model, before[name]) for name, model in models.items())


def test_a_rehearsal_without_inputs_runs_nothing() -> None:
    def forward(*_: Any) -> Outputs:
        raise AssertionError("a model was run")

    rehearse(Plain(), round_context(mlp(), mlp(), forward=forward))
