"""Maps without any activation."""

import torch

from clda_core.distillation import attention_transfer


def test_attention_ignores_maps_without_any_activation():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_transfer(student, torch.zeros(2, 5, 4, 4))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()
