"""Which tensors have a row for each class, where a class map gives the student's classes other places."""

from __future__ import annotations

from typing import Any, Callable, Dict, FrozenSet, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .._host.activations import LEAST_ROWS, capturing, positions, rows
from .._host.names import canonical_modules
from .._host.ranks import sum_across_ranks
from ..outputs import Outputs
from .alignment import CorrelationSums

__all__ = ["Classes", "find_classes", "is_logits"]

_SAMPLES = 2048
_SAME = 0.9

MAY_BE_CLASSES = "a dimension of it may be the classes, and its module was not found to make the logits in both models"


class Classes(NamedTuple):
    """Where the classes are in two networks: student class ``i`` is teacher class ``class_map[i]``.

    Attributes:
        class_map: Of a KD loss.
        of_teacher: Names of the modules whose output is the teacher's logits.
        of_student: The same of the student.
    """

    class_map: Tuple[int, ...]
    of_teacher: FrozenSet[str] = frozenset()
    of_student: FrozenSet[str] = frozenset()

    @property
    def places(self) -> Dict[int, int]:
        """Student class by teacher class; of a teacher's class that several of the student's share there is none."""
        return {of: index for index, of in enumerate(self.class_map) if self.class_map.count(of) == 1}

    def concern(self, teacher: Sequence[int], student: Sequence[int]) -> bool:
        """Return whether one of the first two dimensions of two shapes may be the classes, in another order."""
        count, least = len(self.class_map), max(self.class_map) + 1
        if tuple(teacher) == tuple(student) and list(self.class_map) == list(range(count)):
            return False
        return any(big >= least and small == count for big, small in zip(teacher[:2], student[:2]))

    def are_rows(self, teacher_name: str, teacher: Sequence[int], student_name: str, student: Sequence[int]) -> bool:
        """Return whether two tensors, by name and shape, surely have the classes in dimension 0 and nowhere else."""
        if teacher_name.rpartition(".")[0] not in self.of_teacher:
            return False
        if student_name.rpartition(".")[0] not in self.of_student:
            return False
        return self.concern(teacher[:1], student[:1]) and not self.concern(teacher[1:2], student[1:2])

    def in_teachers(self, teacher: Tensor, student: Tensor) -> Tensor:
        """Return the teacher's tensor with the student's row for every class that has one."""
        result, places = teacher.clone(), self.places
        rows_of_teacher, rows_of_student = (
            torch.tensor(list(side), dtype=torch.int64, device=teacher.device) for side in (places, places.values())
        )
        result[rows_of_teacher] = student.to(teacher)[rows_of_student]
        return result

    def in_students(self, teacher: Tensor) -> Tensor:
        """Return the teacher's rows in the order of the student's classes."""
        return teacher[torch.tensor(self.class_map, device=teacher.device)]


def find_classes(
    teacher: nn.Module,
    student: nn.Module,
    run: Callable[[nn.Module], Outputs],
    class_map: Sequence[int],
) -> Optional[Classes]:
    """Find the modules whose output is the logits, by running both models.

    Args:
        teacher: The big model.
        student: The small model.
        run: Runs a model in eval mode, without a graph; the teacher's logits come in the student's classes.
        class_map: For each student class the teacher's.

    Returns:
        ``None`` if the batch is too small to tell. Equal on all ranks.
    """
    of_teacher = _modules_of_logits(teacher, lambda: run(teacher), class_map)
    of_student = _modules_of_logits(student, lambda: run(student), range(len(class_map)))
    if of_teacher is None or of_student is None:
        return None
    return Classes(tuple(class_map), of_teacher, of_student)


def is_logits(output: Tensor, logits: Optional[Tensor]) -> bool:
    """Return whether an activation is the logits, but for its grid and scale: then its channels are the classes.

    Both come from :func:`~clda_core._host.activations.positions`. Classes that vary in neither do not count.
    """
    if logits is None or logits.shape[1] != output.shape[1]:
        return False
    both = rows(output, logits)
    if both is None:
        return False
    sums = CorrelationSums(*sum_across_ranks(CorrelationSums.of(*both)))
    same = sums.correlation().diagonal() > _SAME
    first, second = sums.varying()
    return bool(sums.samples >= LEAST_ROWS) and bool(same.any()) and bool((same | ~(first | second)).all())


def _modules_of_logits(model: nn.Module, run: Callable[[], Outputs], chosen: Sequence[int]) -> Optional[FrozenSet[str]]:
    """Return the names of the modules of which the chosen channels of the output are the logits."""
    least = max(chosen) + 1
    owners = {
        name: module
        for name, module in canonical_modules(model).items()
        if any(parameter.dim() and parameter.shape[0] >= least for parameter in module.parameters(recurse=False))
    }
    found: Dict[str, Optional[Tensor]] = {}

    def read(name: str, module: nn.Module, inputs: Tuple[Any, ...], output: Any) -> None:
        value = positions(output, module, _SAMPLES)
        found[name] = None if value is None or value.shape[1] < least else value[:, list(chosen)].clone()

    with capturing(owners, read):
        logits = positions(run().logits, None, _SAMPLES)
    if logits is None:
        return None
    (count,) = sum_across_ranks([logits.new_tensor([float(logits[:, 0].numel())])])
    if not bool(count >= LEAST_ROWS):
        return None
    names: List[str] = [name for name, value in found.items() if value is not None and is_logits(value, logits)]
    return frozenset(names)
