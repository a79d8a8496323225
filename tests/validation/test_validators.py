"""What every validator promises: its oracle, sums that add up, masks, precision, degenerate batches, clear errors."""

import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clda_core.validation as public
from clda_core import CldaError
from clda_core.strategy import describe
from clda_core.validation import (
    ByClass,
    ConsistencyIoU,
    ConsistentInformation,
    HardConsistency,
    MutualInformation,
    NegativeEntropy,
    SoftConsistency,
)
from tests import reference_validation as reference
from tests.helpers import random_states
from tests.validation.validators import CASES, logits, same, scored, view_of

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
every = pytest.mark.parametrize("name", CASES)
adding = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.adds_up])
with_view = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.make().needs_view])

SHAPES = [(5, 3), (1, 4), (2, 3, 4, 5), (3, 2, 7), (2, 3, 2, 2, 3)]
NO_VALIDATORS = {"ByClass", "MakesView", "Validator", "mixed", "validate", "validation_statistics"}


def test_every_validator_has_a_case() -> None:
    assert set(public.__all__) - NO_VALIDATORS == set(CASES)


@every
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", ["none", "bool", "weights", "image"])
def test_the_score_is_that_of_the_definition(name: str, shape: Any, mask: str) -> None:
    case, validator = CASES[name], CASES[name].make()
    first = logits(*shape)
    second = view_of(first)
    drawn = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    weights = {
        "none": None,
        "bool": drawn > 0.4,
        "weights": drawn * (drawn > 0.2),
        "image": drawn.reshape(shape[0], -1)[:, 0],
    }[mask]
    whole = weights.reshape(-1, *[1] * len(shape[2:])).expand_as(drawn) if mask == "image" else weights
    seen = reference.positions(first, second, whole)
    statistics = validator.statistics(first, second, weights)
    assert tuple(statistics.shape) == (case.length(shape[1]),)
    assert statistics.dtype == torch.float64
    score = validator.score(statistics)
    assert score.dim() == 0
    assert same(score.item(), case.score(seen, shape[0]))
    assert isinstance(validator, ByClass) == (case.by_class is not None)
    if case.by_class is not None:
        found = validator.score_by_class(statistics).tolist()
        assert len(found) == shape[1]
        assert all(map(same, found, case.by_class(seen, shape[0])))


@quick
@given(data=st.data())
@every
def test_the_score_is_that_of_the_definition_for_any_batch(name: str, data: Any) -> None:
    case, validator = CASES[name], CASES[name].make()
    grid = data.draw(st.sampled_from([(), (1,), (4,), (2, 3)]))
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(2, 5)), *grid)
    scale = data.draw(st.sampled_from([0.01, 1.0, 30.0, 1e4]))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]))
    first = logits(*shape, seed=data.draw(st.integers(0, 99)), scale=scale, dtype=dtype)
    second = view_of(first, seed=data.draw(st.integers(100, 199)), scale=scale * data.draw(st.sampled_from([0.0, 1.0])))
    if not torch.isfinite(torch.stack([first, second]).double()).all():
        return
    weights = None
    if data.draw(st.booleans()):
        drawn = torch.rand(shape[0], *grid, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 9))))
        weights = drawn * (drawn > data.draw(st.sampled_from([0.0, 0.5, 2.0]))).float()
    expected = case.score(reference.positions(first, second, weights), shape[0])
    assert same(scored(validator, first, second, weights), expected, 1e-8)


@adding
@quick
@given(data=st.data())
def test_statistics_of_a_batch_are_the_sum_of_its_parts(name: str, data: Any) -> None:
    """Whatever the weights are in each: a mask is not measured by its largest weight."""
    validator = CASES[name].make()
    count = data.draw(st.integers(2, 6))
    first = logits(count, 3, 2, 2, seed=data.draw(st.integers(0, 99)))
    second, cut = view_of(first), data.draw(st.integers(1, count - 1))
    weights = torch.rand(count, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.arange(count).reshape(
        -1, 1, 1
    )
    whole = validator.statistics(first, second, weights)
    parts = [
        validator.statistics(*(one[part] for one in (first, second, weights)))
        for part in (slice(0, cut), slice(cut, count))
    ]
    assert torch.allclose(parts[0] + parts[1], whole, rtol=1e-12, atol=1e-12)


@every
def test_a_common_factor_of_the_statistics_changes_no_score(name: str) -> None:
    """So sums over steps may be multiplied by a decay."""
    validator = CASES[name].make()
    first = logits(6, 3, 2)
    statistics = validator.statistics(first, view_of(first))
    assert same(validator.score(0.9 * statistics).item(), validator.score(statistics).item())
    if isinstance(validator, ByClass):
        found, expected = (validator.score_by_class(factor * statistics).tolist() for factor in (1e-6, 1.0))
        assert all(map(same, found, expected))


@every
@pytest.mark.parametrize("filling", [0.0, 1e30, math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_what_a_mask_leaves_out_is_as_if_it_were_not_there(name: str, dtype: torch.dtype, filling: float) -> None:
    validator = CASES[name].make()
    first = logits(4, 3, 6)
    second = view_of(first)
    padded = [torch.cat([one, torch.full((4, 3, 5), filling, dtype=one.dtype)], 2) for one in (first, second)]
    mask = (torch.arange(11) < 6).expand(4, 11).to(dtype)
    alone = scored(validator, first, second)
    assert math.isfinite(alone)
    assert same(scored(validator, *padded, mask), alone)


@adding
def test_a_weight_of_3_counts_as_three_of_the_same(name: str) -> None:
    validator = CASES[name].make()
    first = logits(8, 3)
    second = view_of(first)
    weights = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 3.0, 1.0, 0.0])
    repeated = [one.repeat_interleave(weights.long(), 0) for one in (first, second)]
    assert same(scored(validator, first, second, weights), scored(validator, *repeated))


@every
def test_negative_and_undefined_weights_count_as_0(name: str) -> None:
    validator = CASES[name].make()
    first = logits(6, 3, 2)
    second = view_of(first)
    weights = torch.ones(6, 2)
    weights[1, 0], weights[2, 1] = -1.0, math.nan
    assert same(scored(validator, first, second, weights), scored(validator, first, second, weights > 0))


@every
def test_the_order_of_images_positions_and_classes_is_no_matter(name: str) -> None:
    """Of MixVal, which pairs neighbours, their cyclic order is."""
    validator = CASES[name].make()
    first = logits(5, 3, 2, 3)
    second = view_of(first)
    mask = torch.rand(5, 2, 3, generator=torch.Generator().manual_seed(1)) > 0.3
    expected = scored(validator, first, second, mask)
    order = torch.tensor([2, 3, 4, 0, 1] if name == "MixVal" else [3, 0, 4, 1, 2])
    assert same(scored(validator, first[order], second[order], mask[order]), expected)
    for dim in (1, 2, 3):
        turned = mask if dim == 1 else mask.flip(dim - 1)
        assert same(scored(validator, first.flip(dim), second.flip(dim), turned), expected)
    if isinstance(validator, ByClass):
        found = validator.score_by_class(validator.statistics(first.flip(1), second.flip(1), mask)).tolist()
        assert all(map(same, found[::-1], validator.score_by_class(validator.statistics(first, second, mask)).tolist()))


@every
def test_a_shift_of_all_logits_at_a_position_is_no_matter(name: str) -> None:
    validator = CASES[name].make()
    first = logits(5, 3, 2)
    second = view_of(first)
    shift = logits(5, 1, 2, seed=3, scale=20.0)
    assert same(scored(validator, first + shift, second - shift), scored(validator, first, second))


@every
@pytest.mark.parametrize("scale", [1e4, 1e20, 3e38])
def test_scores_of_the_largest_logits_are_finite(name: str, scale: float) -> None:
    """Up to float32's range; in float16's and float64's by the oracle, above."""
    validator = CASES[name].make()
    first, second = (scale * torch.tanh(logits(9, 3, 4, seed=seed)).float() for seed in (1, 2))
    assert torch.isfinite(validator.statistics(first, second)).all()
    assert math.isfinite(scored(validator, first, second))


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_lower_precision_is_scored_as_the_same_numbers_in_float64(name: str, dtype: torch.dtype) -> None:
    validator = CASES[name].make()
    first = logits(5, 3, 4, dtype=dtype)
    second = view_of(first)
    assert torch.equal(validator.statistics(first, second), validator.statistics(first.double(), second.double()))


@every
def test_autocast_lowers_no_precision(name: str) -> None:
    validator = CASES[name].make()
    first = logits(5, 3, 4)
    plain = validator.statistics(first, view_of(first))
    autocast = getattr(torch, "autocast", None)  # before torch 1.10 there was none on a CPU
    with nullcontext() if autocast is None else autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(validator.statistics(first, view_of(first)), plain)


@every
@pytest.mark.parametrize("mask", [torch.zeros(4, 5), torch.zeros(4, dtype=torch.bool)], ids=["float", "bool"])
def test_an_empty_mask_adds_nothing_and_alone_is_nan(name: str, mask: Tensor) -> None:
    validator = CASES[name].make()
    first = logits(4, 3, 5)
    statistics = validator.statistics(first, view_of(first), mask)
    assert (statistics == 0).all()
    assert math.isnan(validator.score(statistics).item())
    if isinstance(validator, ByClass):
        assert torch.isnan(validator.score_by_class(statistics)).all()


@every
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_logits_that_are_not_finite_give_nan_and_no_score(name: str, bad: float, where: int) -> None:
    """Labels can be read from such logits: a score of them would be a number, and mean nothing."""
    validator = CASES[name].make()
    given = [logits(4, 3, 5), logits(4, 3, 5, seed=1)]
    given[where][2, 1, 3] = bad
    broken = where == 0 or validator.needs_view
    statistics = validator.statistics(*given)
    assert torch.isnan(statistics).any() == broken
    assert math.isnan(scored(validator, *given)) == broken


@every
def test_a_batch_of_one_image(name: str) -> None:
    """With a grid every validator but MixVal, which mixes two images, has something to score."""
    validator = CASES[name].make()
    first = logits(1, 3, 3, 3)
    score = scored(validator, first, view_of(first))
    assert math.isnan(score) if name == "MixVal" else math.isfinite(score)
    alone = logits(1, 3)
    assert math.isnan(scored(validator, alone, view_of(alone))) == (name in ("MixVal", "NeighbourhoodDensity"))


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.by_class is not None])
def test_a_class_that_never_appears_is_nan_and_counts_in_no_mean(name: str) -> None:
    validator = CASES[name].make()
    first = logits(9, 3, 4)
    second = view_of(first)
    wider = [torch.cat([one, torch.full((9, 1, 4), -1e4, dtype=one.dtype)], 1) for one in (first, second)]
    statistics = validator.statistics(*wider)
    by_class = validator.score_by_class(statistics)
    assert torch.isnan(by_class[3])
    assert torch.isfinite(by_class[:3]).all()
    assert same(validator.score(statistics).item(), scored(validator, first, second))


@with_view
def test_a_view_on_a_finer_or_coarser_grid_is_resized_to_the_smaller_one(name: str) -> None:
    validator = CASES[name].make()
    coarse = logits(3, 3, 4, 4)
    second = view_of(coarse)
    finer = [one.repeat_interleave(2, 2).repeat_interleave(2, 3) for one in (coarse, second)]
    expected = scored(validator, coarse, second)
    assert same(scored(validator, coarse, finer[1]), expected)
    assert same(scored(validator, finer[0], second), expected)


@every
def test_a_mask_of_another_resolution(name: str) -> None:
    validator = CASES[name].make()
    first = logits(3, 3, 4, 4)
    second = view_of(first)
    mask = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)) > 0.4
    finer = mask.repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert same(scored(validator, first, second, finer), scored(validator, first, second, mask))


@every
def test_statistics_are_detached_repeatable_and_draw_nothing(name: str) -> None:
    validator = CASES[name].make()
    first = logits(4, 3, 5).requires_grad_()
    second = view_of(first)
    states, kept = random_states(), [one.detach().clone() for one in (first, second)]
    statistics = validator.statistics(first, second)
    assert not statistics.requires_grad
    assert torch.equal(validator.statistics(first, second), statistics)
    assert random_states() == states
    assert all(torch.equal(one.detach(), before) for one, before in zip((first, second), kept))


@every
@pytest.mark.parametrize("layout", ["channels_last", "sliced", "expanded", "permuted"])
def test_the_memory_layout_is_no_matter(name: str, layout: str) -> None:
    validator = CASES[name].make()
    first = logits(4, 3, 2, 2)
    if layout == "expanded":
        first = first[:1].expand(4, -1, -1, -1)
    second = view_of(first.clone())

    def laid_out(one: Tensor) -> Tensor:
        if layout == "channels_last":
            return one.contiguous(memory_format=torch.channels_last)
        if layout == "sliced":
            return torch.stack([one, one + 1], -1)[..., 0]
        return one.transpose(0, 3).contiguous().transpose(0, 3) if layout == "permuted" else one

    assert same(scored(validator, laid_out(first), laid_out(second)), scored(validator, first.clone(), second))


@adding
def test_large_batches_are_summed_in_chunks(name: str) -> None:
    """Statistics of more elements than a chunk has are those of its images one by one."""
    validator = CASES[name].make()
    first = logits(3, 5, 130, 140, dtype=torch.float32)
    second = view_of(first)
    mask = torch.rand(3, 130, 140, generator=torch.Generator().manual_seed(1)) > 0.3
    parts = [validator.statistics(*(one[i : i + 1] for one in (first, second, mask))) for i in range(3)]
    whole = validator.statistics(first, second, mask)
    assert torch.allclose(whole, sum(parts), rtol=1e-10)
    assert whole.sum() != 0


@every
def test_validators_describe_themselves_and_survive_pickling(name: str) -> None:
    validator = CASES[name].make()
    assert describe(validator)["class"] == name
    assert repr(validator).startswith(f"{name}(")
    assert repr(pickle.loads(pickle.dumps(validator))) == repr(validator)


COLLAPSED = 50 * torch.eye(3)[[0] * 6]
UNSURE = torch.zeros(6, 3)
GOOD = 50 * torch.eye(3)[[0, 1, 2, 0, 1, 2]]


def test_information_is_lost_by_collapse_and_by_doubt_where_consistency_and_entropy_reward_collapse() -> None:
    for validator in (MutualInformation(), ConsistentInformation()):
        assert scored(validator, GOOD, GOOD) == pytest.approx(math.log(3))
        assert scored(validator, COLLAPSED, COLLAPSED) == pytest.approx(0, abs=1e-9)
        assert scored(validator, UNSURE, UNSURE) == pytest.approx(0, abs=1e-9)
    for best in (NegativeEntropy(), SoftConsistency(), HardConsistency(), ConsistencyIoU()):
        assert scored(best, COLLAPSED, COLLAPSED) == pytest.approx(scored(best, GOOD, GOOD), abs=1e-9)


def test_on_two_equal_views_consistency_is_the_negative_entropy() -> None:
    first = logits(6, 4, 3)
    assert scored(SoftConsistency(), first, first) == pytest.approx(scored(NegativeEntropy(), first))
    assert scored(ConsistentInformation(), first, first) == pytest.approx(scored(MutualInformation(), first))
    assert scored(HardConsistency(), first, first) == scored(ConsistencyIoU(), first, first) == 1.0


def test_consistency_falls_as_the_view_moves_away() -> None:
    first = logits(50, 4)
    for validator in (SoftConsistency(), ConsistentInformation(), HardConsistency(), ConsistencyIoU()):
        scores = [scored(validator, first, view_of(first, scale=scale)) for scale in (0.0, 1.0, 3.0, 10.0)]
        assert scores == sorted(scores, reverse=True)
        assert len(set(scores)) == 4


@with_view
def test_a_missing_view(name: str) -> None:
    with pytest.raises(CldaError, match=f"{name} compares predictions on two views, and was given one.*Fix: "):
        CASES[name].make().statistics(logits(2, 3))


@with_view
@pytest.mark.parametrize(
    ("shape", "match"),
    [
        ((3, 3, 4, 4), "on the view are of another batch size: expected 2, received 3"),
        ((2, 4, 4, 4), "on the view are of another class count: expected 3, received 4"),
        ((2, 3, 16), "on the view are of another number of dimensions"),
        ((2, 3), "on the view are of another number of dimensions"),
        ((0, 3, 4, 4), "cannot use the logits on the view"),
    ],
)
def test_views_that_do_not_fit(name: str, shape: Any, match: str) -> None:
    with pytest.raises(CldaError, match=f"{match}.*Fix: "):
        CASES[name].make().statistics(logits(2, 3, 4, 4), logits(*shape))


@every
@pytest.mark.parametrize(
    ("given", "match"),
    [
        (torch.zeros(2, 1, 3), "C >= 2 classes, received torch.float32 of shape"),
        (torch.zeros(0, 3), "at least one sample"),
        (torch.zeros(2, 3, 0), "at least one sample, position"),
        (torch.zeros(6), "a floating-point tensor"),
        (torch.zeros(2, 3).long(), "received torch.int64"),
        ([[0.0, 1.0]], "received list"),
        (None, "received NoneType"),
    ],
)
def test_logits_that_cannot_be_used(name: str, given: Any, match: str) -> None:
    with pytest.raises(CldaError, match=f"a validator cannot use the logits.*{match}.*Fix: "):
        CASES[name].make().statistics(given, given)


@every
@pytest.mark.parametrize(
    ("mask", "match"),
    [
        (torch.ones(3, 4), "the mask has a wrong shape"),
        (torch.ones(2, 4).long(), "an integer mask is ambiguous"),
        ([1.0, 1.0], "mask is no tensor"),
    ],
)
def test_masks_that_cannot_be_used(name: str, mask: Any, match: str) -> None:
    first = logits(2, 3, 4)
    with pytest.raises(CldaError, match=f"{match}.*Fix: "):
        CASES[name].make().statistics(first, first, mask)


@every
@pytest.mark.parametrize("shape", [(), (1,), (3, 4)])
def test_statistics_of_something_else(name: str, shape: Any) -> None:
    with pytest.raises(CldaError, match=f"these are no statistics of {name}.*Fix: "):
        CASES[name].make().score(torch.zeros(shape))
