"""What the learner demands of its inputs: each check raises before anything is changed."""

from __future__ import annotations

import warnings
from typing import Any, Callable, Dict, Hashable, Iterable, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from ._host.compat import uninitialized
from ._host.shards import check_sharding
from .errors import check_number, problem
from .layers import Layer, canonical_parameters
from .outputs import Outputs
from .relation import ModelView, RelatedLayers
from .strategy import Strategy
from .update import UpdateResult

_STRATEGIES: Mapping[str, Tuple[Sequence[str], Sequence[str], str]] = {
    "saliency": (("score",), ("order",), "Taylor()"),
    "selection": (("__call__", "threshold"), (), "LowestFraction()"),
    "relation": (("__call__",), ("needs_inputs",), "ByRelativeDepth()"),
    "update": (("apply", "state_dict", "load_state_dict"), ("needs_relation",), "Guard(MaskedDistillation())"),
    "distillation": (("__call__",), (), "DISTDistillation()"),
    "schedule": (("due", "observes", "strength"), (), "Schedule(warmup=1000)"),
    "probe": (("__call__",), (), "PseudoLabelCrossEntropy()"),
}
"""By role: the methods a strategy must have, its attributes, and an example."""


def check_strategies(strategies: Mapping[str, Any]) -> None:
    for role, strategy in strategies.items():
        methods, attributes, example = _STRATEGIES[role]
        missing = [name for name in methods if not callable(getattr(strategy, name, None))]
        missing += [name for name in attributes if not hasattr(strategy, name)]
        if missing or isinstance(strategy, type):
            received = (
                repr(strategy) if isinstance(strategy, type) or not missing else f"{strategy!r} without {missing}"
            )
            raise problem(
                f"{role}= is no {role} strategy",
                expected=f"an object with {', '.join([*methods, *attributes])}",
                received=received,
                fix=f"pass an instance, for example {role}={example}",
            )
    if strategies["saliency"].order not in (0, 1, 2):
        raise problem(
            "the order of the saliency estimator is unknown",
            expected="0 (no derivative), 1 (the gradient) or 2 (the Hessian's diagonal)",
            received=repr(strategies["saliency"].order),
            fix="set the class attribute order",
        )


def check_callable(name: str, value: Any) -> None:
    if value is not None and not callable(value):
        raise problem(
            f"{name} cannot be called",
            expected="a function, or None",
            received=type(value).__name__,
            fix=f"pass for example {name}=lambda output: output['logits']",
        )


def check_models(teacher: nn.Module, student: nn.Module) -> None:
    for whose, model in (("teacher", teacher), ("student", student)):
        if not isinstance(model, nn.Module):
            raise problem(
                f"the {whose} is no model",
                expected="a torch.nn.Module",
                received=type(model).__name__,
                fix="call CollaborativeLearner(teacher, student)",
            )
        _check_initialised(whose, model)
        check_sharding(whose, model)


def check_apart(role: str, strategy: Any, models: Sequence[nn.Module]) -> None:
    """Raise if a strategy that is or contains a module has parameters of the host's models among its own."""
    if isinstance(strategy, Strategy) and not isinstance(strategy, nn.Module):
        for part in vars(strategy).values():  # a guard's update and criterion, an update's loss
            check_apart(role, part, models)
        return
    if not isinstance(strategy, nn.Module):
        return
    own = {_identity(parameter) for parameter in strategy.parameters()}
    for whose, model in zip(("teacher", "student"), models):
        shared = [name for name, parameter in canonical_parameters(model).items() if _identity(parameter) in own]
        if own and shared:
            raise problem(
                f"{role}= holds the {whose}'s parameters, so the learner would train and save them as the strategy's",
                expected=f"a module whose parameters() are its own, without the {whose}",
                received=f"{type(strategy).__name__} with {shared[:5]}",
                fix=f"keep the {whose} out of its sub-modules (self.models = [model] hides it from parameters()), or "
                "read features through extract= and Outputs",
            )


def shapes_of(model: nn.Module, layers: Iterable[Layer]) -> Dict[str, Tuple[int, ...]]:
    """Return the shape of every parameter of some layers by canonical name; names that the model lacks are absent."""
    parameters = canonical_parameters(model)
    names = [name for layer in layers for name in layer.parameters]
    return {name: tuple(parameters[name].shape) for name in names if name in parameters}


def check_as_built(whose: str, built: Mapping[str, Tuple[int, ...]], now: Mapping[str, Tuple[int, ...]]) -> None:
    """Raise if a model's parameters have other names or shapes than when the learner was built."""
    for name, shape in built.items():
        if now.get(name) != shape:
            raise problem(
                f"the {whose}'s parameters were renamed, resized or replaced after the learner was built",
                expected=f"{name!r} of shape {shape}",
                received=f"shape {now[name]}" if name in now else "no such parameter",
                fix="prune, parametrize (weight_norm, spectral_norm), add or merge adapters before you build the "
                "learner, or build a new one afterwards",
            )


def _check_initialised(whose: str, model: nn.Module) -> None:
    names = [name for name, parameter in model.named_parameters() if uninitialized(parameter)]
    if names:
        raise problem(
            f"the {whose} has lazy modules, whose parameters have no shape yet",
            expected="a model whose parameters are initialised",
            received=f"uninitialised: {names[:5]}",
            fix="run the model on one batch, under torch.no_grad(), before the learner and the optimizer are built",
        )


def size(model: nn.Module) -> int:
    """Return the number of parameters, those of integer types included."""
    return sum(parameter.numel() for parameter in model.parameters())


def warn_if_swapped(teacher: nn.Module, student: nn.Module) -> None:
    of_teacher, of_student = size(teacher), size(student)
    if of_student > of_teacher:
        warnings.warn(
            f"the student is larger than the teacher: {of_student:,} parameters against {of_teacher:,}. Rounds write "
            "to the teacher: if the two are swapped, pass the big model first",
            stacklevel=3,
        )


def _identity(parameter: Tensor) -> Hashable:
    """Return what two parameters on the same memory have in common, whether or not they are one object."""
    address = 0 if parameter.device.type == "meta" else parameter.data_ptr()
    return (str(parameter.device), address) if address else id(parameter)


def check_mask(mask: Any) -> None:
    if mask is not None and not isinstance(mask, Tensor):
        raise problem(
            "mask is no tensor",
            expected="bool or float weights (N, ...), or an integer label map",
            received=type(mask).__name__,
            fix="pass torch.as_tensor(mask)",
        )


def check_trainable(student: Outputs) -> None:
    """Raise if nothing could be learnt from a loss of these outputs although gradients are enabled."""
    if torch.is_grad_enabled() and not any(part.requires_grad for part in (student.logits, *student.features)):
        raise problem(
            "the student's output has no graph, so the KD loss would train nothing",
            expected="the output of the student that is trained, or a call under torch.no_grad() to read the loss only",
            received="a detached output: of the host EMA, of a frozen model, or made under no_grad()",
            fix="pass what the trained student returned, without detach()",
        )


def check_loss(loss: Any) -> None:
    if loss is not None and not isinstance(loss, Tensor) and not callable(loss):
        raise problem(
            "observe() cannot use this loss",
            expected="a scalar tensor, or a function of the teacher that returns one",
            received=type(loss).__name__,
            fix="call learner.observe(lambda teacher: loss of teacher(x))",
        )


def check_differentiable(value: Any, what: str, fix: str) -> None:
    if not isinstance(value, Tensor) or value.dim() or not value.requires_grad:
        raise problem(
            f"{what} is not a loss that can be differentiated",
            expected="a scalar tensor with a graph to the teacher's parameters",
            received=f"shape {tuple(value.shape)}, requires_grad={value.requires_grad}"
            if isinstance(value, Tensor)
            else type(value).__name__,
            fix=fix,
        )


def check_reached(found: Mapping[str, Optional[Tensor]]) -> None:
    if all(derivative is None for derivative in found.values()):
        raise problem(
            "the observed loss does not depend on the teacher",
            expected="a loss with a graph to at least one of the teacher's parameters",
            received="no gradient for any of them",
            fix="observe a loss computed from the teacher's own forward pass, without detach() or no_grad()",
        )


def check_steppable(
    optimizer: Any, scaler: Any, step_fn: Optional[Callable[[], Any]], stepped: Optional[Callable[[], bool]]
) -> None:
    if stepped is not None and (scaler is not None or not callable(stepped)):
        raise problem(
            "step() cannot ask stepped= whether the step was made",
            expected="a function without arguments, and no scaler=, whose skipped steps are noticed anyway",
            received="a scaler beside it" if scaler is not None else type(stepped).__name__,
            fix="pass one of scaler=scaler and stepped=lambda: not skipped",
        )
    if step_fn is not None:
        if scaler is not None:
            raise problem(
                "step() got both scaler= and step_fn=",
                expected="one of them",
                received="both",
                fix="let step_fn= do the scaler's step too, and say by stepped= whether it was made",
            )
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
    if scaler is not None and not callable(getattr(scaler, "step", None)):
        raise problem(
            "scaler cannot step an optimizer",
            expected="a GradScaler, or None",
            received=type(scaler).__name__,
            fix="pass scaler=torch.cuda.amp.GradScaler(), or leave it out",
        )
    inner = getattr(optimizer, "optimizer", optimizer)  # Accelerate's holds the one that it was made of
    if callable(getattr(inner, "first_step", None)) and callable(getattr(inner, "second_step", None)):
        raise problem(
            f"{type(inner).__name__} makes two steps in one, which step() cannot make for it",
            expected="step_fn= with the SAM optimizer's own step",
            received="the optimizer alone",
            fix="call learner.step(step_fn=lambda: optimizer.second_step(zero_grad=True)), "
            "or observe() before and after_step() after it",
        )


def check_selected(selected: Any, rates: Mapping[str, float]) -> None:
    if not isinstance(selected, (tuple, list)) or not all(isinstance(name, str) and name in rates for name in selected):
        raise problem(
            "the selection returned something else than known layers",
            expected=f"a tuple of names among {list(rates)[:5]}...",
            received=repr(selected),
            fix="return names of layers with a known LSR from selection=",
        )


def check_related(related: Any, teacher: ModelView, student: ModelView, needed: bool) -> None:
    """Raise unless a relation returned layers of both models; at least one pair of them if ``needed``."""
    ours = {layer.name for layer in teacher.layers}
    theirs: Dict[str, Layer] = {layer.name: layer for layer in student.layers}
    if (
        not isinstance(related, RelatedLayers)
        or not set(related.pairs) <= ours
        or not all(isinstance(layer, Layer) and theirs.get(layer.name) == layer for layer in related.pairs.values())
    ):
        raise problem(
            "the relation returned something else than related layers",
            expected="clda_core.relation.RelatedLayers of the teacher's layer names and the student's layers",
            received=repr(related),
            fix="return RelatedLayers({teacher layer name: student layer}, unrelated) from relation=",
        )
    if needed and not related.pairs:
        raise problem(
            "no teacher layer can be related to a student layer",
            expected="at least one related pair of layers",
            received=f"unrelated: {dict(related.unrelated)}",
            fix="pass another relation=, for example Explicit({...}), or an update that needs none",
        )


def check_teacher_of(update: Any, teacher: nn.Module) -> None:
    """Let an update that can tell say whether what it has restored belongs to this teacher."""
    check = getattr(update, "check_teacher", None)
    if check is not None:
        check(teacher)


def check_result(result: Any, selected: Sequence[Layer]) -> None:
    """Raise unless an update returned what it did, to the selected layers alone."""
    if not isinstance(result, UpdateResult) or not set(result.updated) <= {layer.name for layer in selected}:
        raise problem(
            "apply() returned something else",
            expected="an UpdateResult with names of the selected layers",
            received=repr(result),
            fix="return UpdateResult(names of the layers that were written)",
        )


def check_strength(strength: Any) -> None:
    check_number("the schedule's strength", strength, at_least=0, at_most=1)


def check_state(state: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise unless ``state`` fits a learner whose own state is ``own``."""
    if set(state) != set(own):
        raise problem(
            "the state cannot be read",
            expected=f"a state_dict() with the keys {sorted(own)}",
            received=f"the keys {sorted(map(str, state))}",
            fix="load an unchanged state_dict() of a learner",
        )
    config = state["config"] if isinstance(state["config"], Mapping) else {}
    differing = [key for key in own["config"] if config.get(key) != own["config"][key]]
    if differing:
        key = differing[0]
        raise problem(
            f"the state is of another {'architecture' if key.endswith('_layers') else 'configuration'}",
            expected=f"{key}: {own['config'][key]!r}",
            received=f"{key}: {config.get(key)!r}",
            fix="build the learner with the models and strategies the state was saved with",
        )
    if state["relation"] is not None and own["relation"] is not None and state["relation"] != own["relation"]:
        raise problem(
            "the state is of another relation",
            expected=str(own["relation"]),
            received=str(state["relation"]),
            fix="build the learner with the models the state was saved with",
        )
