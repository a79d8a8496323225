"""What a distillation loss is, and the preparation of student, teacher and mask that all of ours share."""

from __future__ import annotations

from typing import Any, Callable, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Protocol

from ..errors import check_number, problem
from ..outputs import Outputs
from ..strategy import Strategy

__all__ = ["Distillation", "WeightedSum", "check_values", "distillation_loss"]

_RESIZE_MODES = {1: "linear", 2: "bilinear", 3: "trilinear"}


class Distillation(Protocol):
    """A loss that pulls the student's output towards the teacher's: any callable of three arguments will do.

    A class attribute ``reads`` says what it is called with: ``"logits"`` (also where there is no such attribute) for
    two tensors ``(N, C, ...)``, ``"features"`` for two tuples of tensors, ``"outputs"`` for two
    :class:`~clda_core.outputs.Outputs`. A loss that owns parameters is an ``nn.Module``; the learner trains them.
    Where the networks' classes differ, an attribute ``class_map`` names for each student class the teacher's; rounds
    go by it too.
    """

    def __call__(self, student: Any, teacher: Any, mask: Optional[Tensor] = None, /) -> Tensor:
        """Return a scalar that is differentiable by ``student``.

        Args:
            student: What ``reads`` names, of the student.
            teacher: The same of the teacher, detached.
            mask: ``None``; or which positions count: bool or float weights ``(N,)``, ``(N, ...)`` or ``(N, 1, ...)``
                where ``...`` are the spatial dimensions. Never integers: the learner makes a bool mask of a label map.
        """
        ...


def distillation_loss(
    distillation: Callable[..., Tensor], student: Outputs, teacher: Outputs, mask: Optional[Tensor] = None
) -> Tensor:
    """Call a distillation loss with the part of the outputs that its ``reads`` names; the teacher goes in detached.

    Args:
        distillation: A :class:`Distillation`, or a plain function of student logits, teacher logits and mask.
        student: What was read from the student's forward pass.
        teacher: What was read from the teacher's forward pass.
        mask: As for :class:`Distillation`.

    Returns:
        The loss, a scalar.

    Raises:
        CldaError: If ``reads`` is unknown, or the loss is no floating-point scalar.

    Example:
        >>> outputs = Outputs(torch.zeros(2, 3))
        >>> distillation_loss(lambda s, t, mask=None: (s - t).pow(2).mean(), outputs, outputs).item()
        0.0
    """
    teacher = Outputs(teacher.logits.detach(), tuple(feature.detach() for feature in teacher.features))
    reads = getattr(distillation, "reads", "logits")
    if reads == "outputs":
        loss = distillation(student, teacher, mask)
    elif reads in Outputs._fields:
        loss = distillation(getattr(student, reads), getattr(teacher, reads), mask)
    else:
        raise problem(
            f"{type(distillation).__name__}.reads is unknown",
            expected="'logits', 'features' or 'outputs'",
            received=repr(reads),
            fix="correct the class attribute",
        )
    if not isinstance(loss, Tensor) or loss.dim() or not loss.is_floating_point():
        raise problem(
            "the distillation loss is no scalar",
            expected="a floating-point tensor without dimensions",
            received=f"{loss.dtype} of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__,
            fix="reduce the loss, for example with .mean()",
        )
    return loss


class WeightedSum(Strategy, nn.Module):
    """Several distillation losses at once: ``L = Σ_i w_i · L_i``.

    Args:
        terms: Pairs of a weight >= 0 and a loss; a loss may be a plain function, read features, or be a sum itself.

    Raises:
        CldaError: If ``terms`` is empty or not made of such pairs, or their class maps differ.

    Example:
        >>> from clda_core.distillation import KLDistillation, channel_wise_distillation
        >>> loss = WeightedSum([(1.0, KLDistillation(temperature=1.0)), (3.0, channel_wise_distillation)])
        >>> loss(torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)).item()
        0.0
    """

    reads = "outputs"

    def __init__(self, terms: Sequence[Tuple[float, Callable[..., Tensor]]]) -> None:
        super().__init__()
        terms = list(terms)
        if not terms or not all(isinstance(term, (tuple, list)) and len(term) == 2 for term in terms):
            raise problem(
                "the terms are of a wrong form",
                expected="at least one pair (weight, loss)",
                received=repr(terms),
                fix="pass for example WeightedSum([(1.0, KLDistillation())])",
            )
        for weight, loss in terms:
            check_number("the weight of a term", weight, at_least=0)
            if not callable(loss):
                raise problem(
                    "a term's loss is not callable",
                    expected="a function or an object of student, teacher and mask",
                    received=repr(loss),
                    fix="pass pairs (weight, loss), in this order",
                )
        maps = [of for of in (getattr(loss, "class_map", None) for _, loss in terms) if of is not None]
        if any(list(of) != list(maps[0]) for of in maps):
            raise problem(
                "the terms have different class maps",
                expected="one class_map in all terms that have one",
                received=repr(maps),
                fix="pass the same class_map to each",
            )
        self.class_map: Optional[Sequence[int]] = maps[0] if maps else None
        self.terms = terms
        self.owners = nn.ModuleList([loss for _, loss in terms if isinstance(loss, nn.Module)])

    def forward(
        self, student: Union[Tensor, Outputs], teacher: Union[Tensor, Outputs], mask: Optional[Tensor] = None
    ) -> Tensor:
        """Return the weighted sum; a tensor counts as outputs without features."""
        student = Outputs(student) if isinstance(student, Tensor) else student
        teacher = Outputs(teacher) if isinstance(teacher, Tensor) else teacher
        losses = [weight * distillation_loss(loss, student, teacher, mask) for weight, loss in self.terms]
        return sum(losses[1:], losses[0])


class LogitDistillation(Strategy):
    """What the strategies on logits have in common: their options."""

    def __init__(self, *, temperature: float = 4.0, class_map: Optional[Sequence[int]] = None) -> None:
        check_number("temperature", temperature, above=0)
        check_class_map(class_map)
        self.temperature = temperature
        self.class_map = class_map


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


def align(student: Tensor, teacher: Tensor, mask: Optional[Tensor], *, what: str = "logits") -> Aligned:
    """Bring two tensors ``(N, C, ...)`` to the same positions; of two grids the smaller one is taken.

    Raises:
        CldaError: If ranks, batch sizes or devices differ, a dtype is no floating point, there are no positions, or
            the mask does not fit.
    """
    _check_pair(student, teacher, what)
    teacher = teacher.detach()
    grid = smaller_grid(student, teacher)
    weights = None if mask is None else _mask_weights(mask, student, grid, computing_dtype(student, teacher))
    student, teacher = _resized(student, grid, weights), _resized(teacher, grid, weights)
    return Aligned(
        student.reshape(*student.shape[:2], -1),
        teacher.reshape(*teacher.shape[:2], -1),
        None if weights is None else nearest(weights, grid).reshape(len(weights), -1),
    )


def align_logits(
    student: Tensor, teacher: Tensor, mask: Optional[Tensor], class_map: Optional[Sequence[int]] = None
) -> Aligned:
    """Bring logits to the same positions and classes: student class ``i`` is teacher class ``class_map[i]``.

    Raises:
        CldaError: As :func:`align`; and if the class counts differ without a ``class_map``, or it does not fit.
    """
    _check_pair(student, teacher, "logits")
    classes, teacher_classes = student.shape[1], teacher.shape[1]
    if classes < 2:
        raise problem(
            "there are fewer than 2 classes",
            expected="logits (N, C, ...) with C >= 2",
            received=f"C = {classes}",
            fix="write a binary problem as two logits, for example torch.cat([-x, x], 1) / 2",
        )
    if class_map is not None:
        check_class_map(class_map)
        if len(class_map) != classes or max(class_map) >= teacher_classes:
            raise problem(
                "class_map does not fit the logits",
                expected=f"{classes} teacher classes, each below {teacher_classes}",
                received=repr(list(class_map)),
                fix="pass for each class of the student the index of the teacher's class",
            )
        teacher = in_students_classes(teacher.detach(), class_map)
    elif classes != teacher_classes:
        raise problem(
            "the class counts differ",
            expected="as many classes of the student as of the teacher",
            received=f"{classes} and {teacher_classes}",
            fix="give the KD loss a class_map, distillation=DISTDistillation(class_map=[...]): for each class of the "
            "student the index of the teacher's class; classes that the teacher lacks cannot be distilled",
        )
    return align(student, teacher, mask)


def in_students_classes(teacher_logits: Tensor, class_map: Optional[Sequence[int]]) -> Tensor:
    """Return the teacher's logits ``(N, C', ...)`` of the student's classes, ``(N, C, ...)``, with their graph."""
    if class_map is None:
        return teacher_logits
    # No index tensor: it would have to travel to the device.
    return torch.stack([teacher_logits[:, index] for index in class_map], 1)


def align_features(
    student: Union[Tensor, Sequence[Tensor]], teacher: Union[Tensor, Sequence[Tensor]], mask: Optional[Tensor]
) -> List[Aligned]:
    """Pair features in their order, each pair on the same positions.

    Raises:
        CldaError: As :func:`align`; and if there are no features, or not as many of the one as of the other.
    """
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


def computing_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Return float32, or float64 if either tensor is."""
    return torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)


def smaller_grid(student: Tensor, teacher: Tensor) -> torch.Size:
    """Return the smaller of both spatial sizes, in each dimension."""
    return torch.Size(map(min, student.shape[2:], teacher.shape[2:]))


def weighted_mean(values: Tensor, weights: Optional[Tensor]) -> Tensor:
    """Return ``Σ w·v / Σ w`` over all elements, 0 where all weights are 0; the plain mean without weights."""
    if weights is None:
        return values.mean()
    total = weights.sum()
    return (weights * values).sum() / total.masked_fill(total == 0, 1.0)


def nearest(positions: Tensor, grid: Sequence[int]) -> Tensor:
    """Resize ``(N, *positions)`` to ``(N, *grid)``, taking the value at the centre of each new position.

    ``F.interpolate(mode="nearest")`` takes the corner, which bilinear interpolation of the logits may not even read.
    """
    for dim, size in enumerate(grid, start=1):
        if positions.shape[dim] != size:
            centres = torch.arange(size, dtype=torch.float32, device=positions.device) + 0.5
            positions = positions.index_select(dim, (centres * (positions.shape[dim] / size)).long())
    return positions


def per_position(values: Tensor, like: Tensor, grid: Sequence[int], what: str) -> Tensor:
    """Return a mask or labels as ``(N, *positions)``, on their own grid or on one position a sample.

    Raises:
        CldaError: If the values cannot belong to the positions of ``like`` brought to ``grid``.
    """
    batch, dims = like.shape[0], like.dim() - 2
    if not isinstance(values, Tensor) or values.is_complex():
        raise problem(
            f"the {what} cannot be used",
            expected="a bool, float or integer tensor",
            received=str(values.dtype) if isinstance(values, Tensor) else type(values).__name__,
            fix="pass a tensor on the logits' device",
        )
    if values.device != like.device:
        raise problem(
            f"the {what} and the logits are on different devices",
            expected=str(like.device),
            received=str(values.device),
            fix="move both to one device",
        )
    shape = tuple(values.shape)
    if len(shape) == dims + 2 and shape[1] == 1:
        values = values.squeeze(1)
    elif len(shape) == 1:
        values = values.reshape(-1, *[1] * dims)
    sizes = list(zip(values.shape[1:], grid))
    comparable = all(mine >= its for mine, its in sizes) or all(mine <= its for mine, its in sizes)
    if values.dim() != dims + 1 or len(values) != batch or not values.numel() or not comparable:
        positions = ", ".join(map(str, [batch, *grid]))
        raise problem(
            f"the {what} has a wrong shape",
            expected=f"({batch},) or ({positions}), the latter at any resolution",
            received=f"shape {shape}",
            fix="pass one value a sample, or one a position",
        )
    return values


def check_class_map(class_map: Optional[Sequence[int]]) -> None:
    """Raise :class:`CldaError` unless ``class_map`` is ``None`` or a sequence of plain indices."""
    if class_map is None:
        return
    if not isinstance(class_map, (list, tuple)) or not class_map:
        raise problem(
            "class_map is of a wrong type",
            expected="a list or tuple of int",
            received=repr(class_map),
            fix="pass for each class of the student the index of the teacher's class",
        )
    for index in class_map:
        check_number("class_map's entry", index, at_least=0, integer=True)


def check_values(student: Tensor, teacher: Tensor, mask: Optional[Tensor] = None) -> None:
    """Raise on values no loss can use. Looks only at tensors on the CPU: elsewhere it would wait for the device.

    The losses themselves pass NaN and infinity on, since a step under AMP may overflow and is then skipped.

    Args:
        student: Logits ``(N, C, ...)``.
        teacher: Logits ``(N, C', ...)``, possibly on another grid.
        mask: As for :class:`Distillation`.

    Raises:
        CldaError: If the mask is of integers, every position is ignored, a float mask is negative or not finite, or
            logits at a position that counts are not finite.
    """
    valid_mask(mask, None)
    if not all(tensor.device.type == "cpu" for tensor in (student, teacher, mask) if tensor is not None):
        return
    if mask is not None:
        floating = mask.is_floating_point()
        if floating and not bool((torch.isfinite(mask) & (mask >= 0)).all()):
            raise problem(
                "the mask has negative or non-finite weights",
                expected="finite weights >= 0",
                received=f"between {mask.min().item():g} and {mask.max().item():g}",
                fix="pass weights >= 0, for example the confidence of pseudo-labels",
            )
        if leaves_nothing(mask):
            raise problem(
                "all positions are ignored",
                expected="at least one position that counts",
                received=f"a mask of shape {tuple(mask.shape)} without one",
                fix="skip the batch, or check what made the mask",
            )
    for name, logits in (("student", student), ("teacher", teacher)):
        finite = torch.isfinite(logits.detach())
        if mask is not None and not bool(finite.all()):
            weights = _mask_weights(mask, logits, logits.shape[2:], torch.float32)
            finite = finite | (nearest(weights, logits.shape[2:]) == 0).unsqueeze(1)
        if not bool(finite.all()):
            raise problem(
                f"the {name}'s logits are not finite",
                expected="finite logits at every position that counts",
                received=f"{int((~finite).sum())} NaN or infinite of {finite.numel()}",
                fix=f"look for an overflow in the {name}'s forward pass, or leave these positions out with mask=",
            )


def valid_mask(mask: Optional[Tensor], ignore_index: Optional[int]) -> Optional[Tensor]:
    """Return a mask as the strategies take it: bool or float weights. An integer label map becomes a bool mask.

    A position of a label map counts where its label is neither ``ignore_index`` nor negative, which is never a class.

    Raises:
        CldaError: If the mask is of integers and there is no ``ignore_index``: whether its zeros count, as those of a
            label map do and those of a 0/1 mask do not, cannot be told; or if ``ignore_index`` is no integer.
    """
    if ignore_index is not None:
        check_number("ignore_index", ignore_index, integer=True)
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise problem(
            "mask is no tensor",
            expected="bool or float weights (N, ...), or an integer label map",
            received=type(mask).__name__,
            fix="pass torch.as_tensor(mask)",
        )
    if mask.dtype == torch.bool or mask.is_floating_point() or mask.is_complex():
        return mask
    if ignore_index is None:
        raise problem(
            "an integer mask is ambiguous",
            expected="bool or float weights, or a label map together with ignore_index=",
            received=f"a mask of {mask.dtype} without ignore_index",
            fix="pass mask.bool() if it holds 0 and 1, or ignore_index= (255, -100, ...) if it holds labels",
        )
    labels = mask.detach().long()  # in uint8, -100 would be compared as 156
    return (labels != ignore_index) & (labels >= 0)


def leaves_nothing(mask: Tensor) -> bool:
    """Return whether a mask ignores every position."""
    return not bool((mask != 0).any())


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


def _mask_weights(mask: Tensor, like: Tensor, grid: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the mask as weights ``(N, *positions)`` of which the largest is 1, on its own grid or one a sample."""
    mask = per_position(mask, like, grid, "mask").detach()
    valid_mask(mask, None)
    if mask.dtype == torch.bool:
        return mask.to(dtype)
    mask = mask.to(torch.promote_types(mask.dtype, torch.float32)).masked_fill(~(mask > 0), 0.0)
    largest = mask.max()  # only ratios matter, and the sum of huge weights overflows
    return (mask / largest.masked_fill(largest == 0, 1.0)).to(dtype)


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
