"""Exponential averaging of student layers into teacher layers."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping

from torch import Tensor
from typing_extensions import Literal

from .._config import Strategy
from ..errors import check_choice, check_number
from .base import Granularity, RoundContext, UpdateResult
from .writing import blend, pair_tensors, tensors_of

__all__ = ["Average"]


class Average(Strategy):
    r"""Exponential averaging of related student layers into the selected teacher layers.

    :math:`\theta_T \leftarrow (1 - s(1 - d))\,\theta_T + s(1 - d)\,\theta_S` for every parameter of the selected layer
    that the related student layer has under the same local name and in the same shape; :math:`d` is ``decay`` and
    :math:`s` the schedule's strength. What has no counterpart is reported as skipped. The paper's rule is not public;
    this is the plainest reading of it.

    Args:
        decay: :math:`d` in [0, 1]; 1 changes nothing.
        buffers: ``"average"`` treats BatchNorm statistics (floating-point persistent buffers) alike, ``"keep"`` leaves
            the teacher's.
        granularity: ``"parameter"`` moves only non-salient elements; buffers have no saliency and move whole.

    Raises:
        CldaError: If an argument is out of range.

    Note:
        Averaging networks whose bases differ wrecks the teacher. Start the student from the teacher with
        :func:`init_student`, warm up, and put a :class:`~clda_core.update.Guard` around it.

    References:
        Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017, Eq. (1), for the averaging.
    """

    needs_relation = True

    def __init__(
        self,
        *,
        decay: float = 0.99,
        buffers: Literal["keep", "average"] = "keep",
        granularity: Granularity = "layer",
    ) -> None:
        check_number("decay", decay, at_least=0, at_most=1)
        check_choice("buffers", buffers, ("keep", "average"))
        check_choice("granularity", granularity, ("layer", "parameter"))
        self.decay = decay
        self.buffers = buffers
        self.granularity: Granularity = granularity

    def apply(self, context: RoundContext) -> UpdateResult:
        """Average the related student layers into the selected teacher layers, in place."""
        movable = context.movable(self.granularity)
        of_teacher, of_student = tensors_of(context.teacher), tensors_of(context.student)
        targets: Dict[str, Tensor] = {}
        sources: Dict[str, Tensor] = {}
        updated: List[str] = []
        skipped: Dict[str, str] = {}
        for layer in context.layers:
            if layer.name not in context.related:
                skipped[layer.name] = "no related student layer"
                continue
            related = context.related[layer.name]
            pairs, unpaired = pair_tensors(of_teacher, layer, of_student, related, self.buffers == "average")
            skipped.update(unpaired)
            targets.update({name: target for name, (target, _) in pairs.items()})
            sources.update({name: source for name, (_, source) in pairs.items()})
            if pairs:
                updated.append(layer.name)
        blend(targets, sources, (1 - self.decay) * context.strength, movable)
        return UpdateResult(tuple(updated), skipped)

    def state_dict(self) -> Dict[str, Any]:
        """Return nothing: averaging has no state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Accept what :meth:`state_dict` returned."""
