"""What the learner reads from a model's output, whatever its shape."""

from __future__ import annotations

import re
from collections import deque
from typing import (
    Any,
    Callable,
    Deque,
    Dict,
    Iterable,
    Iterator,
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
from ._host.shards import is_sharded
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

_NO_CLASSES = ("regression", "multi_label_classification")
"""What transformers calls tasks without one class per position, in ``config.problem_type``."""

_REVERSAL = (
    r"(?i)grad(ient)?s?_?rev|rev(erse)?_?grad|reverse_?layer|reversal"
    r"|^_?grl?(_?(function|layer|func|fn|f))?(?=backward|$)"
)
"""Names of the autograd functions by which adversarial methods reverse a gradient."""

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


def check_trainable(student: Outputs) -> None:
    """Raise if nothing could be learnt from a loss of these outputs although gradients are enabled."""
    if torch.is_grad_enabled() and not any(part.requires_grad for part in (student.logits, *student.features)):
        raise problem(
            "the student's output has no graph, so the KD loss would train nothing",
            expected="the output of the student that is trained, or a call under torch.no_grad() to read the loss only",
            received="a detached output: of the host EMA, of a frozen model, or made under no_grad()",
            fix="pass what the trained student returned, without detach()",
        )


def check_fits(
    model: nn.Module, raw: Any, outputs: Outputs, whose: str, *, of_classes: bool, of_channels: bool
) -> None:
    """Raise where a model's output can be seen to be something else than class scores with the classes in dimension 1.

    So it does for features whose channels are elsewhere.

    Args:
        model: The teacher or the student.
        raw: What it returned.
        outputs: What was read from that.
        whose: ``"teacher"`` or ``"student"``.
        of_classes: Whether a strategy of ours takes the logits for those of classes that exclude each other.
        of_channels: Whether one takes the features for those of channels.
    """
    for feature in outputs.features if of_channels else ():
        _check_channel_dimension(model, feature, whose)
    if not of_classes:
        return
    if hasattr(raw, "pred_boxes") or (isinstance(raw, Mapping) and "pred_boxes" in raw):
        raise problem(
            f"the {whose} detects objects, whose queries are not matched between two models",
            expected="one class per sample or position: (N, C) or (N, C, ...)",
            received=f"an output with pred_boxes, and logits of shape {tuple(outputs.logits.shape)}",
            fix="distil detectors by a KD loss and a probe of your own, on matched queries",
        )
    _check_class_dimension(model, outputs.logits, whose)
    task = getattr(getattr(_bare(model), "config", None), "problem_type", None)
    if task in _NO_CLASSES or outputs.logits.shape[1] == 1:
        received = f"config.problem_type={task!r}" if task in _NO_CLASSES else "one output, as of a regression"
        raise problem(
            f"the {whose}'s outputs are no scores of classes of which one is right",
            expected="single-label classification with C >= 2 classes in dimension 1",
            received=received,
            fix="write a binary problem as two logits, torch.cat([-x, x], 1) / 2; for regression or several labels "
            "pass distillation=, probe= and update= (or its criterion=) of your own",
        )


def check_graph(student: nn.Module, outputs: Outputs) -> bool:
    """Raise if the student's logits lie behind a gradient reversal, as far as the names in their graph tell.

    Returns:
        Whether all parameters in the graph are the student's own; True where that cannot be told.
    """
    names, leaves = set(), []
    for node in _nodes(outputs.logits):
        names.add(type(node).__name__)
        leaf = _parameter(node)
        if leaf is not None:
            leaves.append(leaf)
    reversed_by = sorted(name for name in names if re.search(_REVERSAL, name))
    if reversed_by:
        raise problem(
            "the student's logits lie behind a gradient reversal, so the KD loss would drive them from the teacher's",
            expected="logits whose gradient reaches the student as it is",
            received=f"a graph through {reversed_by}",
            fix="pass distill() the logits of a forward pass without the reversal",
        )
    own = list(student.parameters())
    known = {id(parameter) for parameter in own}
    return any(map(is_sharded, own)) or all(id(leaf) in known for leaf in leaves)


def _check_class_dimension(model: nn.Module, logits: Tensor, whose: str) -> None:
    """Raise on logits ``(N, L, C)`` of a model whose last layer with a weight has C outputs.

    That layer is the nearest one in the graph; without a graph one that can be it is looked for.
    """
    if logits.dim() != 3 or logits.shape[1] == logits.shape[2]:
        return
    _, classes, last = logits.shape
    nearest = next((leaf for leaf in map(_parameter, _nodes(logits)) if leaf is not None and leaf.dim() > 1), None)
    made = _widths(model)
    if nearest is not None and not is_sharded(nearest):
        made = {nearest.shape[0]}
    if last in made and classes not in made:
        raise problem(
            f"the {whose}'s logits seem to have their classes in the last dimension",
            expected="(N, C, L), the classes in dimension 1",
            received=f"shape {tuple(logits.shape)}, of a model with a layer of {last} outputs",
            fix="pass extract=lambda out: out.logits.transpose(1, 2), or out.transpose(1, 2) for a bare tensor; if "
            "dimension 1 does hold the classes, give the logits a further dimension: logits.unsqueeze(-1)",
        )


def _check_channel_dimension(model: nn.Module, feature: Tensor, whose: str) -> None:
    """Raise on features ``(N, L, C)`` of a model with layers of C outputs and none of L."""
    made = _widths(model)
    if feature.dim() == 3 and feature.shape[2] in made and feature.shape[1] not in made:
        raise problem(
            f"the {whose}'s features seem to have their channels in the last dimension",
            expected="(N, C, L), the channels in dimension 1",
            received=f"shape {tuple(feature.shape)}, of a model with a layer of {feature.shape[2]} outputs",
            fix="pass extract=lambda out: Outputs(out.logits, [x.transpose(1, 2) for x in out.hidden_states])",
        )


def _widths(model: nn.Module) -> Set[Optional[int]]:
    """Return how many features or channels the layers of a model put out, as far as they say so."""
    return {getattr(module, "out_features", getattr(module, "out_channels", None)) for module in model.modules()}


def _parameter(node: Any) -> Optional[nn.Parameter]:
    variable = getattr(node, "variable", None)
    return variable if isinstance(variable, nn.Parameter) else None


def _bare(model: nn.Module) -> nn.Module:
    """Return the model inside the wrappers of compilation and of parallel training."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__.endswith("DataParallel"):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def _nodes(tensor: Tensor) -> Iterator[Any]:
    """Go through the graph behind a tensor, each node once, the nearest first."""
    seen: Dict[int, Any] = {}  # which keeps them: a node that is dropped may come back under another id
    waiting: Deque[Any] = deque([tensor.grad_fn])
    while waiting:
        node = waiting.popleft()
        if node is None or id(node) in seen:
            continue
        seen[id(node)] = node
        yield node
        waiting.extend(parent for parent, _ in node.next_functions)
