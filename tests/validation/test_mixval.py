"""MixVal: how images are mixed, and which mixes count."""

import math
from typing import Any

import pytest
import torch

from clda_core import CldaError
from clda_core.validation import MixVal, mixed
from tests.validation.validators import logits, scored, view_of


def test_each_image_is_mixed_with_the_next_one() -> None:
    images = logits(3, 2, 4, 4)
    found = mixed(images, 0.7)
    for index in range(3):
        assert torch.allclose(found[index], 0.7 * images[index] + 0.3 * images[(index + 1) % 3], rtol=1e-12)
    assert torch.equal(MixVal(ratio=0.7).view(images), found)
    assert torch.equal(MixVal().view(images), mixed(images))


def test_mixing_keeps_the_form_and_what_cannot_be_mixed() -> None:
    images, ids, half = logits(3, 2), torch.arange(3), logits(3, 2).half()
    found = mixed({"pixel_values": images, "rest": (ids, [half, "name"]), "scale": torch.tensor(2.0)})
    assert torch.equal(found["pixel_values"], mixed(images))
    assert found["rest"][0] is ids
    assert found["rest"][1][0].dtype == torch.float16
    assert found["rest"][1][1] == "name"
    assert found["scale"] == 2.0
    assert isinstance(found["rest"], tuple)
    assert isinstance(found["rest"][1], list)
    assert torch.equal(images, logits(3, 2))


@pytest.mark.parametrize("given", [torch.zeros(3, 2, dtype=torch.uint8), {"ids": torch.arange(3)}, ("name",), None])
def test_inputs_without_images(given: Any) -> None:
    with pytest.raises(CldaError, match="there is nothing to mix in the inputs.*Fix: "):
        mixed(given)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 0.2, math.nan, "half"])
def test_a_ratio_by_which_neither_image_dominates(ratio: Any) -> None:
    for call in (lambda: mixed(torch.zeros(2, 2), ratio), lambda: MixVal(ratio=ratio)):
        with pytest.raises(CldaError, match="ratio is .*Fix: "):
            call()


def test_accuracy_is_that_of_both_kinds_of_mixes_alike_however_often_each_is_met() -> None:
    """Images of classes 0 0 0 0 1: three mixes within class 0, one across to 1, and one across to 0."""
    first = torch.eye(2)[[0, 0, 0, 0, 1]]
    on_mix = torch.eye(2)[[0, 0, 1, 0, 0]]
    validator = MixVal()
    statistics = validator.statistics(first, on_mix)
    assert statistics.tolist() == [3, 0, 2, 0, 1, 1, 1, 0]
    assert validator.score(statistics).item() == pytest.approx((2 / 3 + 1 / 2) / 2)
    by_class = validator.score_by_class(statistics)
    assert by_class[0].item() == pytest.approx((2 / 3 + 1) / 2)
    assert torch.isnan(by_class[1])


def test_a_network_that_predicts_a_single_class_has_no_score() -> None:
    one = torch.eye(3)[[1] * 8]
    assert math.isnan(scored(MixVal(), one, one))
    apart = torch.eye(4)
    assert math.isnan(scored(MixVal(), apart, apart))
    validator = MixVal()
    assert (
        validator.score(validator.statistics(one[:, :3], one) + validator.statistics(apart[:3, :3], apart[:3, :3])) == 1
    )


def test_a_position_counts_where_it_does_in_both_images() -> None:
    first = logits(4, 3, 5)
    second = view_of(first)
    mask = torch.ones(4, 5)
    mask[2] = torch.tensor([0.0, 0.5, 0.5, 0.5, 0.5])
    alone = torch.ones(4, 5)
    alone[1, 0] = alone[2, 0] = 0.0
    alone[2, 1:] = 0.5
    statistics = MixVal().statistics(first, second, mask)
    assert statistics[:3].sum() + statistics[6:9].sum() == alone.sum()
