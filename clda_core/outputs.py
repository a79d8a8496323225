"""What the learner reads from a model's output, whatever its shape."""

from __future__ import annotations

from typing import (
    Any,
    Callable,
    Iterable,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Union,
)

import torch
from torch import Tensor, nn

from ._host.borrowing import inside_ddp
from .errors import CldaError, problem

__all__ = ["Extract", "Outputs"]


class Outputs(NamedTuple):
    """The tensors of one forward pass that saliency, updates and KD losses read.

    Attributes:
        logits: Shape ``(N, C, ...)``, float, unnormalised class scores; the class dimension is 1.
        features: Intermediate activations ``(N, C_i, ...)`` for feature-based losses, in a fixed order; may be empty.
    """

    logits: Tensor
    features: Tuple[Tensor, ...] = ()


_MANY = (Mapping, tuple, list)

Extract = Callable[[Any], Union[Tensor, Outputs]]
"""Turns whatever a model returns into logits, or into :class:`Outputs` where a loss also reads features."""


def as_outputs(raw: Any, extract: Extract | None, whose: str, *, may_be_empty: bool = False) -> Outputs:
    """Read :class:`Outputs` from a model's raw output.

    Raises:
        CldaError: If the output is no tensor and no ``extract`` was given, ``extract`` returned something else or took
            a part of a tensor for the logits, or there are no samples and ``may_be_empty`` does not allow that.
    """
    if extract is None or isinstance(raw, Outputs):
        value = raw
    else:
        value = _extracted_from_tensor(raw, extract, whose) if isinstance(raw, Tensor) else extract(raw)
    if isinstance(value, Tensor):
        value = Outputs(value)
    if not isinstance(value, Outputs) or not isinstance(value.logits, Tensor) or not _are_tensors(value.features):
        source = "the model" if extract is None else "extract="
        raise problem(
            f"the {whose}'s logits cannot be read",
            expected="a tensor, or clda_core.Outputs with a tensor as logits and a tuple of tensors as features",
            received=f"{value if isinstance(value, Outputs) else type(value).__name__} from {source}",
            fix="pass extract=, a function from the model's output to its logits, to CollaborativeLearner",
        )
    if value.logits.dim() < 2 or not torch.is_floating_point(value.logits):
        raise problem(
            f"the {whose}'s logits have a wrong shape or dtype",
            expected="a floating-point tensor (N, C, ...) with the classes in dimension 1",
            received=f"{value.logits.dtype} of shape {tuple(value.logits.shape)}",
            fix="return unnormalised class scores from the model or from extract=",
        )
    if value.logits.numel() == 0 and not may_be_empty:
        raise problem(
            f"the {whose}'s logits are empty",
            expected="at least one sample",
            received=f"shape {tuple(value.logits.shape)}",
            fix="skip the empty batch",
        )
    return value


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a tuple of positional arguments, a mapping of keyword arguments, or one argument.

    Inside the host's autocast no cast of a weight is taken over from before or left behind: it may be of before an
    update, and where it was made without a graph it gives, before torch 2.0, no gradient.

    Raises:
        CldaError: If the model fails with a ``TypeError``, as for a wrong number of arguments, or the inputs are on
            another device or of another dtype than its parameters; any other exception of the model passes.
    """
    inner = inside_ddp(model)
    torch.clear_autocast_cache()
    try:
        if isinstance(inputs, Mapping):
            return inner(**inputs)
        if isinstance(inputs, tuple):
            return inner(*inputs)
        return inner(inputs)
    except TypeError as error:
        raise problem(
            f"{type(model).__name__} cannot be called with the inputs ({error})",
            expected="what the model is called with, without labels: one argument, a tuple of several, or a mapping",
            received=type(inputs).__name__ + (f" of {len(inputs)}" if isinstance(inputs, _MANY) else ""),
            fix="pass images_t alone, not the whole batch of the loader; several arguments as a tuple, not a list",
        ) from error
    except RuntimeError as error:
        given, own = _placement(_tensors_in(inputs)), _placement(model.parameters())
        if not given or not own or given <= own:
            raise
        raise problem(
            f"{type(model).__name__} cannot be run on the inputs ({error})",
            expected=f"inputs where the model is: {', '.join(sorted(own))}",
            received=", ".join(sorted(given)),
            fix="move the inputs to the model's device and dtype before learner.distill()",
        ) from error
    finally:
        torch.clear_autocast_cache()


def check_batches(name: str, batches: Any) -> None:
    """Raise if one tensor was given where an iterable of batches is expected."""
    if isinstance(batches, Tensor):
        raise problem(
            f"{name} is one tensor, whose items would be taken for batches",
            expected="an iterable of batches",
            received=f"shape {tuple(batches.shape)}",
            fix=f"pass {name}=images.split(32), or a list of batches",
        )


def no_batches(what: str) -> CldaError:
    """Return what to raise where an iterable of batches was empty, so that there is nothing to ``what``."""
    return problem(
        f"there is nothing to {what}",
        expected="at least one batch",
        received="none",
        fix="pass batches as a list or a fresh iterator: one that was read to its end gives nothing",
    )


def stand_in(value: Any) -> Any:
    """Return inputs or :class:`Outputs` of an empty batch with one item of zeros in it, still part of their graph.

    A rank without data so makes every call that the others make, and loses nothing: what it adds counts zero.
    """
    if isinstance(value, Outputs):
        return Outputs(stand_in(value.logits), stand_in(value.features))
    if isinstance(value, Mapping):
        return {name: stand_in(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        items = [stand_in(item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if not isinstance(value, Tensor) or value.dim() == 0 or len(value):
        return value
    return torch.cat([value, value.new_zeros((1, *value.shape[1:]))])


def owned(outputs: Outputs) -> Outputs:
    """Return outputs in memory of their own, without a graph.

    A model replayed as a CUDA graph (``make_graphed_callables``, ``torch.compile(mode="reduce-overhead")``) returns the
    same memory at every call, so its next pass would overwrite what the last one returned.
    """
    return Outputs(outputs.logits.detach().clone(), tuple(feature.detach().clone() for feature in outputs.features))


def without_graph(value: Any) -> Any:
    """Return inputs, or anything else, whose tensors have no graph; containers are made anew."""
    if isinstance(value, Tensor):
        return value.detach() if value.requires_grad else value
    if isinstance(value, Mapping):
        return {name: without_graph(item) for name, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(without_graph(item) for item in value)
    return value


def emptied(outputs: Outputs) -> Outputs:
    """Return outputs without their samples, still part of their graph."""
    return Outputs(outputs.logits[:0], tuple(feature[:0] for feature in outputs.features))


def zero_loss(outputs: Outputs) -> Tensor:
    """Return a loss of 0 with a graph to outputs whose gradient is 0, whatever they hold."""
    nothing = emptied(outputs)
    zero = nothing.logits.sum()
    zero = zero.to(torch.promote_types(zero.dtype, torch.float32))
    return sum((feature.sum().to(zero) for feature in nothing.features), zero)


def _extracted_from_tensor(raw: Tensor, extract: Extract, whose: str) -> Any:
    """Apply ``extract`` to a tensor: it may rearrange it, not take a part of it."""
    cause: Optional[Exception] = None
    try:
        value = extract(raw)
        logits = value.logits if isinstance(value, Outputs) else value
        if not isinstance(logits, Tensor) or (logits.dim() >= raw.dim() and logits.shape[:1] == raw.shape[:1]):
            return value
        received = f"shape {tuple(logits.shape)}"
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        cause, received = error, f"{type(error).__name__}: {error}"
    raise problem(
        f"extract= misreads the {whose}'s output, which is a tensor",
        expected=f"logits of the same samples, from a tensor of shape {tuple(raw.shape)}",
        received=received,
        fix="pass distill() what the models returned, or Outputs(logits) if you have the logits already; where a model "
        "returns another type in eval mode, let extract= read both",
    ) from cause


def _are_tensors(features: Any) -> bool:
    return isinstance(features, (tuple, list)) and all(isinstance(feature, Tensor) for feature in features)


def _tensors_in(inputs: Any) -> List[Tensor]:
    if isinstance(inputs, Mapping):
        return _tensors_in(tuple(inputs.values()))
    if isinstance(inputs, (tuple, list)):
        return [tensor for value in inputs for tensor in _tensors_in(value)]
    return [inputs] if isinstance(inputs, Tensor) else []


def _placement(tensors: Iterable[Tensor]) -> Set[str]:
    return {f"{tensor.dtype} on {tensor.device}" for tensor in tensors if tensor.is_floating_point()}


def check_extract(extract: Any) -> None:
    """Raise unless ``extract`` is a function or ``None``."""
    if extract is not None and not callable(extract):
        raise problem(
            "extract cannot be called",
            expected="a function, or None",
            received=type(extract).__name__,
            fix="pass for example extract=lambda output: output['logits']",
        )
