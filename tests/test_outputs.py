"""What is read from a model's output."""

from typing import Any

import pytest
import torch

from clda_core import CldaError, CollaborativeLearner
from tests.helpers import networks


def part_of(output: Any) -> Any:
    return output[0]


@pytest.mark.parametrize("count", [1, 8])
def test_extract_may_not_take_a_part_of_a_bare_tensor(count: int) -> None:
    teacher, student = networks()
    x = torch.randn(count, 5)
    learner = CollaborativeLearner(teacher, student.eval(), extract=part_of)
    with pytest.raises(CldaError, match="extract= misreads the student's output, which is a tensor"):
        learner.distill(student(x), teacher_output=(teacher(x),))
    learner = CollaborativeLearner(teacher, student, extract=lambda output: output.logits)
    with pytest.raises(CldaError, match="extract= misreads.*AttributeError"):
        learner.distill(student(x), x)
    wanted = CollaborativeLearner(teacher, student).distill(student(x), x) if count > 1 else None
    learner = CollaborativeLearner(teacher, student, extract=part_of)
    if wanted is not None:
        assert torch.equal(learner.distill((student(x),), teacher_output=(teacher(x),)), wanted)
