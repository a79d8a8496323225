"""Observing the teacher: from a loss, or the host's gradients, to the saliency of every layer."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set, Tuple, Union

import torch
from torch import Tensor, nn

from .._host.borrowing import borrowed
from .._host.half import unscaled
from .._host.ranks import mean_across_ranks, mean_where_seen
from .._host.shards import gradients, is_sharded
from .._host.undo import undoing
from ..errors import problem
from ..layers import ModelView, canonical_parameters
from .averages import Averages, LayerRates
from .base import Probe, RandomVectors, SaliencyEstimator, derivatives
from .histogram import Histogram
from .host_gradients import alive, explained, hosts_gradients, leftover_gradients, still_leftover, weakly
from .scores import score_layers
from .threshold import Threshold

__all__ = ["LossOrFunction", "Observation", "Observer"]

LossOrFunction = Union[Tensor, Callable[[nn.Module], Tensor]]
"""What may be observed: a loss with a graph to the teacher, or a function of the teacher that returns one."""


class Observation(NamedTuple):
    """What was seen of one batch.

    Attributes:
        domain: ``"target"`` or ``"source"``.
        histogram: The scores by layer.
        known: The parameters whose saliency is known, by name.
    """

    domain: str
    histogram: Histogram
    known: Set[str]


_DISCARDED_IN_A_ROW = 10


class Observer:
    """Observes one teacher: what was seen at steps that were made is averaged until the round.

    Args:
        view: The teacher and its layers.
        saliency: Scores parameters.
        threshold: Of the LSR.
        probe: Loss on the teacher's logits where neither host nor caller gives gradients.
        logits: Runs the teacher on inputs.

    Attributes:
        averages: The rates of the round in the making, and those of the one before.
        discarded: Observations discarded because they were not finite.
        cotrained: Whether the host was seen to train the teacher.
    """

    def __init__(
        self,
        view: ModelView,
        saliency: SaliencyEstimator,
        threshold: Threshold,
        probe: Probe,
        logits: Callable[[Any], Tensor],
    ) -> None:
        self.averages = Averages()
        self.discarded = 0
        self.cotrained = False
        self._view = view
        self._saliency = saliency
        self._threshold = threshold
        self._probe = probe
        self._logits = logits
        self._generator = torch.Generator().manual_seed(0)
        self._discarded_in_a_row = 0
        self._leftover = leftover_gradients(view.model)
        self._used: Dict[str, Tuple[Any, int]] = {}

    def __getstate__(self) -> Dict[str, Any]:
        # Not every torch copies a generator itself.
        return {**vars(self), "_generator": self._generator.get_state(), "_used": {}}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        vars(self).update(state)
        self._generator = torch.Generator()
        self._generator.set_state(state["_generator"])

    def host_trains_teacher(self) -> bool:
        """Return whether the host left gradients of its own on the teacher."""
        return bool(self._hosts_gradients())

    def observe(
        self,
        loss: Optional[LossOrFunction],
        domain: str,
        inputs: Any,
        mask: Optional[Tensor],
        *,
        loss_scale: float = 1.0,
    ) -> Observation:
        """Score the teacher's parameters on one batch; what is returned counts if :meth:`commit` gets it.

        Args:
            loss: A loss or a function of the teacher; ``None`` for the host's gradients or else the probe.
            domain: ``"target"`` or ``"source"``.
            inputs: The batch for the probe.
            mask: Its mask.
            loss_scale: By what the loss is multiplied before it is differentiated; the derivatives are divided by it.
        """
        parameters = canonical_parameters(self._view.model)
        trained = self.host_trains_teacher()
        found = self._derivatives(loss, domain, inputs, mask, parameters, loss_scale)
        histogram = score_layers(self._saliency, self._view.layers, parameters, found)
        known = {name for name, one in found.items() if one is not None or self._saliency.order == 0}
        self.cotrained |= trained
        return Observation(domain, histogram, known)

    def rehearse(self, inputs: Any, mask: Optional[Tensor]) -> None:
        """Score the teacher's parameters by the probe on a batch, and forget the scores."""
        parameters = canonical_parameters(self._view.model)
        drawn = self._generator.get_state()
        try:
            found = self._derivatives(None, "target", inputs, mask, parameters)
            score_layers(self._saliency, self._view.layers, parameters, found)
        finally:
            self._generator.set_state(drawn)

    def commit(self, pending: Sequence[Observation]) -> bool:
        """Add the observations of a step that was made, and return whether all were finite on every rank.

        Raises:
            CldaError: If the last ten observations were discarded.
        """
        # Source data first: the threshold on target data may refer to it.
        in_order = sorted(pending, key=lambda observation: observation.domain)
        before = self.averages

        def give_back() -> None:
            self.averages = before

        with undoing(give_back, on_error_only=True):
            finite = [self._add(*observation) for observation in in_order]
        return all(finite)

    def rates(self, *, renewed: bool) -> LayerRates:
        """Return the current rates: those observed since the last round, if any were.

        Args:
            renewed: Whether a round needs rates of its own; otherwise it goes by those of the last where none were
                observed since.
        """
        device = next(self._view.model.parameters()).device
        rates = self.averages.rates([layer.name for layer in self._view.layers], device)
        last = self.averages.last
        return rates if rates.target or renewed or last is None else last

    def end_round(self, rates: LayerRates) -> None:
        """Begin the averages anew after a round that went by ``rates``."""
        self.averages = self.averages.after_round(rates)

    def drop_leftover(self) -> None:
        """Let go of gradients from before the learner was built that the host has dropped or written to since."""
        self._leftover = still_leftover(self._view.model, self._leftover)

    def state_dict(self) -> Dict[str, Any]:
        """Return the state as tensors and plain Python types."""
        return {
            "averages": self.averages.state_dict(),
            "generator": self._generator.get_state(),
            "discarded": self.discarded,
            "discarded_in_a_row": self._discarded_in_a_row,
            "cotrained": self.cotrained,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; on an error everything is as before."""
        averages = Averages.restored(state["averages"], len(self._view.layers))
        generator = torch.Generator()
        generator.set_state(state["generator"].to("cpu", torch.uint8))  # map_location may have moved it to a device
        counters = int(state["discarded"]), int(state["discarded_in_a_row"])
        self.averages, self._generator, self.cotrained = averages, generator, bool(state["cotrained"])
        self.discarded, self._discarded_in_a_row = counters

    def _derivatives(
        self,
        loss: Optional[LossOrFunction],
        domain: str,
        inputs: Any,
        mask: Optional[Tensor],
        parameters: Mapping[str, nn.Parameter],
        scale: float = 1.0,
    ) -> Dict[str, Optional[Tensor]]:
        """Return the derivatives the saliency needs, by parameter name, averaged over ranks."""
        order = self._saliency.order
        names = [name for layer in self._view.layers for name in layer.parameters]
        if order == 0:
            return dict.fromkeys(names)
        wanted = [parameters[name] for name in names]
        sharded = any(map(is_sharded, wanted))
        live = self._hosts_gradients() if loss is None and order == 1 else {}
        if live:
            self._used = weakly(leftover_gradients(self._view.model))
            found = [live.get(name) for name in names]
        elif isinstance(loss, Tensor):
            found = unscaled(self._derivatives_of(loss * scale, wanted, sharded), scale)
        else:
            with borrowed(self._view.model, grad_to=wanted) as teacher:
                if loss is None:
                    value = self._probe_loss(domain, inputs, mask)
                else:
                    value = loss(teacher)
                    what = "what the function given to observe() returned"
                    check_differentiable(value, what, "return a scalar from it")
                value = value * scale
                found = self._sharded_gradients(value, wanted) if sharded else self._differentiate(value, wanted)
                found = unscaled(found, scale)
        if not sharded:  # FSDP2 averages by itself
            found = mean_where_seen(found, wanted)
        by_name = dict(zip(names, found))
        check_reached(by_name)
        return by_name

    def _hosts_gradients(self) -> Dict[str, Tensor]:
        """Return the host's gradients, without those observed before: it does not train these parameters any more."""
        return hosts_gradients(self._view.model, {**self._leftover, **alive(self._used)})

    def _sharded_gradients(self, loss: Tensor, wanted: Sequence[Tensor]) -> List[Optional[Tensor]]:
        if self._saliency.order == 2:
            raise problem(
                f"{type(self._saliency).__name__} needs second derivatives, which a sharded teacher does not have",
                expected="a saliency estimator of order 0 or 1 under FSDP2",
                received="one of order 2",
                fix="use Taylor() or Fisher(), or DistributedDataParallel",
            )
        return gradients(loss, wanted)

    def _differentiate(
        self, loss: Tensor, wanted: Sequence[Tensor], *, retain_graph: bool = False
    ) -> List[Optional[Tensor]]:
        saliency = self._saliency
        samples = saliency.samples if isinstance(saliency, RandomVectors) else 1
        with explained(known_only=True):
            return derivatives(
                saliency.order, loss, wanted, self._generator, samples=samples, retain_graph=retain_graph
            )

    def _derivatives_of(self, loss: Tensor, wanted: Sequence[Tensor], sharded: bool) -> List[Optional[Tensor]]:
        fix = "for a frozen teacher pass a function: learner.observe(lambda teacher: loss of teacher(x))"
        check_differentiable(loss, "the loss given to observe()", fix)
        if sharded:
            raise problem(
                "a loss of a sharded teacher cannot be differentiated before the host's backward()",
                expected="a function of the teacher, or gradients that the host's backward() left",
                received="a loss",
                fix="pass a function: learner.observe(lambda teacher: loss of teacher(x))",
            )
        try:
            return self._differentiate(loss, wanted, retain_graph=True)
        except RuntimeError as error:
            if "retain_graph" not in str(error):
                raise
            raise problem(
                "the graph of the loss given to observe() is gone",
                expected="a loss whose graph backward() has not freed",
                received="a freed graph",
                fix="call observe(loss) before loss.backward(), or pass a function of the teacher",
            ) from error

    def _probe_loss(self, domain: str, inputs: Any, mask: Optional[Tensor]) -> Tensor:
        if inputs is None or domain == "source":
            raise problem(
                f"there is nothing to observe on {domain} data",
                expected="this step's inputs passed to distill(), gradients of a co-trained teacher, or a loss",
                received="none of these",
                fix="call learner.distill(student_output, inputs), or observe(lambda teacher: ..., domain=...)",
            )
        loss = self._probe(self._logits(inputs), mask)
        check_differentiable(loss, "what the probe returned", "return a differentiable scalar from probe=")
        return loss

    def _add(self, domain: str, histogram: Histogram, known: Set[str]) -> bool:
        if bool(mean_across_ranks([histogram.finite.float()])[0] == 1):
            self.averages = self.averages.plus(domain, histogram, known, self._threshold)
            self._discarded_in_a_row = 0
            return True
        self.discarded += 1
        self._discarded_in_a_row += 1
        if self._discarded_in_a_row >= _DISCARDED_IN_A_ROW:
            raise problem(
                f"the last {_DISCARDED_IN_A_ROW} observations were all discarded",
                expected="finite teacher gradients",
                received="NaN or infinite ones each time",
                fix="check the teacher's weights and the loss that is observed; under AMP unscale before observe()",
            )
        return False


def check_loss(loss: Any) -> None:
    """Raise unless this may be observed."""
    if loss is not None and not isinstance(loss, Tensor) and not callable(loss):
        raise problem(
            "observe() cannot use this loss",
            expected="a scalar tensor, or a function of the teacher that returns one",
            received=type(loss).__name__,
            fix="call learner.observe(lambda teacher: loss of teacher(x))",
        )


def check_differentiable(value: Any, what: str, fix: str) -> None:
    """Raise unless ``value`` is a scalar with a graph."""
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
    """Raise if no derivative was found."""
    if all(derivative is None for derivative in found.values()):
        raise problem(
            "the observed loss does not depend on the teacher",
            expected="a loss with a graph to at least one of the teacher's parameters",
            received="no gradient for any of them",
            fix="observe a loss computed from the teacher's own forward pass, without detach() or no_grad()",
        )
