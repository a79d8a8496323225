"""What the learner demands of its inputs: each check raises before anything is changed."""

from __future__ import annotations

from typing import Any, Callable, Mapping, Optional

from torch import nn

from .errors import problem
from .layers import canonical_parameters


def check_models(teacher: nn.Module, student: nn.Module) -> None:
    for whose, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, nn.Module):
            raise problem(
                f"the {whose} is no model",
                expected="a torch.nn.Module",
                received=type(model).__name__,
                fix="call CollaborativeLearner(teacher, student)",
            )
    ours = {id(parameter): name for name, parameter in canonical_parameters(student).items()}
    shared = [name for name, parameter in canonical_parameters(teacher).items() if id(parameter) in ours]
    if shared:
        raise problem(
            "teacher and student share parameters",
            expected="two models without a common parameter",
            received="the same object twice" if teacher is student else f"shared: {shared[:5]}",
            fix="build the student on its own, or start it from the teacher with init_student()",
        )


def check_steppable(optimizer: Any, scaler: Any, step_fn: Optional[Callable[[], Any]]) -> None:
    if step_fn is not None:
        if not callable(step_fn):
            raise problem(
                "step_fn cannot be called",
                expected="a function without arguments",
                received=type(step_fn).__name__,
                fix="pass step_fn=lambda: optimizer.step(closure)",
            )
        return
    if not callable(getattr(optimizer, "step", None)):
        raise problem(
            "there is nothing to step",
            expected="an optimizer with step(), or step_fn=",
            received=type(optimizer).__name__,
            fix="call learner.step(optimizer)",
        )
    if callable(getattr(optimizer, "first_step", None)) and callable(getattr(optimizer, "second_step", None)):
        raise problem(
            f"{type(optimizer).__name__} makes two steps in one, which step() cannot make for it",
            expected="step_fn= with the SAM optimizer's own step",
            received="the optimizer alone",
            fix="call learner.step(step_fn=lambda: optimizer.second_step(zero_grad=True)), "
            "or observe() before and after_step() after it",
        )


def check_selected(selected: Any, rates: Mapping[str, float]) -> None:
    if not isinstance(selected, (tuple, list)) or not all(name in rates for name in selected):
        raise problem(
            "the selection returned something else than known layers",
            expected=f"a tuple of names among {list(rates)[:5]}...",
            received=repr(selected),
            fix="return names of layers with a known LSR from selection=",
        )


def check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless ``state`` fits a learner whose own state is ``own``."""
    if not isinstance(state, Mapping) or state.get("version") != own["version"] or set(state) != set(own):
        version = state.get("version") if isinstance(state, Mapping) else type(state).__name__
        raise problem(
            "the state cannot be read",
            expected=f"a state_dict() of version {own['version']} with the keys {sorted(own)}",
            received=f"version {version!r}",
            fix="load a state that this version of clda-core wrote",
        )
    differing = [key for key in own["config"] if state["config"].get(key) != own["config"][key]]
    if differing:
        key = differing[0]
        raise problem(
            f"the state is of another {'architecture' if key.endswith('_layers') else 'configuration'}",
            expected=f"{key}: {own['config'][key]!r}",
            received=f"{key}: {state['config'].get(key)!r}",
            fix="build the learner with the models and strategies the state was saved with",
        )
    if state["relation"] is not None and own["relation"] is not None and state["relation"] != own["relation"]:
        raise problem(
            "the state is of another relation",
            expected=str(own["relation"]),
            received=str(state["relation"]),
            fix="build the learner with the models the state was saved with",
        )
