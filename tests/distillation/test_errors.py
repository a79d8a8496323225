"""Every wrong input of the losses, each with a message that says what is wrong."""

import pytest
import torch

from clda_core.distillation import (
    AttentionTransfer,
    ChannelWiseDistillation,
    DecoupledDistillation,
    DISTDistillation,
    FeatureDistillation,
    KLDistillation,
    WeightedSum,
    attention_transfer,
    channel_wise_distillation,
    check_values,
    decoupled_distillation,
    dist_distillation,
    distillation_loss,
    feature_distillation,
    kl_distillation,
)
from clda_core.errors import CldaError
from clda_core.outputs import Outputs
from tests.distillation.cases import LOGIT_LOSSES, LOSSES

X = torch.zeros(2, 3, 4, 5)
BAD_INPUTS = {
    "ranks": (X, X[..., 0], None, "ranks .* differ"),
    "batch sizes": (X, X[:1], None, "batch sizes .* differ"),
    "integers": (X, X.long(), None, "teacher's .* cannot be used.*torch.int64"),
    "no tensor": ([1.0], [1.0], None, "student's .* cannot be used"),
    "too few dimensions": (X[0, 0, 0], X[0, 0, 0], None, "student's .* cannot be used"),
    "empty batch": (X[:0], X[:0], None, "student's .* are empty"),
    "mask rank": (X, X, torch.ones(2, 4), "mask has a wrong shape"),
    "mask batch": (X, X, torch.ones(3, 4, 5), "mask has a wrong shape"),
    "mask of the batch alone": (X, X, torch.ones(3), "mask has a wrong shape"),
    "mask channels": (X, X, torch.ones(2, 3, 4, 5), "mask has a wrong shape"),
    "mask transposed": (X, X, torch.ones(2, 5, 4), "mask has a wrong shape"),
    "mask type": (X, X, [True, False], "mask is no tensor.*list"),
    "mask dtype": (X, X, torch.ones(2, 4, 5, dtype=torch.complex64), "mask cannot be used.*complex"),
}
BAD_CLASSES = {
    "counts": (X, torch.zeros(2, 4, 4, 5), None, "class counts differ.*received 3 and 4"),
    "one class": (X[:, :1], X[:, :1], None, "fewer than 2 classes"),
    "short map": (X, X, [0, 1], "class_map does not fit"),
    "map beyond": (X, X, [0, 1, 3], "class_map does not fit"),
    "negative map": (X, X, [0, 1, -1], "class_map's entry is out of range"),
    "map of bool": (X, X, [True, False, True], "class_map's entry is not an integer"),
    "map of a tensor": (X, X, torch.arange(3), "class_map is of a wrong type"),
    "empty map": (X, X, [], "class_map is of a wrong type"),
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", BAD_INPUTS)
def test_inputs_that_do_not_fit(name, case):
    student, teacher, mask, message = BAD_INPUTS[case]
    with pytest.raises(CldaError, match=message):
        LOSSES[name][0](student, teacher, mask)


@pytest.mark.parametrize("name", LOGIT_LOSSES)
@pytest.mark.parametrize("case", BAD_CLASSES)
def test_classes_that_do_not_fit(name, case):
    student, teacher, class_map, message = BAD_CLASSES[case]
    with pytest.raises(CldaError, match=message):
        LOSSES[name][0](student, teacher, class_map=class_map)


@pytest.mark.skipif(not hasattr(torch, "_assert_async"), reason="this torch has no second device without hardware")
@pytest.mark.parametrize("name", LOSSES)
def test_devices_that_differ(name):
    elsewhere = X.to("meta")
    with pytest.raises(CldaError, match="devices .* differ.*received cpu and meta"):
        LOSSES[name][0](X, elsewhere)
    with pytest.raises(CldaError, match="mask and the logits are on different devices"):
        LOSSES[name][0](X, X, elsewhere[:, 0])


@pytest.mark.parametrize("loss", [channel_wise_distillation, attention_transfer])
def test_losses_over_positions_need_some(loss):
    with pytest.raises(CldaError, match="needs spatial dimensions"):
        loss(torch.zeros(2, 3), torch.zeros(2, 3))


def test_grids_of_many_dimensions_cannot_be_resized():
    with pytest.raises(CldaError, match="grids differ and cannot be resized"):
        kl_distillation(torch.zeros(1, 2, 2, 2, 2, 2), torch.zeros(1, 2, 2, 2, 2, 3))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda **kw: kl_distillation(X, X, **kw), "temperature"),
        (lambda **kw: channel_wise_distillation(X, X, **kw), "temperature"),
        (lambda **kw: decoupled_distillation(X, X, **kw), "temperature"),
        (lambda **kw: dist_distillation(X, X, **kw), "temperature"),
        (KLDistillation, "temperature"),
        (ChannelWiseDistillation, "temperature"),
        (DecoupledDistillation, "temperature"),
        (DISTDistillation, "temperature"),
    ],
)
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "4", None])
def test_temperatures(call, message, value):
    with pytest.raises(CldaError, match=message):
        call(temperature=value)


@pytest.mark.parametrize("value", [-0.1, float("nan"), True, "1"])
def test_weights(value):
    with pytest.raises(CldaError, match="the weight of a term is"):
        WeightedSum([(value, KLDistillation())])


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        (DecoupledDistillation, {"alpha": -1}, "alpha is out of range"),
        (DecoupledDistillation, {"beta": -1}, "beta is out of range"),
        (DISTDistillation, {"inter": -1}, "inter is out of range"),
        (DISTDistillation, {"intra": -1}, "intra is out of range"),
        (AttentionTransfer, {"power": 0.5}, "power is out of range"),
        (FeatureDistillation, {"project": "never"}, "project is unknown"),
        (KLDistillation, {"class_map": "012"}, "class_map is of a wrong type"),
    ],
)
def test_options(strategy, options, message):
    with pytest.raises(CldaError, match=message):
        strategy(**options)


@pytest.mark.parametrize(
    ("labels", "ignore_index", "message"),
    [
        (torch.full((2, 4, 5), 3), None, "label is no class.*from 3 to 3"),
        (torch.full((2, 4, 5), 3), 255, "label is no class.*from 3 to 3"),
        (torch.full((2, 4, 5), -1), None, "label is no class"),
        (torch.full((2, 4, 5), 255), None, "label is no class.*0 to 2, received.*ignore_index="),
        (torch.full((2, 4, 5), 255), -100, "label is no class.*-100 or a negative number"),
        (torch.zeros(2, 4, 5), 255, "labels are of a wrong dtype.*float32"),
        (torch.zeros(2, 4, dtype=torch.long), 255, "labels has a wrong shape"),
        (torch.zeros(2, 4, 5, dtype=torch.long), 25.5, "ignore_index is not an integer"),
    ],
)
def test_labels(labels, ignore_index, message):
    with pytest.raises(CldaError, match=message):
        decoupled_distillation(X, X, labels=labels, ignore_index=ignore_index)


@pytest.mark.parametrize("loss", [feature_distillation, attention_transfer, FeatureDistillation(), AttentionTransfer()])
def test_features_that_cannot_be_paired(loss):
    with pytest.raises(CldaError, match="features cannot be paired.*received 0 and 0"):
        loss((), ())
    with pytest.raises(CldaError, match="features cannot be paired.*received 1 and 2"):
        loss((X,), (X, X))
    with pytest.raises(CldaError, match=r"student's features\[1\] cannot be used"):
        loss((X, None), (X, X))


def test_widths_that_differ():
    with pytest.raises(CldaError, match="widths of paired features differ.*received 3 and 4"):
        feature_distillation(X, torch.zeros(2, 4, 4, 5))
    loss = FeatureDistillation()
    loss(X, torch.zeros(2, 4, 4, 5))
    with pytest.raises(CldaError, match=r"features\[0\] are not those of its projector.*student 3, teacher 3"):
        loss(X, X)


@pytest.mark.parametrize("terms", [[], [KLDistillation()], [(1.0,)], [(1.0, "kl")], [(KLDistillation(), 1.0)]])
def test_terms_of_a_wrong_form(terms):
    with pytest.raises(CldaError, match="terms are of a wrong form"):
        WeightedSum(terms)


@pytest.mark.parametrize(
    ("returned", "message"),
    [(1.0, "received float"), (torch.zeros(2), r"shape \(2,\)"), (torch.tensor(1), "torch.int64"), (None, "NoneType")],
)
def test_losses_that_are_no_scalar(returned, message):
    with pytest.raises(CldaError, match="distillation loss is no scalar.*" + message):
        distillation_loss(lambda student, teacher, mask: returned, Outputs(X), Outputs(X), None)


def test_reading_what_does_not_exist():
    loss = KLDistillation()
    loss.reads = "logit"
    with pytest.raises(CldaError, match="KLDistillation.reads is unknown.*'logit'"):
        distillation_loss(loss, Outputs(X), Outputs(X), None)


def test_values_that_no_loss_can_use():
    broken = X.clone()
    broken[1, 2, 0, 0] = float("nan")
    mask = torch.ones(2, 4, 5, dtype=torch.bool)
    check_values(X, X)
    check_values(X, X, mask)
    with pytest.raises(CldaError, match="student's logits are not finite.*1 NaN or infinite of 120"):
        check_values(broken, X)
    with pytest.raises(CldaError, match="teacher's logits are not finite"):
        check_values(X.half(), broken.half(), mask)
    mask[1, 0, 0] = False
    check_values(broken, broken, mask)
    check_values(broken, X[..., ::2], mask.unsqueeze(1))
    with pytest.raises(CldaError, match="mask has a wrong shape"):
        check_values(broken, X, mask[:1])


@pytest.mark.parametrize(
    "mask", [torch.zeros(2, dtype=torch.bool), torch.zeros(2, 4, 5), torch.zeros(2, 4, 5, dtype=torch.bool)]
)
def test_masks_that_leave_nothing(mask):
    with pytest.raises(CldaError, match="all positions are ignored"):
        check_values(X, X, mask)


def test_values_are_not_checked_with_a_mask_of_integers():
    with pytest.raises(CldaError, match="integer mask is ambiguous"):
        check_values(X, X, torch.full((2, 4, 5), 255))


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_masks_that_are_no_weights(value):
    with pytest.raises(CldaError, match="mask has negative or non-finite weights"):
        check_values(X, X, torch.tensor([1.0, value]))


@pytest.mark.skipif(not hasattr(torch, "_assert_async"), reason="this torch has no second device without hardware")
def test_values_elsewhere_are_not_waited_for():
    check_values(X.to("meta"), X.to("meta"), X[:, 0].to("meta"))
