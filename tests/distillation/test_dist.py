"""Where Pearson's correlation is undefined."""

import numpy as np
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


def test_a_student_that_does_not_vary_is_uncorrelated_and_pulled_towards_the_teacher():
    """As of a head whose weights start at zero; its gradient is that of the covariance with the teacher."""
    student = torch.full((4, 3), 0.1, requires_grad=True)
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    loss = dist_distillation(student, teacher, inter=1.0, intra=2.0)
    loss.backward()
    assert loss.item() == pytest.approx(3.0)

    p, q = teacher.double().softmax(1), torch.full((4, 3), 0.1, dtype=torch.float64, requires_grad=True)
    probability = q.softmax(1)
    covariances = []
    for weight, dim in ((1.0, 1), (2.0, 0)):
        a, b = p - p.mean(dim, keepdim=True), probability - probability.mean(dim, keepdim=True)
        deviation = a.pow(2).mean(dim).sqrt()
        covariances.append(weight * ((a * b).mean(dim) / (deviation / 3)).mean())
    (-sum(covariances)).backward()
    np.testing.assert_allclose(student.grad, q.grad, rtol=1e-5, atol=1e-8)
    assert student.grad.abs().max() > 1e-2


def test_a_head_that_starts_at_zero_learns():
    generator = torch.Generator().manual_seed(0)
    x, teacher = torch.randn(64, 8, generator=generator), 3 * torch.randn(64, 4, generator=generator)
    teacher[:, 0] = 3 * x[:, 0]
    weight = torch.zeros(4, 8, requires_grad=True)
    losses = []
    for _ in range(20):
        loss = dist_distillation(x @ weight.t(), teacher)
        (slope,) = torch.autograd.grad(loss, weight)
        with torch.no_grad():
            weight -= 0.1 * slope
        losses.append(loss.item())
    assert losses[0] == pytest.approx(2.0)
    assert losses[-1] < 1.7


def test_opposite_relations_are_farthest():
    teacher = torch.tensor([[4.0, 0.0], [0.0, 4.0]])
    assert dist_distillation(-teacher, teacher).item() == pytest.approx(4.0)


def test_each_relation_has_its_weight():
    student, teacher = torch.eye(3), torch.eye(3)[[1, 0, 2]]
    parts = [dist_distillation(student, teacher, inter=a, intra=b).item() for a, b in ((1.0, 0.0), (0.0, 1.0))]
    assert dist_distillation(student, teacher, inter=2.0, intra=0.5).item() == pytest.approx(
        2 * parts[0] + parts[1] / 2
    )
