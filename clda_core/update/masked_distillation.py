"""Masked distillation: the student's predictions, the teacher's own and the source teach the selected layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Set, Tuple

import torch
from torch import Tensor, nn
from typing_extensions import Literal

from .._host.borrowing import borrowed
from .._host.compat import has_float64, norms
from .._host.half import unscaled
from .._host.layout import strided
from .._host.own_optimizer import OptimizerFactory, OwnOptimizer
from .._host.ranks import mean_where_seen
from .._host.shards import gradients, here, is_sharded, sum_over_shards
from ..distillation import Distillation, KLDistillation, distillation_loss
from ..errors import CldaError, check_choice, check_number, problem
from ..layers import canonical_parameters
from ..outputs import Outputs
from ..strategy import Strategy
from .base import RoundContext, UpdateResult
from .writing import Weights, check_weights, holding, with_weights

__all__ = ["MaskedDistillation"]


_RATE = 1e-4
"""Of Adam, the highest unless the caller gives another: how far a step may go is a matter of the weights, which differ
less from host to host than learning rates do."""


_Lesson = Tuple[Any, List[Tuple[float, Outputs]]]
"""What the teacher is called with, and the predictions that it learns of that, each with its weight."""


class MaskedDistillation(Strategy):
    r"""Distil the student's predictions into the selected teacher layers, as far as the student is trusted.

    A few steps, of a size that is proportional to the trust :math:`t` in the student (:mod:`clda_core.lead`), on

    .. math:: L(\theta_T) = D(f_T(v; \theta_T), f_S(x)) + \lambda L_\text{source}(\theta_T)

    where :math:`x` is this step's target batch, :math:`v` what the teacher learns on, :math:`D` a distillation loss
    whose target is constant, and :math:`L_\text{source}` the host's supervised loss, where it is given. Every parameter
    outside the selected layers is constant. A student that is not trusted changes nothing.

    With ``own_targets`` the teacher also learns its own prediction on the view :math:`\tilde x` of the batch that
    ``distill`` got, and rounds go on where the student is behind, with steps of full size:

    .. math:: L(\theta_T) = (1 - t)\, D(f_T(\tilde x; \theta_T), f_T(x; \theta_T^0)) + t\, D(f_T(v; \theta_T), f_S(x))
              + \lambda L_\text{source}(\theta_T)

    where :math:`\theta_T^0` is the teacher before its first round, since errors would feed on themselves if each round
    went by what the last has made of it; where the host trains the teacher too, it is the teacher before this round.
    Without a view the first term is left out.

    Both models run in eval mode: BatchNorm statistics stay. The networks need not be related and may differ in every
    shape. The optimizer is the learner's own. The paper speaks of layer-wise relations instead; this functional update
    is ours.

    Args:
        steps: Optimizer steps a round, >= 1.
        learning_rate: Of the default optimizer, Adam, whose steps move every element by about as much; > 0. By default
            1e-4, or less where ``relative_rate`` times that of the host's optimizer is less, if that is of Adam's kind
            and known.
        relative_rate: See ``learning_rate``; > 0.
        learns_on: ``"inputs"``, or ``"view"``: what the teacher sees when it learns the student's prediction, the
            target images as they are or the view of them that ``distill`` got, where it got one.
        own_targets: Whether the teacher learns its own predictions on the view as far as the student is not trusted.
        source_weight: The weight :math:`\lambda` of the source loss that ``distill`` got, >= 0; 0 leaves it out.
        distillation: The loss :math:`D`, called with the teacher in the student's place. Where the learner's KD loss
            has a ``class_map``, the teacher's logits come in the student's classes.
        optimizer: Builds another optimizer from the teacher's parameters, for example
            ``lambda parameters: torch.optim.SGD(parameters, lr=1e-2)``; then neither rate is used.

    Raises:
        CldaError: If an argument is out of range, or ``optimizer`` holds other parameters than it was given; in a
            round, if the source loss is no scalar.

    Note:
        Memory beyond the teacher's activations: gradients and optimizer state of the layers selected so far; with
        ``own_targets`` also what they had before, part of the state, and another copy of them for one forward pass of
        each round. The strength scales the learning rate. A step with a non-finite gradient is not made. On several
        ranks gradients are averaged, so that the teacher stays equal everywhere.

    References:
        Hinton et al., Distilling the Knowledge in a Neural Network, 2015, for :math:`D`; Zhang et al., Deep Mutual
        Learning, CVPR 2018, for teaching in both directions; Xie et al., Unsupervised Data Augmentation, NeurIPS 2020,
        for the prediction on the clean image as the target of the changed one.
    """

    needs_relation = False

    def __init__(
        self,
        *,
        steps: int = 1,
        learning_rate: Optional[float] = None,
        relative_rate: float = 0.1,
        learns_on: Literal["inputs", "view"] = "inputs",
        own_targets: bool = False,
        source_weight: float = 0.0,
        distillation: Optional[Distillation] = None,
        optimizer: Optional[OptimizerFactory] = None,
    ) -> None:
        check_number("steps", steps, at_least=1, integer=True)
        if learning_rate is not None:
            check_number("learning_rate", learning_rate, above=0)
        check_number("relative_rate", relative_rate, above=0)
        check_choice("learns_on", learns_on, ("inputs", "view"))
        check_number("source_weight", source_weight, at_least=0)
        self.steps = steps
        self.learning_rate = learning_rate
        self.relative_rate = relative_rate
        self.learns_on = learns_on
        self.own_targets = own_targets
        self.source_weight = source_weight
        self.distillation = KLDistillation(temperature=1.0) if distillation is None else distillation
        self.optimizer = optimizer
        self._own = OwnOptimizer(_RATE if learning_rate is None else learning_rate, optimizer)
        self._original: Weights = {}
        """What the parameters that were updated had before, for targets of the teacher's own."""

    @property
    def weighs_trust(self) -> bool:
        """With targets of the teacher's own the trust is a weight; else a factor on the steps, which do not shrink."""
        return self.own_targets

    def apply(self, context: RoundContext) -> UpdateResult:
        """Take the steps on this step's target batch."""
        everything = canonical_parameters(context.teacher)
        names = [name for layer in context.layers for name in layer.parameters]
        selected = [everything[name] for name in names]
        self._own.prepare(context.teacher, everything)
        lessons = self._lessons(context)
        self._original = with_weights(self._original, context.teacher, names) if self._goes_by_original(context) else {}
        factor = self._factor(context)
        reached: Set[str] = set()
        reason = "no gradient reaches it"
        if not factor:  # not even moments may move
            reason = "the learning rate of the host's optimizer is 0"
        elif not (lessons or self._supervises(context)):
            reason = "the student is not trusted, and there is neither a view nor a source loss to learn from"
        else:
            for _ in range(self.steps):
                averaged = self._gradients(context, lessons, selected)
                found = {name: gradient for name, gradient in zip(names, averaged) if gradient is not None}
                if not found:
                    break
                if not all_finite(found.values()):
                    reason = "a gradient of the round is not finite"
                    break
                self._own.step(everything, found, factor)
                reached.update(found)
        updated = tuple(layer.name for layer in context.layers if reached.intersection(layer.parameters))
        return UpdateResult(updated, {layer.name: reason for layer in context.layers if layer.name not in updated})

    def _lessons(self, context: RoundContext) -> List[_Lesson]:
        """Return what the teacher learns to predict, and from what."""
        seen = {"view": context.view, "inputs": context.required_inputs()}
        of_student = "inputs" if context.view is None else self.learns_on
        targets: Dict[str, List[Tuple[float, Outputs]]] = {"view": [], "inputs": []}
        if self.own_targets and context.trust < 1 and context.view is not None:
            targets["view"].append((1.0 - context.trust, self._own_prediction(context)))
        weight = context.trust if self.own_targets else 1.0
        if weight > 0:
            targets[of_student].append((weight, context.student_outputs()))
        return [(seen[name], of_one) for name, of_one in targets.items() if of_one]

    def _goes_by_original(self, context: RoundContext) -> bool:
        return self.own_targets and not context.cotrained

    def _own_prediction(self, context: RoundContext) -> Outputs:
        """Return what the teacher predicted on the batch, or would have, before its first round."""
        if not (self._original and self._goes_by_original(context)):
            return context.teacher_outputs()
        with holding(context.teacher, self._original):
            return context.predict(context.teacher)

    def _supervises(self, context: RoundContext) -> bool:
        return context.source_loss is not None and self.source_weight > 0

    def _factor(self, context: RoundContext) -> float:
        """Return what the optimizer's learning rate is multiplied by."""
        if self.learning_rate is not None or self.optimizer is not None or context.learning_rate is None:
            return context.strength
        return context.strength * min(1.0, self.relative_rate * context.learning_rate / _RATE)

    def _gradients(
        self,
        context: RoundContext,
        lessons: Sequence[_Lesson],
        by: Sequence[Tensor],
        *,
        by_all: bool = False,
    ) -> Sequence[Optional[Tensor]]:
        """Return the loss's gradients averaged over ranks; one graph is held at a time.

        ``by_all`` says that every layer is differentiated by, so that the source loss must depend on them.
        """
        found: List[Sequence[Optional[Tensor]]] = []
        with borrowed(context.teacher, grad_to=by) as teacher:
            for seen, targets in lessons:
                prediction = context.forward(context.teacher, seen)
                losses = [
                    weight * distillation_loss(self.distillation, prediction, target, context.mask)
                    for weight, target in targets
                ]
                found.append(_differentiated(sum(losses[1:], losses[0]), by, context.loss_scale))
                del prediction, losses
            if context.source_loss is not None and self._supervises(context):
                loss = context.source_loss(teacher)
                check_scalar(loss)
                if by_all and not loss.requires_grad:
                    raise no_graph()
                found.append(_differentiated(self.source_weight * loss, by, context.loss_scale))
        summed = [_added(of_one) for of_one in zip(*found)]
        return summed if any(map(is_sharded, by)) else mean_where_seen(summed, by)

    def check_teacher(self, teacher: nn.Module) -> None:
        """Raise unless a restored state belongs to this teacher."""
        self._own.check_fits(canonical_parameters(teacher))
        check_weights(teacher, self._original, "the teacher before its first round")

    def rehearse(self, context: RoundContext) -> None:
        """Build the optimizer, differentiate the loss once by every layer, and drop the gradients.

        Raises:
            CldaError: If the update has made rounds of another teacher, none of the layers has a gradient, or the
                source loss does not depend on them.
        """
        everything = canonical_parameters(context.teacher)
        self._own.check_model(context.teacher, everything)
        OwnOptimizer(_RATE, self.optimizer).prepare(context.teacher, everything)
        wanted = [everything[name] for layer in context.layers for name in layer.parameters]
        found = self._gradients(context, self._lessons(replace(context, trust=0.5)), wanted, by_all=True)
        if all(gradient is None for gradient in found):
            raise problem(
                "the update's loss does not depend on the teacher",
                expected="logits with a graph to its parameters",
                received="no gradient for any of them",
                fix="take detach() and no_grad() out of the teacher's forward pass and of extract=",
            )

    def keep(self, context: RoundContext) -> Callable[[], None]:
        """Return what takes the state back; of torch's own optimizers the selected layers' moments are copied."""
        original = self._original
        take_optimizer_back = self._own.keep({name for layer in context.layers for name in layer.parameters})

        def go_back() -> None:
            self._original = original
            take_optimizer_back()

        return go_back

    def state_dict(self) -> Dict[str, Any]:
        """Return the optimizer's state by parameter name, and what updated layers had before their first update.

        Under FSDP2 this rank's part of both, as plain tensors.
        """
        return {**self._own.state_dict(), **({"original": dict(self._original)} if self._original else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` returned; the optimizer's part is applied when the teacher is at hand."""
        original = dict(state.get("original", {}))
        self._own.load_state_dict({name: value for name, value in state.items() if name != "original"})
        self._original = original


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Return whether no element is NaN or infinite, on any rank.

    It synchronises with the device once, and once more if a norm overflows.
    """
    every = list(tensors)
    parts = [torch.view_as_real(part) if part.is_complex() else part for part in map(here, every)]
    # Norms are NaN or infinite where an element is; where finite elements make one overflow, sums in float64 decide.
    if _on_every_rank(torch.isfinite(norms(parts)).all(), every):
        return True
    device = parts[0].device
    precise = torch.float64 if all(has_float64(part.device) for part in parts) else torch.float32
    sums = torch.stack([part.sum(dtype=precise).to(device) for part in parts])
    return _on_every_rank(torch.isfinite(sums).all(), every)


def _on_every_rank(here: Tensor, sharded: Sequence[Tensor]) -> bool:
    return bool(sum_over_shards(1 - here.float(), sharded) == 0) if any(map(is_sharded, sharded)) else bool(here)


def _differentiated(loss: Tensor, parameters: Sequence[Tensor], scale: float) -> Sequence[Optional[Tensor]]:
    """Return this rank's gradients; of sharded parameters those of all ranks."""
    loss = loss if scale == 1 else loss * scale
    if any(map(is_sharded, parameters)):
        return unscaled(gradients(loss, parameters), scale)
    if not loss.requires_grad:  # nothing of what is differentiated by took part
        return [None] * len(parameters)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return unscaled([None if one is None else strided(one) for one in found], scale)


def _added(parts: Sequence[Optional[Tensor]]) -> Optional[Tensor]:
    seen = [part for part in parts if part is not None]
    return None if not seen else sum(seen[1:], seen[0])


def check_scalar(loss: Any) -> None:
    """Raise unless a host's source loss is one."""
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        raise problem(
            "the source loss is no scalar",
            expected="a floating-point tensor without dimensions",
            received=f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__,
            fix="pass distill(source_loss=lambda teacher: F.cross_entropy(teacher(images_s), labels_s))",
        )


def no_graph() -> CldaError:
    """Return what to raise where a source loss has no gradient."""
    return problem(
        "the source loss does not depend on the teacher",
        expected="a loss with a graph to the parameters of the network it is called with",
        received="a tensor that requires no gradient",
        fix="call the network that source_loss= is given, without detach() or no_grad(): "
        "lambda teacher: F.cross_entropy(teacher(images_s), labels_s)",
    )
