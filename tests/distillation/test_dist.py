"""Where Pearson's correlation is undefined."""

import pytest
import torch

from clda_core.distillation import dist_distillation


@pytest.mark.parametrize("shape", [(2, 3), (1, 3), (2, 3, 2, 2)], ids=str)
def test_a_teacher_that_does_not_vary_teaches_nothing(shape):
    student = torch.randn(shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = dist_distillation(student, torch.zeros(shape))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_a_student_that_does_not_vary_is_uncorrelated():
    student = torch.full((4, 3), 0.1, requires_grad=True)
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    loss = dist_distillation(student, teacher, inter=1.0, intra=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(3.0)
    assert (student.grad == 0).all()


def test_opposite_relations_are_farthest():
    teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert dist_distillation(-teacher, teacher).item() == pytest.approx(4.0)


def test_each_relation_has_its_weight():
    student, teacher = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    parts = [dist_distillation(student, teacher, inter=a, intra=b).item() for a, b in ((1.0, 0.0), (0.0, 1.0))]
    assert dist_distillation(student, teacher, inter=2.0, intra=0.5).item() == pytest.approx(
        2 * parts[0] + parts[1] / 2
    )
