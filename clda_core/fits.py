"""What a loss can be learnt from: outputs that are refused where they can be seen to be something else."""

from __future__ import annotations

import re
from collections import deque
from typing import Any, Deque, Dict, Iterator, Mapping, Optional, Set

import torch
from torch import Tensor, nn

from ._host.shards import is_sharded
from .errors import problem
from .outputs import Outputs

_NO_CLASSES = ("regression", "multi_label_classification")
"""What transformers calls tasks without one class per position, in ``config.problem_type``."""

_REVERSAL = (
    r"(?i)grad(ient)?s?_?rev|rev(erse)?_?grad|reverse_?layer|reversal"
    r"|^_?grl?(_?(function|layer|func|fn|f))?(?=backward|$)"
)
"""Names of the autograd functions by which adversarial methods reverse a gradient."""


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
    check_unnormalised(outputs.logits, whose)
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


def check_unnormalised(logits: Tensor, whose: str) -> None:
    """Raise on probabilities of classes, as a softmax leaves them; waits for the device.

    Tensors on the meta device have no values to look at.
    """
    if logits.device.type == "meta":
        return
    p = logits.detach().float()
    if bool((p >= 0).all() & ((p.sum(1) - 1).abs().max() < 1e-2)):
        raise problem(
            f"the {whose}'s logits seem to be probabilities",
            expected="unnormalised class scores",
            received="values >= 0 whose sum over the classes is 1 everywhere",
            fix="take the softmax out of the model's output; its logarithm will do: extract=lambda p: p.log()",
        )


def _check_class_dimension(model: nn.Module, logits: Tensor, whose: str) -> None:
    """Raise on logits ``(N, L, C)`` or ``(N, H, W, C)`` of a model whose last layer with a weight has C outputs.

    That layer is the nearest one in the graph; without a graph one that can be it is looked for.
    """
    if not _may_be_last(logits):
        return
    classes, last = logits.shape[1], logits.shape[-1]
    nearest = next((leaf for leaf in map(_parameter, _nodes(logits)) if leaf is not None and leaf.dim() > 1), None)
    made = _widths(model)
    if nearest is not None and not is_sharded(nearest):
        made = {nearest.shape[0]}
    if last in made and classes not in made:
        turned = _TURNED[logits.dim()]
        raise problem(
            f"the {whose}'s logits seem to have their classes in the last dimension",
            expected=f"{_FORMS[logits.dim()]}, the classes in dimension 1",
            received=f"shape {tuple(logits.shape)}, of a model with a layer of {last} outputs",
            fix=f"pass extract=lambda out: out.logits.{turned}, or out.{turned} for a bare tensor; if "
            "dimension 1 does hold the classes, give the logits a further dimension: logits.unsqueeze(-1)",
        )


def _check_channel_dimension(model: nn.Module, feature: Tensor, whose: str) -> None:
    """Raise on features ``(N, L, C)`` or ``(N, H, W, C)`` of a model with layers of C outputs and none of L or H."""
    made = _widths(model)
    if _may_be_last(feature) and feature.shape[-1] in made and feature.shape[1] not in made:
        turned = _TURNED[feature.dim()]
        raise problem(
            f"the {whose}'s features seem to have their channels in the last dimension",
            expected=f"{_FORMS[feature.dim()]}, the channels in dimension 1",
            received=f"shape {tuple(feature.shape)}, of a model with a layer of {feature.shape[-1]} outputs",
            fix=f"pass extract=lambda out: Outputs(out.logits, [x.{turned} for x in out.hidden_states])",
        )


_FORMS = {3: "(N, C, L)", 4: "(N, C, H, W)"}
_TURNED = {3: "transpose(1, 2)", 4: "permute(0, 3, 1, 2)"}


def _may_be_last(tensor: Tensor) -> bool:
    """Return whether the shape alone allows that dimension 1 is one of positions, and the last that of channels.

    Of a grid it does where the other two dimensions are those of a square, or the last one is by far the longest.
    """
    if tensor.dim() == 3:
        return tensor.shape[1] != tensor.shape[2]
    if tensor.dim() != 4:
        return False
    _, height, width, last = tensor.shape
    return last != height and (height == width or last > 4 * max(height, width))


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
