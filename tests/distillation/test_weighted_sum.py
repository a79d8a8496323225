"""Losses are combined, and weighed, by a sum."""

import pickle

import pytest
import torch

from clda_core import CldaError
from clda_core.distillation import (
    AttentionTransfer,
    FeatureDistillation,
    KLDistillation,
    WeightedSum,
    attention_transfer,
    channel_wise_distillation,
    distillation_loss,
    kl_distillation,
)
from clda_core.distillation.weighted_sum import single_losses
from clda_core.strategy import describe
from tests.distillation.cases import outputs


def test_weighted_sum_adds_up_and_nests():
    student, teacher = outputs()
    inner = WeightedSum([(2.0, AttentionTransfer()), (0.0, channel_wise_distillation)])
    loss = WeightedSum([(0.5, KLDistillation()), (3, inner)])
    expected = 0.5 * kl_distillation(student.logits, teacher.logits)
    expected += 6 * attention_transfer(student.features, teacher.features)
    assert distillation_loss(loss, student, teacher, None).item() == pytest.approx(expected.item())
    assert loss(student, teacher).item() == pytest.approx(expected.item())


def test_weighted_sum_takes_logits_where_no_term_reads_features():
    student, teacher = outputs()
    loss = WeightedSum([(0.5, KLDistillation()), (1.0, channel_wise_distillation)])
    expected = loss(student, teacher)
    assert loss(student.logits, teacher.logits) == expected
    assert pickle.loads(pickle.dumps(loss))(student.logits, teacher.logits) == expected


def test_weighted_sum_owns_the_parameters_of_its_terms():
    student, teacher = outputs()
    loss = WeightedSum([(1.0, KLDistillation()), (1.0, WeightedSum([(1.0, FeatureDistillation())]))])
    assert not list(loss.parameters())
    expected = loss(student, teacher)
    expected.backward()
    assert [tuple(parameter.shape) for parameter in loss.parameters()] == [(5, 3), (5,)]
    assert all(parameter.grad is not None for parameter in loss.parameters())
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(1.0)
    again = WeightedSum([(1.0, KLDistillation()), (1.0, WeightedSum([(1.0, FeatureDistillation())]))])
    again.load_state_dict(loss.state_dict())
    assert again(student, teacher) == loss(student, teacher)


def test_strategies_describe_themselves():
    loss = WeightedSum([(1.0, KLDistillation(temperature=2.0, class_map=[1, 0])), (0.5, FeatureDistillation())])
    described = describe(loss)
    assert described["terms"][0][1]["temperature"] == 2.0
    assert described["terms"][1][1]["project"] == "always"
    assert repr(loss).startswith("WeightedSum(terms=[(1.0, KLDistillation(temperature=2.0, class_map=[1,")


def test_weighted_sum_has_the_class_map_of_its_terms():
    mapped = KLDistillation(class_map=[1, 0])
    assert WeightedSum([(1.0, AttentionTransfer()), (1.0, mapped)]).class_map == [1, 0]
    assert WeightedSum([(1.0, WeightedSum([(1.0, mapped)]))]).class_map == [1, 0]
    assert WeightedSum([(1.0, AttentionTransfer())]).class_map is None
    with pytest.raises(CldaError, match="different class maps"):
        WeightedSum([(1.0, mapped), (1.0, KLDistillation(class_map=[0, 1]))])


def test_the_single_losses_of_a_sum_of_sums():
    kl, features = KLDistillation(), FeatureDistillation()
    inner = WeightedSum([(1.0, features), (1.0, kl_distillation)])
    assert single_losses(WeightedSum([(1.0, kl), (1.0, inner)])) == [kl, features, kl_distillation]
    assert single_losses(kl) == [kl]
