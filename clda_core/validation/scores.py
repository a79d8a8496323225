"""The score of a network on target data, without a learner."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Optional

import torch
from torch import Tensor, nn

from .._host.borrowing import borrowed
from .._host.compat import wide
from .._host.ranks import sum_across_ranks, world_size
from ..errors import problem
from ..layers import check_model
from ..outputs import Extract, as_outputs, call_model, check_batches, check_extract, no_batches, owned
from .base import MakesView, Validator, check_statistics, check_validator, score_of

__all__ = ["validate", "validation_statistics"]

View = Callable[[Any], Any]


def validate(
    model: nn.Module,
    batches: Iterable[Any],
    validator: Validator,
    *,
    view: Optional[View] = None,
    extract: Optional[Extract] = None,
) -> float:
    """Return a network's score on target data without labels; higher is better.

    Scores compare only on the same batches and the same views of them.

    Args:
        model: It is only read, and run in eval mode.
        batches: What the model is called with, without labels: each a tuple of arguments, a mapping of keyword
            arguments, or one argument.
        validator: For example :class:`MutualInformation`, or :class:`SoftConsistency` with ``view``.
        view: Makes the second view of a batch: the same images in the same order and place, in other colours, with
            noise or with parts masked out. Let it draw from a generator that starts alike for every network.
        extract: Reads logits from what the model returns.

    Returns:
        The score; NaN if the logits on any batch are not finite, or the validator has seen nothing that it can score.

    Raises:
        CldaError: If there are no batches, the validator needs a view and there is none, an option does not fit, or the
            logits cannot be read or are of another shape on the view.

    Note:
        Leaves modes, ``.grad``, buffers and the global random state as they were, but for what ``view`` draws. Costs
        one forward pass of each batch, two with a view. In a distributed run every process gets the score on the
        batches of all.

    Example:
        >>> from clda_core.validation import MutualInformation
        >>> validate(nn.Identity(), [torch.eye(2) * 99, torch.eye(2) * 99], MutualInformation())
        0.6931471805599453
    """
    return score_of(validator, validation_statistics(model, batches, validator, view=view, extract=extract))


def validation_statistics(
    model: nn.Module,
    batches: Iterable[Any],
    validator: Validator,
    *,
    view: Optional[View] = None,
    extract: Optional[Extract] = None,
) -> Tensor:
    """Return the summed statistics that :func:`validate` scores, for scores by class or sums over more data.

    Args:
        model: As for :func:`validate`.
        batches: As for :func:`validate`.
        validator: As for :func:`validate`.
        view: As for :func:`validate`.
        extract: As for :func:`validate`.

    Returns:
        Shape ``(K,)``, the sum over the batches of all processes.

    Raises:
        CldaError: As :func:`validate`.

    Example:
        >>> from clda_core.validation import HardConsistency
        >>> validator = HardConsistency()
        >>> statistics = validation_statistics(nn.Identity(), [torch.eye(3)], validator, view=lambda x: x[[0, 1, 1]])
        >>> validator.score_by_class(statistics).tolist()
        [1.0, 1.0, 0.0]
    """
    check_validator(validator)
    check_extract(extract)
    check_model("model", model)
    make_view = _view_of(validator, view)
    check_batches("batches", batches)
    total: Optional[Tensor] = None
    for inputs in batches:
        changed = None if make_view is None else make_view(inputs)
        with borrowed(model, doing="validation"):
            logits = owned(as_outputs(call_model(model, inputs), extract, "model")).logits
            on_view = None
            if make_view is not None:
                on_view = as_outputs(call_model(model, changed), extract, "model").logits
            found = check_statistics(validator, validator.statistics(logits, on_view, None), total)
        total = found if total is None else total + found
    return _of_all_ranks(model, total)


def _view_of(validator: Validator, view: Optional[View]) -> Optional[View]:
    """Return what makes the second view, ``None`` for a validator that needs none."""
    if view is not None and not callable(view):
        raise problem(
            "view cannot be called",
            expected="a function of a batch that returns its second view",
            received=type(view).__name__,
            fix="pass for example view=lambda images: images + 0.1 * torch.randn_like(images)",
        )
    name = type(validator).__name__
    if isinstance(validator, MakesView):
        if view is not None:
            raise problem(
                f"{name} makes its second view itself",
                expected="no view",
                received=repr(view),
                fix="leave view= out",
            )
        return validator.view
    if validator.needs_view and view is None:
        raise problem(
            f"{name} compares predictions on two views",
            expected="view=, a function of a batch that returns its second view",
            received="None",
            fix="pass view=, or use a validator that needs none, for example MutualInformation()",
        )
    return view if validator.needs_view else None


def _of_all_ranks(model: nn.Module, total: Optional[Tensor]) -> Tensor:
    """Return the sum over ranks, of which some may have seen no batch.

    Raises:
        CldaError: On every rank, if none has seen one.
    """
    if world_size() > 1:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        form = torch.zeros(2, dtype=torch.float32, device=device if total is None else total.device)
        if total is not None:
            form += torch.tensor([1.0, float(len(total))], device=form.device)
        ranks, lengths = sum_across_ranks([form])[0].tolist()
        if total is None and ranks:
            total = wide(torch.zeros(int(lengths / ranks), device=device))
    if total is None:
        raise no_batches("validate the model on")
    return sum_across_ranks([total])[0]
