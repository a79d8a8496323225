"""The saliency rates of a model's layers, without a learner."""

from __future__ import annotations

from itertools import chain, repeat
from typing import Any, Dict, Iterable, Optional

from torch import Tensor, nn

from .._host.borrowing import borrowed
from ..layers import LayerGrouping, ModelView, check_model, group_layers
from ..outputs import Extract, as_outputs, call_model, check_batches, check_extract, no_batches
from ..strategy import check_strategies
from .base import Probe, SaliencyEstimator
from .observer import Observer
from .probe import PseudoLabelCrossEntropy
from .taylor import Taylor
from .threshold import MeanThreshold, Threshold

__all__ = ["saliency_rates"]


def saliency_rates(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    saliency: Optional[SaliencyEstimator] = None,
    threshold: Optional[Threshold] = None,
    probe: Optional[Probe] = None,
    layers: Optional[LayerGrouping] = None,
    extract: Optional[Extract] = None,
    source: Optional[Iterable[Any]] = None,
) -> Dict[str, float]:
    r"""Return the saliency rate of every layer of a model, averaged over batches.

    .. math:: \mathrm{LSR}_l = \frac{1}{B} \sum_{b=1}^{B} \frac{1}{|l|} \sum_{k \in l} [\, s_{bk} > \tau_b \,]

    These are the rates that a learner with the same options selects by, had it observed the batches in one round; but
    frozen parameters count here in any case, while a learner leaves those of a partly frozen teacher out.

    Args:
        model: It is only read, and run in eval mode.
        batches: What the model is called with, without labels: each a tuple of arguments, a mapping of keyword
            arguments, or one argument.
        saliency: Scores parameters, :math:`s`; :class:`Taylor` by default.
        threshold: The score above which a parameter is salient, :math:`\tau`; :class:`MeanThreshold` by default.
        probe: The loss on the logits; :class:`PseudoLabelCrossEntropy` by default.
        layers: Regrouping, see :func:`~clda_core.layers.group_layers`.
        extract: Reads logits from what the model returns.
        source: Batches of source data, for a :class:`ReferenceThreshold`: one is read before each of ``batches``, as
            long as there are any.

    Returns:
        Rate by layer name, in the model's order, in [0, 1]. A layer that no loss uses is absent: its rate is unknown.

    Raises:
        CldaError: If there are no batches, an option does not fit, the logits cannot be read, or scores are not finite
            for ten batches in a row; fewer such batches are left out.

    Note:
        Leaves modes, ``requires_grad``, ``.grad``, buffers and the global random state as they were. Peak memory is
        that of one backward pass. In a distributed run every process gets the mean over the batches of all, of which
        each must have equally many.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = model[0].weight.fill_(0.0), model[0].bias.copy_(torch.tensor([1.0, 0.0]))
        ...     _ = model[1].weight.copy_(torch.eye(2))
        >>> saliency_rates(model, [torch.ones(4, 2)])
        {'0': 0.16666666666666666, '1': 0.25}
    """
    saliency = Taylor() if saliency is None else saliency
    threshold = MeanThreshold() if threshold is None else threshold
    chosen: Probe = PseudoLabelCrossEntropy() if probe is None else probe
    check_strategies({"saliency": saliency, "threshold": threshold, "probe": chosen})
    check_extract(extract)
    check_model("model", model)
    for name, given in (("batches", batches), ("source", source)):
        check_batches(name, given)

    def logits(inputs: Any) -> Tensor:
        return as_outputs(call_model(model, inputs), extract, "model").logits

    observer = Observer(ModelView(model, group_layers(model, layers)), saliency, threshold, chosen, logits)

    def observe(domain: str, inputs: Any) -> Any:
        with borrowed(model, doing="saliency rates", passes=False):
            return observer.observe(lambda _: chosen(logits(inputs), None), domain, None, None)

    empty = True
    for inputs, reference in zip(batches, repeat(_NONE) if source is None else chain(source, repeat(_NONE))):
        empty = False
        seen = [] if reference is _NONE else [observe("source", reference)]
        observer.commit([*seen, observe("target", inputs)])
    if empty:
        raise no_batches("observe the model on")
    return observer.rates(renewed=True).target


_NONE = object()
