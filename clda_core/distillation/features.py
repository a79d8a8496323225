"""Hint distillation (FitNets): the student's features, projected, match the teacher's."""

from __future__ import annotations

import re
from typing import Any, Mapping, Optional, Sequence, Tuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Literal

from .._host.compat import autocast_off, out_of_inference_mode
from ..errors import check_choice, problem
from ..strategy import Strategy
from .chunked import in_chunks, mean_computed, narrowed, only_first_derivatives, shares
from .positions import Aligned, Features, align_features, computing_dtype

__all__ = ["FeatureDistillation", "feature_distillation"]


def feature_distillation(
    student_features: Features,
    teacher_features: Features,
    mask: Optional[Tensor] = None,
    *,
    ignore_index: Optional[int] = None,
) -> Tensor:
    r"""Mean squared distance of features of equal width.

    ``L = mean_l Σ_i w_i (1/C Σ_c (s_lic - t_lic)²) / Σ_i w_i`` over feature pairs ``l``, positions ``i`` and channels
    ``c``. The source has the sum and a factor ½ in place of the mean over channels and positions, which makes the loss
    depend on the size of the image and the width.

    Args:
        student_features: One tensor ``(N, C, ...)``, or several, paired in order.
        teacher_features: As many, of the same widths; of two grids in a pair the smaller one is taken.
        mask: Bool or float weights or labels, as for :func:`~clda_core.distillation.kl_distillation`.
        ignore_index: The label of positions to leave out, in an integer mask; so is every negative label.

    Returns:
        Scalar, float32 (float64 for float64 features), 0 if no position is valid.

    Raises:
        CldaError: If features cannot be paired, widths differ, or shapes, devices, dtypes or the mask do not fit.

    Note:
        The gradient goes to the student only. Draws no random numbers, has no effect on BatchNorm.

    Example:
        >>> feature_distillation(torch.zeros(2, 3), torch.ones(2, 3)).item()
        1.0

    References:
        Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015, Eq. (3). https://arxiv.org/abs/1412.6550
    """
    return _mean_loss(align_features(student_features, teacher_features, mask, ignore_index))


class FeatureDistillation(Strategy, nn.Module):
    """:func:`feature_distillation` behind projectors (FitNets' regressors) from the student's to the teacher's width.

    A projector is a linear map of the channels, at every position the same (a 1x1 convolution), in float32 or wider.
    The first call makes one a pair, from a generator of its own, where the features are; :meth:`load_state_dict`
    before it makes them from the tensors' shapes. The models are not touched: whoever calls the loss trains its
    ``parameters()``, which exist from then on.

    Args:
        project: ``"always"`` as in the source, or ``"mismatched"`` to compare features of equal width directly.

    Raises:
        CldaError: If an argument is out of range.

    Example:
        >>> loss = FeatureDistillation()
        >>> value = loss((torch.ones(2, 3, 4, 4),), (torch.ones(2, 8, 4, 4),))
        >>> sorted((name, tuple(tensor.shape)) for name, tensor in loss.state_dict().items())
        [('projectors.0.bias', (8,)), ('projectors.0.weight', (8, 3))]
    """

    reads = "features"

    def __init__(self, *, project: Literal["always", "mismatched"] = "always") -> None:
        super().__init__()
        check_choice("project", project, ("always", "mismatched"))
        self.project = project
        self.projectors = nn.ModuleDict()

    def forward(self, student_features: Features, teacher_features: Features, mask: Optional[Tensor] = None) -> Tensor:
        """Return the loss of features, paired in order; the first call makes the projectors."""
        pairs = align_features(student_features, teacher_features, mask)
        return _mean_loss([self._projected(pair, str(index)) for index, pair in enumerate(pairs)])

    def _projected(self, pair: Aligned, key: str) -> Aligned:
        widths = pair.student.shape[1], pair.teacher.shape[1]
        if key not in self.projectors:
            if self.project == "mismatched" and widths[0] == widths[1]:
                return pair
            with out_of_inference_mode():
                self.projectors[key] = _Projector(*widths, seed=int(key))
        pair = pair.full_precision()  # without NaN where nothing counts, for the sake of the projector's gradient
        with out_of_inference_mode():
            projector = cast(_Projector, self.projectors[key].to(pair.student))
        made_for = tuple(projector.weight.shape[::-1])
        if made_for != widths:
            raise problem(
                f"the widths of features[{key}] are not those of its projector",
                expected=f"student {made_for[0]}, teacher {made_for[1]}",
                received=f"student {widths[0]}, teacher {widths[1]}",
                fix="use one FeatureDistillation for one pair of models",
            )
        with autocast_off(pair.student.device.type):
            return pair._replace(student=projector(pair.student))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, weight in state_dict.items():
            match = re.fullmatch(re.escape(prefix) + r"projectors\.(\d+)\.weight", name)
            if match and match.group(1) not in self.projectors:
                self.projectors[match.group(1)] = _Projector(*weight.shape[::-1], seed=0).to(weight)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class _Projector(nn.Module):
    """``nn.Linear`` over the channels of ``(N, C, P)``, except that its start does not come from the host's RNG."""

    def __init__(self, student_width: int, teacher_width: int, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        bound = student_width**-0.5
        weight = torch.empty(teacher_width, student_width, dtype=torch.float32, device="cpu")
        self.weight = nn.Parameter(weight.uniform_(-bound, bound, generator=generator))
        self.bias = nn.Parameter(torch.zeros(teacher_width, dtype=torch.float32, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.transpose(1, 2), self.weight, self.bias).transpose(1, 2)


def _mean_loss(pairs: Sequence[Aligned]) -> Tensor:
    for pair in pairs:
        widths = pair.student.shape[1], pair.teacher.shape[1]
        if widths[0] != widths[1]:
            raise problem(
                "the widths of paired features differ",
                expected="as many channels of the student as of the teacher",
                received=f"{widths[0]} and {widths[1]}",
                fix="use FeatureDistillation, which projects the student's",
            )
    return mean_computed(_MeanSquare, pairs)


class _MeanSquare(torch.autograd.Function):
    """Reads the features in chunks, and again in the backward pass: nothing of their size is kept beside them."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, weights: Optional[Tensor]) -> Tensor:
        share = shares((student.shape[0], student.shape[2]), weights, student)
        mean = share.new_zeros(())
        for chunk, (apart, of_teacher) in in_chunks((student, teacher), weights):
            apart.sub_(of_teacher)
            mean += (apart.pow_(2).mean(1) * share[chunk[0], chunk[2]]).sum()
        ctx.save_for_backward(student, teacher, weights, share)
        return narrowed(mean, computing_dtype(student, teacher))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        only_first_derivatives()
        student, teacher, weights, share = ctx.saved_tensors
        gradient, factor = torch.empty_like(student), share * (upstream * (2 / student.shape[1]))
        for chunk, (apart, of_teacher) in in_chunks((student, teacher), weights):
            gradient[chunk] = apart.sub_(of_teacher).mul_(factor[chunk[0], chunk[2]].unsqueeze(1))
        return gradient, None, None
