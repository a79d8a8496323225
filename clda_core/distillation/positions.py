"""Student and teacher on the same positions: grids are resized, classes mapped, masks made to weights."""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import problem
from .class_map import check_classes, in_students_classes
from .masks import mask_weights, nearest, valid_mask

__all__ = [
    "Aligned",
    "Features",
    "align",
    "align_features",
    "align_logits",
    "check_spatial",
    "computing_dtype",
    "smaller_grid",
]

Features = Union[Tensor, Sequence[Tensor]]
"""One tensor ``(N, C, ...)``, or several."""

_RESIZE_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Aligned(NamedTuple):
    """A student and a teacher tensor on the same positions, and how much each position counts.

    Attributes:
        student: Shape ``(N, C, P)``, as given or wider.
        teacher: Shape ``(N, C', P)``, detached.
        weights: Shape ``(N, P)``, >= 0, in :attr:`dtype`; ``None`` where all count alike.
    """

    student: Tensor
    teacher: Tensor
    weights: Optional[Tensor]

    @property
    def dtype(self) -> torch.dtype:
        """float32, or float64 if either tensor is."""
        return computing_dtype(self.student, self.teacher)

    def full_precision(self) -> Aligned:
        """Return both in :attr:`dtype`, with zeros where a position does not count, so that no NaN gets out of it."""
        student, teacher = self.student.to(self.dtype), self.teacher.to(self.dtype)
        if self.weights is not None:
            ignored = (self.weights == 0).unsqueeze(1)
            student, teacher = student.masked_fill(ignored, 0.0), teacher.masked_fill(ignored, 0.0)
        return Aligned(student, teacher, self.weights)


def align(
    student: Tensor,
    teacher: Tensor,
    mask: Optional[Tensor],
    *,
    ignore_index: Optional[int] = None,
    what: str = "logits",
) -> Aligned:
    """Bring two tensors ``(N, C, ...)`` to the same positions; of two grids the smaller one is taken.

    Raises:
        CldaError: If ranks, batch sizes or devices differ, a dtype is no floating point, there are no positions, or
            the mask does not fit.
    """
    mask = valid_mask(mask, ignore_index)
    _check_pair(student, teacher, what)
    teacher = teacher.detach()
    grid = smaller_grid(student, teacher)
    weights = None if mask is None else mask_weights(mask, student, grid, computing_dtype(student, teacher))
    student, teacher = _resized(student, grid, weights), _resized(teacher, grid, weights)
    return Aligned(
        student.reshape(*student.shape[:2], -1),
        teacher.reshape(*teacher.shape[:2], -1),
        None if weights is None else nearest(weights, grid).reshape(len(weights), -1),
    )


def align_logits(
    student: Tensor,
    teacher: Tensor,
    mask: Optional[Tensor],
    class_map: Optional[Sequence[int]] = None,
    ignore_index: Optional[int] = None,
) -> Aligned:
    """Bring logits to the same positions and classes: student class ``i`` is teacher class ``class_map[i]``.

    Raises:
        CldaError: As :func:`align`; and if the class counts differ without a ``class_map``, or it does not fit.
    """
    mask = valid_mask(mask, ignore_index)
    _check_pair(student, teacher, "logits")
    check_classes(student.shape[1], teacher.shape[1], class_map)
    return align(student, in_students_classes(teacher.detach(), class_map), mask)


def align_features(
    student: Features, teacher: Features, mask: Optional[Tensor], ignore_index: Optional[int] = None
) -> List[Aligned]:
    """Pair features in their order, each pair on the same positions.

    Raises:
        CldaError: As :func:`align`; and if there are no features, or not as many of the one as of the other.
    """
    mask = valid_mask(mask, ignore_index)
    students = [student] if isinstance(student, Tensor) else list(student)
    teachers = [teacher] if isinstance(teacher, Tensor) else list(teacher)
    if not students or len(students) != len(teachers):
        raise problem(
            "the features cannot be paired",
            expected="as many features of the student as of the teacher, at least one",
            received=f"{len(students)} and {len(teachers)}",
            fix="return clda_core.Outputs(logits, features) from extract=",
        )
    pairs = enumerate(zip(students, teachers))
    return [align(s, t, mask, what=f"features[{index}]") for index, (s, t) in pairs]


def check_spatial(tensors: Features, loss: str, fix: str) -> None:
    """Raise :class:`CldaError` unless every tensor has positions beside samples and channels."""
    for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
        if tensor.dim() < 3:
            raise problem(
                f"{loss} needs spatial dimensions",
                expected="tensors (N, C, ...) of an image or sequence",
                received=f"shape {tuple(tensor.shape)}",
                fix=fix,
            )


def computing_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Return float32, or float64 if either tensor is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def smaller_grid(student: Tensor, teacher: Tensor) -> torch.Size:
    """Return the smaller of both spatial sizes, in each dimension."""
    return torch.Size(map(min, student.shape[2:], teacher.shape[2:]))


def _check_pair(student: Tensor, teacher: Tensor, what: str) -> None:
    for name, tensor in (("student", student), ("teacher", teacher)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dim() < 2:
            is_tensor = isinstance(tensor, Tensor)
            raise problem(
                f"the {name}'s {what} cannot be used",
                expected="a floating-point tensor (N, C, ...)",
                received=f"{tensor.dtype} of shape {tuple(tensor.shape)}" if is_tensor else type(tensor).__name__,
                fix="pass the network's float outputs, the channels in dimension 1",
            )
        if tensor.numel() == 0:
            raise problem(
                f"the {name}'s {what} are empty",
                expected="at least one sample, channel and position",
                received=f"shape {tuple(tensor.shape)}",
                fix="skip the empty batch",
            )
    for differs, mine, others, fix in (
        ("ranks", student.dim(), teacher.dim(), "give both the same spatial dimensions"),
        ("batch sizes", student.shape[0], teacher.shape[0], "pass both the outputs for the same samples"),
        ("devices", student.device, teacher.device, "move both to one device"),
    ):
        if mine != others:
            raise problem(
                f"the {differs} of the student's and the teacher's {what} differ",
                expected=f"equal {differs}",
                received=f"{mine} and {others}",
                fix=fix,
            )


def _resized(x: Tensor, grid: torch.Size, weights: Optional[Tensor]) -> Tensor:
    if x.shape[2:] == grid:
        return x
    if len(grid) not in _RESIZE_MODES:
        raise problem(
            "the grids differ and cannot be resized",
            expected=f"the same grid, or 1 to {max(_RESIZE_MODES)} spatial dimensions",
            received=f"shape {tuple(x.shape)}",
            fix="bring both to the same grid",
        )
    x = x.to(computing_dtype(x, x))
    if weights is not None:  # interpolation would spread a NaN over its neighbours
        ignored = (nearest(weights, x.shape[2:]) == 0).unsqueeze(1)
        x = x.masked_fill(ignored & ~torch.isfinite(x), 0.0)
    return F.interpolate(x, size=tuple(grid), mode=_RESIZE_MODES[len(grid)], align_corners=False)
