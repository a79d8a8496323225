"""Optimizers of our own, of updates and of projectors: their state belongs to parameters by name."""

from __future__ import annotations

import functools
import inspect
import weakref
from typing import AbstractSet, Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, cast

import torch
from torch import Tensor, nn

from ..errors import CldaError, problem
from .borrowing import requiring_grad
from .compat import adam, clones, copy_
from .layout import is_dense, laid_out_like
from .plain import copied
from .shards import as_sharded, here, is_sharded, local
from .undo import without_gradients

__all__ = ["OptimizerFactory", "OwnOptimizer"]

OptimizerFactory = Callable[[Iterable[Tensor]], torch.optim.Optimizer]

_KERNELS = ("foreach", "fused")
_LOAD = torch.optim.Optimizer.load_state_dict
_OF_ONE = ("_optimizer", "_names", "_dtypes", "_base_rates", "_model", "_restored")
"""The attributes that are of one optimizer."""


class OwnOptimizer:
    """An optimizer of all of a model's parameters, built when the model is first at hand.

    Gradients and moments are brought to the memory layout of their parameter before every step, since fused kernels
    pair elements by memory. The state is saved by parameter name.

    Args:
        learning_rate: Of Adam.
        factory: Builds another optimizer instead.
        grows: Whether parameters may come and go between steps: those that stay keep their moments. Else it is an
            error. Not with a ``factory``.
    """

    def __init__(
        self, learning_rate: float, factory: Optional[OptimizerFactory] = None, *, grows: bool = False
    ) -> None:
        self._learning_rate = learning_rate
        self._factory = factory
        self._grows = grows
        self._optimizer: Optional[torch.optim.Optimizer] = None
        self._names: List[str] = []
        self._dtypes: List[torch.dtype] = []
        self._base_rates: List[float] = []
        self._model: Optional[weakref.ReferenceType[nn.Module]] = None
        self._restored: Optional[Mapping[str, Any]] = None

    def __getstate__(self) -> Dict[str, Any]:
        """Leave the weak reference to the model out of a pickle."""
        return {**self.__dict__, "_model": None}

    def prepare(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """Return the optimizer of these parameters, built if there is none.

        Where the model's parameters were replaced, or moved to another device or dtype since, the optimizer is built
        anew and the state follows by name.

        Args:
            model: Whose parameters these are.
            parameters: All of them, by name.

        Raises:
            CldaError: If the optimizer is of another model, or the state does not fit these parameters.
        """
        self.check_model(model, parameters)
        optimizer = self._optimizer
        if optimizer is not None and (not _holds(optimizer, parameters) or self._left_behind(optimizer)):
            self._restored, self._optimizer = self.state_dict(), None
        if self._optimizer is None:
            self._optimizer = self._build(parameters)
            self._names = _names_in_order(self._optimizer, parameters)
            self._dtypes = [parameter.dtype for parameter in _held(self._optimizer)]
            self._restored = None
        self._model = weakref.ref(model)
        return self._optimizer

    def step(self, parameters: Mapping[str, Tensor], gradients: Mapping[str, Tensor], strength: float) -> None:
        """Step with these gradients alone; the ``.grad`` of every parameter is as before afterwards.

        Args:
            parameters: Those that :meth:`prepare` was called with.
            gradients: By name, of any layout; a parameter without one is not moved.
            strength: Factor on the learning rate.

        Raises:
            CldaError: If a fused optimizer would get a parameter whose elements do not fill their memory.
        """
        optimizer = cast(torch.optim.Optimizer, self._optimizer)
        _check_kernels(optimizer, {name: parameters[name] for name in gradients})
        with without_gradients(parameters.values()):
            for name, gradient in gradients.items():
                parameter = parameters[name]
                parameter.grad = laid_out_like(gradient, parameter)
                _lay_out_moments(optimizer.state.get(parameter, {}), parameter)
            for group, rate in zip(optimizer.param_groups, self._base_rates):
                group["lr"] = rate * strength
            optimizer.step()

    def keep(self, names: AbstractSet[str]) -> Callable[[], None]:
        """Return what goes back to the present state, if until then no other parameters than these are stepped.

        Their moments are copied. Of an optimizer that may keep something elsewhere the whole state is.
        """
        optimizer = self._optimizer
        if optimizer is None or not _keeps_by_parameter(optimizer):
            return functools.partial(self.load_state_dict, copied(self.state_dict()))
        own = {name: getattr(self, name) for name in _OF_ONE}
        groups = [
            {key: copied(value) for key, value in group.items() if key != "params"} for group in optimizer.param_groups
        ]
        chosen = [parameter for name, parameter in zip(self._names, _held(optimizer)) if name in names]
        moments = {
            parameter: {key: value if isinstance(value, Tensor) else copied(value) for key, value in of_one.items()}
            for parameter, of_one in ((parameter, optimizer.state.get(parameter)) for parameter in chosen)
            if of_one
        }
        tensors = [here(value) for of_one in moments.values() for value in of_one.values() if isinstance(value, Tensor)]
        copies = clones(tensors)

        def go_back() -> None:
            vars(self).update(own)
            for parameter in chosen:
                optimizer.state.pop(parameter, None)
                if parameter in moments:  # the same tensors, whose place others may have taken
                    optimizer.state[parameter] = dict(moments[parameter])
            copy_(tensors, copies)
            for group, before in zip(optimizer.param_groups, groups):
                group.update({key: copied(value) for key, value in before.items()})

        return go_back

    def check_model(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        """Raise if the optimizer was built of another model's parameters, and may not grow."""
        of_another = self._optimizer is not None and not _holds(self._optimizer, parameters)
        if of_another and not self._grows and (self._model is None or self._model() is not model):
            raise problem(
                "the update has an optimizer of another teacher",
                expected=f"one of this teacher's {len(parameters)} parameters, which the first round builds",
                received=f"{type(self._optimizer).__name__} of other parameters, from earlier rounds",
                fix="give every learner an update of its own",
            )

    def check_fits(self, parameters: Mapping[str, Tensor]) -> None:
        """Raise unless a restored state belongs to parameters of these names and shapes."""
        if self._restored is not None:
            _check_shapes(self._restored, parameters)

    def state_dict(self) -> Dict[str, Any]:
        """Return the state by parameter name; under FSDP2 this rank's part of it, as plain tensors."""
        if self._optimizer is None:
            return {} if self._restored is None else dict(self._restored)
        saved = self._optimizer.state_dict()
        state = {
            self._names[index]: {key: local(value) if is_sharded(value) else value for key, value in of_one.items()}
            for index, of_one in saved["state"].items()
        }
        groups = [
            {**group, "params": [self._names[index] for index in group["params"]]} for group in saved["param_groups"]
        ]
        return {
            "optimizer": {"state": state, "param_groups": groups},
            "base_rates": list(self._base_rates),
            "shapes": {
                name: list(here(parameter).shape) for name, parameter in zip(self._names, _held(self._optimizer))
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state; one that is not of the optimizer at hand is applied when the teacher is."""
        if self._optimizer is not None and self._goes_back_to(state):
            return
        self._optimizer = None
        # Optimizers adopt the tensors they load and then write to them.
        self._restored = copied(dict(state)) if state else None

    def _goes_back_to(self, state: Mapping[str, Any]) -> bool:
        """Write a state into the optimizer if it is an earlier one of its own, as where a round is taken back."""
        optimizer = cast(torch.optim.Optimizer, self._optimizer)
        if not state or not _is_by_name(state) or type(optimizer).load_state_dict is not _LOAD:
            return False
        own, saved = self.state_dict(), state["optimizer"]
        moments, earlier = own["optimizer"]["state"], saved["state"]
        same_groups = _names_of(saved) == _names_of(own["optimizer"]) and own["shapes"] == state["shapes"]
        if not same_groups or not all(name in moments and _alike(moments[name], earlier[name]) for name in earlier):
            return False
        with torch.no_grad():
            for name, parameter in zip(self._names, _held(optimizer)):
                if name not in earlier:
                    optimizer.state.pop(parameter, None)
                for key, value in earlier.get(name, {}).items():
                    if isinstance(value, Tensor):
                        moments[name][key].copy_(value)
                    else:
                        optimizer.state[parameter][key] = copied(value)
        for group, before in zip(optimizer.param_groups, saved["param_groups"]):
            group.update({key: copied(value) for key, value in before.items() if key not in ("params", *_KERNELS)})
        self._base_rates = list(state["base_rates"])
        return True

    def _left_behind(self, optimizer: torch.optim.Optimizer) -> bool:
        """Return whether moments stayed where their parameters were, which ``Module.to`` moved without them."""
        if self._dtypes != [parameter.dtype for parameter in _held(optimizer)]:  # moments may have one of their own
            return True
        return any(
            isinstance(value, Tensor) and value.dim() > 0 and value.device != parameter.device
            for parameter, moments in optimizer.state.items()
            for value in moments.values()
        )

    def _build(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        values = list(parameters.values())
        with requiring_grad(values):
            optimizer = adam(values, self._learning_rate) if self._factory is None else self._factory(values)
        if not _holds(optimizer, parameters):
            raise _other_parameters(optimizer, parameters)
        try:
            inspect.signature(optimizer.step).bind()
        except TypeError as error:
            raise problem(
                "the update's optimizer cannot step by gradients alone",
                expected="an optimizer whose step() needs no closure",
                received=f"{type(optimizer).__name__}.step{inspect.signature(optimizer.step)}",
                fix="let optimizer= build one of another kind, for example torch.optim.SGD",
            ) from error
        base_rates = [group["lr"] for group in optimizer.param_groups]
        if self._restored is not None:
            if self._grows and _is_by_name(self._restored):
                self._restored = _of_these(self._restored, parameters)
            optimizer.load_state_dict(_by_position(self._restored, optimizer, parameters))
            base_rates = list(self._restored["base_rates"])
        self._base_rates = base_rates
        return optimizer


def _held(optimizer: torch.optim.Optimizer) -> List[Tensor]:
    """Return an optimizer's parameters in its order; none of what is no optimizer."""
    return [parameter for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]]


def _holds(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> bool:
    return set(map(id, _held(optimizer))) == set(map(id, parameters.values()))


def _keeps_by_parameter(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether a step changes the state of the parameters with a gradient alone: torch's optimizers, but one."""
    kind = type(optimizer)
    return kind.__module__.startswith("torch.optim.") and not isinstance(optimizer, torch.optim.LBFGS)


def _other_parameters(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> CldaError:
    return problem(
        "the update's optimizer does not hold the teacher's parameters",
        expected=f"an optimizer of these {len(parameters)} parameters",
        received=f"{type(optimizer).__name__} of {len(_held(optimizer))}, not the same ones",
        fix="let optimizer= take all the parameters it is given",
    )


def _names_in_order(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> List[str]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    return [names[id(parameter)] for parameter in _held(optimizer)]


def _check_kernels(optimizer: torch.optim.Optimizer, moved: Mapping[str, Tensor]) -> None:
    fused = [group["params"] for group in optimizer.param_groups if group.get("fused")]
    flat = {id(parameter) for held in fused for parameter in held}
    gaps = [name for name, value in moved.items() if id(value) in flat and not is_dense(here(value))]
    if gaps:
        raise problem(
            "a fused optimizer cannot step parameters whose elements do not fill their memory",
            expected="parameters with memory of their own",
            received=f"views or slices: {gaps[:5]}",
            fix="build the optimizer= of the update with fused=False",
        )


def _lay_out_moments(moments: Dict[str, Any], parameter: Tensor) -> None:
    """Bring the moments to the parameter's layout, which may have changed since, or be another one in a checkpoint."""
    strides = None if is_sharded(parameter) else parameter.stride()
    for key, value in moments.items():
        if isinstance(value, Tensor) and value.stride() != strides and value.shape == parameter.shape:
            moments[key] = laid_out_like(value, parameter)


def _names_of(saved: Mapping[str, Any]) -> List[Any]:
    return [group["params"] for group in saved["param_groups"]]


def _alike(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether the moments of one parameter can be copied into others: of equal kinds, shapes and places."""
    return one.keys() == other.keys() and all(_kind(one[key]) == _kind(other[key]) for key in one)


def _kind(value: Any) -> Any:
    return (value.shape, value.dtype, value.device) if isinstance(value, Tensor) else type(value)


def _by_position(
    saved: Mapping[str, Any], optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]
) -> Dict[str, Any]:
    """Return what ``Optimizer.load_state_dict`` takes, with moments sharded like their parameters."""
    names = _names_in_order(optimizer, parameters)
    _check_shapes(saved, parameters, names)
    own, groups = optimizer.state_dict()["param_groups"], saved["optimizer"]["param_groups"]
    if [len(group["params"]) for group in groups] != [len(group["params"]) for group in own]:
        raise _misfit(
            f"{len(own)} groups of {[len(group['params']) for group in own]} parameters",
            f"{len(groups)} groups of {[len(group['params']) for group in groups]}",
        )
    by_name = _is_by_name(saved)
    state: Dict[int, Dict[str, Any]] = {}
    for index, name in enumerate(names):
        of_one = dict(saved["optimizer"]["state"].get(name if by_name else index, {}))
        for key, value in of_one.items():
            if is_sharded(parameters[name]) and isinstance(value, Tensor) and value.dim():
                of_one[key] = as_sharded(value, parameters[name])
        if of_one:
            state[index] = of_one
    merged = []
    for group, ours in zip(groups, own):
        # The kernels of this process: by them torch decides on which device a step count belongs, and another version
        # may have saved a choice that this one lacks.
        options = {key: value for key, value in group.items() if key not in _KERNELS}
        kernels = {key: ours[key] for key in _KERNELS if key in ours}
        merged.append({**options, **kernels, "params": ours["params"]})
    return {"state": state, "param_groups": merged}


def _of_these(saved: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> Dict[str, Any]:
    """Return a saved state of one group for these parameters, with the moments of those that it was saved of."""
    shapes = {name: list(here(parameter).shape) for name, parameter in parameters.items()}
    former, optimizer = saved["shapes"], saved["optimizer"]
    state = {name: of_one for name, of_one in optimizer["state"].items() if former[name] == shapes.get(name)}
    groups = [{**group, "params": list(shapes)} for group in optimizer["param_groups"]]
    return {**saved, "optimizer": {"state": state, "param_groups": groups}, "shapes": shapes}


def _is_by_name(saved: Mapping[str, Any]) -> bool:
    """Return whether a state has names; older ones count the parameters instead."""
    return "shapes" in saved


def _check_shapes(
    saved: Mapping[str, Any], parameters: Mapping[str, Tensor], order: Optional[Sequence[str]] = None
) -> None:
    """Raise unless a saved state belongs to parameters of these names and shapes.

    Args:
        saved: By name, or by position.
        parameters: By name.
        order: Their names in the optimizer's order; for states by position. The model's, if ``None``.
    """
    shapes = {name: tuple(here(parameter).shape) for name, parameter in parameters.items()}
    if _is_by_name(saved):
        received = {name: tuple(shape) for name, shape in saved["shapes"].items()}
        if received != shapes:
            names = [name for name in {**shapes, **received} if shapes.get(name) != received.get(name)]
            raise _misfit(
                str({name: shapes.get(name, "no such parameter") for name in names[:5]}),
                str({name: received.get(name, "no such parameter") for name in names[:5]}),
            )
        return
    names = list(parameters) if order is None else list(order)
    count = sum(len(group["params"]) for group in saved["optimizer"]["param_groups"])
    if count != len(names):
        raise _misfit(f"{len(names)} parameters", f"moments of {count}")
    for index, of_one in saved["optimizer"]["state"].items():
        for key, value in of_one.items():
            if isinstance(value, Tensor) and value.dim() and tuple(value.shape) != shapes[names[index]]:
                raise _misfit(f"{names[index]}: {shapes[names[index]]}", f"{key} of shape {tuple(value.shape)}")


def _misfit(expected: str, received: str) -> CldaError:
    return problem(
        "the saved state of the update's optimizer is of other parameters",
        expected=expected,
        received=received,
        fix="load it into a learner of the teacher it was saved with; under FSDP2 on every rank what that rank saved, "
        "on as many ranks",
    )
