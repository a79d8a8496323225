"""Labels and classes of decoupled distillation."""

import pytest
import torch

from clda_core.distillation import decoupled_distillation, kl_distillation
from tests import reference_distillation as reference
from tests.distillation.cases import flat, pair


@pytest.mark.parametrize(("ignored", "ignore_index"), [(None, None), (255, 255), (-100, -100), (-1, 255), (1, 1)])
def test_decoupled_takes_labels(ignored, ignore_index):
    student, teacher = pair(2, 4, 3)
    labels = torch.tensor([[0, 1, 2], [3, 0, 1]])
    weights = torch.tensor([[1.0, 0.5, 1.0], [1.0, 2.0, 0.0]], dtype=torch.float64)
    kept = weights.clone()
    if ignored is not None:
        labels[0, 0] = ignored
        kept[labels == ignored] = 0
    options = {"labels": labels, "alpha": 2.0, "beta": 0.5, "temperature": 3.0, "ignore_index": ignore_index}
    value = decoupled_distillation(student, teacher, weights, **options)
    expected = reference.decoupled(
        flat(student), flat(teacher), kept.numpy(), 3.0, alpha=2.0, beta=0.5, labels=labels.numpy()
    )
    assert value.item() == pytest.approx(expected, rel=1e-9)


def test_decoupled_with_two_classes_has_the_target_term_only():
    student, teacher = pair(4, 2)
    loss = decoupled_distillation(student, teacher, temperature=2.0, alpha=1.0, beta=100.0)
    assert loss.item() == pytest.approx(kl_distillation(student, teacher, temperature=2.0).item(), rel=1e-9)
