"""How losses are called and combined."""

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
    decoupled_distillation,
    distillation_loss,
    kl_distillation,
)
from clda_core.distillation.base import valid_mask
from clda_core.outputs import Outputs
from clda_core.strategy import describe
from tests import reference_distillation as reference
from tests.distillation.cases import flat, pair


def outputs(channels=3):
    logits = pair(2, 3, 4, 4, dtype=torch.float32)
    widths = (channels, 5)
    features = [
        torch.randn(2, width, 4, 4, generator=torch.Generator().manual_seed(index))
        for index, width in enumerate(widths)
    ]
    return [Outputs(x, (f,)) for x, f in zip(logits, features)]


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


def test_attention_ignores_maps_without_any_activation():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    loss = attention_transfer(student, torch.zeros(2, 5, 4, 4))
    loss.backward()
    assert loss.item() == 0
    assert (student.grad == 0).all()


def test_weighted_sum_has_the_class_map_of_its_terms():
    mapped = KLDistillation(class_map=[1, 0])
    assert WeightedSum([(1.0, AttentionTransfer()), (1.0, mapped)]).class_map == [1, 0]
    assert WeightedSum([(1.0, WeightedSum([(1.0, mapped)]))]).class_map == [1, 0]
    assert WeightedSum([(1.0, AttentionTransfer())]).class_map is None
    with pytest.raises(CldaError, match="different class maps"):
        WeightedSum([(1.0, mapped), (1.0, KLDistillation(class_map=[0, 1]))])


@pytest.mark.parametrize("ignore_index", [255, -100, 0, -1])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_a_label_map_leaves_out_the_ignore_index_and_what_is_negative(dtype, ignore_index):
    labels = torch.tensor([0, 1, 18, 127, -1, -100, 156, 255, 256]).to(dtype)
    expected = [label != ignore_index and label >= 0 for label in labels.tolist()]
    assert valid_mask(labels, ignore_index).tolist() == expected


def test_bool_and_float_masks_are_weights_whatever_the_ignore_index():
    for mask in (None, torch.tensor([True, False]), torch.tensor([255.0, 0.5])):
        assert valid_mask(mask, 255) is mask
        assert valid_mask(mask, None) is mask


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int64], ids=str)
def test_an_integer_mask_alone_is_ambiguous(dtype):
    with pytest.raises(CldaError, match=r"integer mask is ambiguous.*mask.bool\(\).*ignore_index="):
        valid_mask(torch.ones(2, dtype=dtype), None)


@pytest.mark.parametrize("ignore_index", [1.5, "255", True])
def test_an_ignore_index_is_an_integer(ignore_index):
    with pytest.raises(CldaError, match="ignore_index is not an integer"):
        valid_mask(torch.ones(2, dtype=torch.long), ignore_index)
