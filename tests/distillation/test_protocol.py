"""How losses are called, and what they may say about themselves."""

import torch

from clda_core.distillation import AttentionTransfer, KLDistillation, distillation_loss, kl_distillation
from clda_core.distillation.protocol import class_map_of, reads_of
from tests.distillation.cases import outputs


def test_each_loss_gets_what_it_reads():
    student, teacher = outputs()
    mask = torch.tensor([True, False])

    def both(s, t, m):
        return (s.logits - t.logits)[m].pow(2).mean()

    both.reads = "outputs"
    logits = KLDistillation()(student.logits, teacher.logits, mask)
    features = AttentionTransfer()(student.features, teacher.features, mask)
    assert distillation_loss(KLDistillation(), student, teacher, mask) == logits
    assert distillation_loss(kl_distillation, student, teacher, mask) == logits
    assert distillation_loss(AttentionTransfer(), student, teacher, mask) == features
    assert distillation_loss(both, student, teacher, mask) == both(student, teacher, mask)


def test_the_teacher_is_detached_for_any_loss():
    student, teacher = outputs()
    teacher.logits.requires_grad_()
    student.logits.requires_grad_()
    distillation_loss(lambda s, t, m: (s - t).pow(2).mean(), student, teacher, None).backward()
    assert student.logits.grad is not None
    assert teacher.logits.grad is None


def test_a_loss_may_say_what_it_reads_and_whose_classes_it_takes_in_any_way():
    class ByAttribute:
        reads = "features"
        class_map = (1, 0)

    class ByProperty:
        @property
        def reads(self):
            return "outputs"

        @property
        def class_map(self):
            return [0]

    def function(student, teacher, mask=None):
        return (student - teacher).sum()

    losses = ByAttribute(), ByProperty(), function, KLDistillation(class_map=[1]), AttentionTransfer()
    assert [reads_of(loss) for loss in losses] == ["features", "outputs", "logits", "logits", "features"]
    assert [class_map_of(loss) for loss in losses] == [(1, 0), [0], None, [1], None]
    function.reads, function.class_map = "features", [2]
    assert (reads_of(function), class_map_of(function)) == ("features", [2])
