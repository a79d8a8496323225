"""How many operators the learner adds to those of the networks' own passes: each takes time to launch on a GPU."""

from typing import Any, Callable, Dict, List, Optional

import pytest
import torch
from torch import Tensor, nn

from clda_core.layers import Layer
from clda_core.saliency import Fisher, Hessian, Magnitude, PseudoLabelCrossEntropy, Taylor
from clda_core.saliency.scores import score_layers
from clda_core.update import Guard, MaskedDistillation
from clda_core.update.base import Before
from tests.helpers import make_learner, seeded
from tests.update.rounds import round_context

WITHOUT_A_KERNEL = frozenset(
    {
        *("view", "detach", "alias", "slice", "select", "unbind", "split", "t", "transpose", "unsqueeze", "expand"),
        *("_unsafe_view", "_reshape_alias", "empty", "empty_like", "empty_strided"),
    }
)
"""Operators that make views, or memory that nothing is written to."""


def operators(run: Callable[[], Any], *, kernels: bool = True) -> Optional[int]:
    """Count the operators, or those alone that launch a kernel; ``None`` before torch 1.13, which does not tell."""
    try:
        from torch.utils._python_dispatch import TorchDispatchMode
    except ImportError:
        return None
    mode: Any = TorchDispatchMode
    if not hasattr(torch, "_foreach_copy_"):  # before torch 2.1
        return None
    names: List[str] = []

    class Noting(mode):  # type: ignore[misc]
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(str(func).split(".")[1])
            return func(*args, **(kwargs or {}))

    run()  # once before, since the first time finds out what the later ones know
    with Noting():
        run()
    return sum(name not in WITHOUT_A_KERNEL for name in names) if kernels else len(names)


def deep(depth: int) -> nn.Sequential:
    return nn.Sequential(*[nn.Linear(4, 4) for _ in range(depth)])


@pytest.mark.parametrize("estimator", [Taylor(), Fisher(), Hessian(), Magnitude()], ids=repr)
def test_operators_of_scores_go_with_the_layers(estimator: Any) -> None:
    def of(layers: int, parameters: int) -> Optional[int]:
        names = [[f"{layer}.{index}" for index in range(parameters)] for layer in range(layers)]
        every: Dict[str, Tensor] = {name: torch.ones(2, 3) for some in names for name in some}
        grouped = [Layer(str(index), tuple(some), (), 6 * parameters, None) for index, some in enumerate(names)]
        return operators(lambda: score_layers(estimator, grouped, every, every))

    assert of(3, 2) == of(3, 40)
    few, more, most = of(1, 5), of(2, 5), of(5, 5)
    if few is not None and more is not None and most is not None:
        assert most - few == 4 * (more - few) <= 4 * 12


def test_operators_of_an_observation_go_with_the_layers() -> None:
    """Beyond those of a pass by hand."""

    def beyond(depth: int) -> Optional[int]:
        teacher, student = seeded(lambda: deep(depth), 0), seeded(lambda: deep(1), 1)
        learner = make_learner(teacher, student, layers=lambda name: "all")
        inputs = torch.ones(2, 4)

        def by_hand() -> None:
            loss = PseudoLabelCrossEntropy()(teacher(inputs), None)
            torch.autograd.grad(loss, list(teacher.parameters()))

        def observe() -> None:
            learner._rounds._observer.observe(None, "target", inputs, None)

        observe()  # which finds the model's tensors out
        ours, theirs = operators(observe), operators(by_hand)
        return None if ours is None or theirs is None else ours - theirs

    assert beyond(2) == beyond(20)


@pytest.mark.parametrize("guarded", [False, True])
def test_operators_of_the_copies_of_a_round_go_with_the_selected_parameters(guarded: bool) -> None:
    def of(depth: int, selected: int, *, kernels: bool) -> Optional[int]:
        teacher, student = seeded(lambda: deep(depth), 0), seeded(lambda: deep(1), 1)
        update: Any = MaskedDistillation(learning_rate=1e-3)
        update.apply(round_context(teacher, student, inputs=torch.ones(2, 4)))  # every parameter has moments now
        update = Guard(update) if guarded else update
        context = round_context(teacher, student, [str(index) for index in range(selected)])
        return operators(lambda: Before(context, update), kernels=kernels)

    assert of(3, 2, kernels=False) == of(30, 2, kernels=False), "what is not selected costs nothing"
    assert of(30, 2, kernels=True) == of(30, 25, kernels=True), "one kernel copies all of a kind"
    one, more = of(30, 1, kernels=False), of(30, 11, kernels=False)
    if one is not None and more is not None:
        assert more - one == 10 * 2 * 4, "memory for each parameter, two moments and a count of steps"
