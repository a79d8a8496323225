"""Which of the teacher's classes the student's are, where they differ."""

from __future__ import annotations

from typing import Optional, Sequence

import torch
from torch import Tensor

from ..errors import check_number, problem

__all__ = ["check_class_map", "in_students_classes"]


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


def in_students_classes(teacher_logits: Tensor, class_map: Optional[Sequence[int]]) -> Tensor:
    """Return the teacher's logits ``(N, C', ...)`` of the student's classes, ``(N, C, ...)``, with their graph."""
    if class_map is None:
        return teacher_logits
    # No index tensor: it would have to travel to the device.
    return torch.stack([teacher_logits[:, index] for index in class_map], 1)


def check_classes(classes: int, teacher_classes: int, class_map: Optional[Sequence[int]]) -> None:
    """Raise unless logits of so many classes can be compared.

    Raises:
        CldaError: If there are fewer than 2 classes, the class counts differ without a ``class_map``, or it does not
            fit.
    """
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
    elif classes != teacher_classes:
        raise problem(
            "the class counts differ",
            expected="as many classes of the student as of the teacher",
            received=f"{classes} and {teacher_classes}",
            fix="give the KD loss a class_map, distillation=DISTDistillation(class_map=[...]): for each class of the "
            "student the index of the teacher's class; classes that the teacher lacks cannot be distilled",
        )
