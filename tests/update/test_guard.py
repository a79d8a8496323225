import functools
import math
from typing import Any, Dict, List, Mapping

import pytest
import torch
from torch import Tensor, nn

from clda_core.errors import CldaError
from clda_core.update import (
    Average,
    Guard,
    MaskedDistillation,
    RoundContext,
    UpdateResult,
    agreement,
    consensus,
    mutual_information,
)
from tests import reference_update as reference
from tests.helpers import no_traces
from tests.models import ResNet, mlp
from tests.update.rounds import changed, images, randomise, round_context, values


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


class Writes:
    """An update that fills the selected layers' tensors with what a function gives."""

    needs_relation = False

    def __init__(self, make: Any) -> None:
        self.make = make
        self.rounds = torch.zeros(())

    def apply(self, context: RoundContext) -> UpdateResult:
        tensors = {**dict(context.teacher.named_parameters()), **dict(context.teacher.named_buffers())}
        with torch.no_grad():
            for layer in context.layers:
                for name in (*layer.parameters, *layer.buffers):
                    tensors[name].copy_(self.make(tensors[name]))
        self.rounds += 1
        return UpdateResult(tuple(layer.name for layer in context.layers), {"x": "reason"})

    def state_dict(self) -> Dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.rounds = state["rounds"]


def bias_towards_0(teacher: Tensor, original: Tensor, student: Tensor) -> Tensor:
    return teacher[:, 0].mean()


def pair() -> Any:
    return randomise(ResNet((2, 1)), 1), randomise(ResNet((1, 1), width=2), 2)


def test_accepts_an_improvement() -> None:
    teacher, student = pair()
    before = values(teacher)
    guard = Guard(
        Writes(lambda tensor: tensor + 1), criterion=lambda t, o, s: -(t[:, 1] - t[:, 0] - 5).abs().mean() * 0 + 1
    )
    result = guard.apply(round_context(teacher, student, ["fc"], inputs=images()))
    assert result == UpdateResult(("fc",), {"x": "reason"}, True, 1.0, 1.0)
    assert changed(teacher, before) == ["fc.weight", "fc.bias"]
    assert guard.update.rounds == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda tensor: torch.full_like(tensor, float("nan")),
        lambda tensor: torch.full_like(tensor, float("inf")),
        lambda tensor: torch.zeros_like(tensor),
        lambda tensor: -tensor.abs() - 1,
    ],
    ids=["nan", "inf", "zeros", "negative"],
)
@pytest.mark.parametrize("criterion", [consensus, mutual_information, agreement])
def test_rolls_back_what_wrecks_the_teacher_bit_for_bit(make: Any, criterion: Any) -> None:
    teacher, student = pair()
    if criterion is agreement:
        student = randomise(ResNet((2, 1)), 1)  # the teacher's twin: nothing agrees better
    for model in (teacher, student):  # so that predictions differ from image to image
        model.fc.weight.data.mul_(100)
        model.fc.bias.data.sub_(model.eval()(images()).mean(dim=0).detach())
    teacher.layer1[0].bn1.bias.data[0] = -0.0
    guard = Guard(Writes(make), criterion=criterion)
    with no_traces(teacher, student, values_too=True):
        result = guard.apply(round_context(teacher, student, inputs=images()))
    assert result.accepted is False
    assert result.updated == ()
    assert result.skipped == {"x": "reason"}
    assert guard.update.rounds == 0


@pytest.mark.parametrize(("scores", "accepted"), [
    ((1.0, 1.0), True),
    ((1.0, 0.91), True),
    ((1.0, 0.89), False),
    ((-3.0, -3.2), False),
    ((float("nan"), 1.0), False),
    ((1.0, float("nan")), False),
    ((-math.inf, 1.0), True),
])  # fmt: skip
def test_tolerance_and_nan(scores: Any, accepted: bool) -> None:
    teacher, student = pair()
    given = iter(scores)
    guard = Guard(
        Writes(lambda tensor: tensor + 1),
        criterion=lambda t, o, s: torch.tensor(next(given)),
        tolerance=0.1,
        backtracks=0,
    )
    before = values(teacher)
    result = guard.apply(round_context(teacher, student, ["fc"], inputs=images()))
    assert result.accepted is accepted
    expected = tuple(None if math.isnan(score) else score for score in torch.tensor(scores).double().tolist())
    assert (result.score_before, result.score_after) == expected
    assert bool(changed(teacher, before)) is accepted


@pytest.mark.parametrize("accepted_at", [1, 2, 3])
def test_an_update_is_halved_until_it_is_accepted(accepted_at: int) -> None:
    teacher, student = pair()
    before = values(teacher)
    scores = iter([0.0, *[-1.0] * (accepted_at - 1), 0.0])
    update = Writes(lambda tensor: tensor + 1)
    guard = Guard(update, criterion=lambda t, o, s: torch.tensor(next(scores)), backtracks=2)
    result = guard.apply(round_context(teacher, student, ["fc"], inputs=images()))
    assert result.accepted is True
    assert next(scores, None) is None
    assert torch.allclose(teacher.fc.bias - before["fc.bias"], torch.tensor(0.5 ** (accepted_at - 1)))
    assert changed(teacher, before) == ["fc.weight", "fc.bias"]
    assert update.rounds == 1


@pytest.mark.parametrize("infinity", [math.inf, -math.inf])
def test_halving_leaves_an_infinity_alone(infinity: float) -> None:
    """Causal masks and range observers are buffers of these."""
    teacher, student = pair()
    teacher.fc.register_buffer("mask", torch.tensor([infinity, 0.0]))
    before = values(teacher)
    scores = iter([0.0, -1.0, 0.0])

    class WritesWeights(Writes):
        def apply(self, context: Any) -> UpdateResult:
            with torch.no_grad():
                context.teacher.fc.weight.add_(1.0)
            return UpdateResult(("fc",))

    guard = Guard(WritesWeights(lambda tensor: tensor), criterion=lambda t, o, s: torch.tensor(next(scores)))
    assert guard.apply(round_context(teacher, student, ["fc"], inputs=images())).accepted is True
    assert changed(teacher, before) == ["fc.weight"]
    assert torch.allclose(teacher.fc.weight, before["fc.weight"] + 0.5)


def test_nothing_written_is_nothing_to_judge() -> None:
    class WritesNothing(Writes):
        def apply(self, context: Any) -> UpdateResult:
            return UpdateResult((), {"fc": "shapes differ"})

    teacher, student = pair()
    result = Guard(WritesNothing(lambda tensor: tensor)).apply(round_context(teacher, student, inputs=images()))
    assert result == UpdateResult((), {"fc": "shapes differ"})


def test_after_the_last_halving_it_is_rolled_back() -> None:
    teacher, student = pair()
    before = values(teacher)
    scores = iter([0.0, -1.0, -1.0])
    guard = Guard(Writes(lambda t: t + 1), criterion=lambda t, o, s: torch.tensor(next(scores)), backtracks=1)
    assert guard.apply(round_context(teacher, student, ["fc"], inputs=images())).accepted is False
    assert not changed(teacher, before)
    assert guard.update.rounds == 0


def test_the_criterion_sees_the_teacher_before_and_after_and_the_student_in_eval_mode() -> None:
    teacher, student = pair()
    seen: List[Any] = []

    def criterion(of_teacher: Tensor, original: Tensor, of_student: Tensor) -> Tensor:
        seen.append((of_teacher, original, of_student))
        return of_teacher.sum() * 0

    Guard(Writes(lambda tensor: tensor + 1), criterion=criterion).apply(
        round_context(teacher, student, ["fc"], inputs=images())
    )
    (before, original, of_student), (after, still, again) = seen
    assert original is still
    assert torch.equal(original, before)
    assert again is of_student
    assert not of_student.requires_grad
    assert torch.equal(of_student, student.eval()(images()))
    assert torch.equal(after, teacher.eval()(images()))
    assert not torch.equal(after, before)


def test_an_error_after_the_update_undoes_it() -> None:
    teacher, student = pair()
    scores = iter([torch.zeros(()), "high"])
    guard = Guard(Writes(lambda tensor: tensor + 1), criterion=lambda t, o, s: next(scores))
    with no_traces(teacher, student, values_too=True), pytest.raises(CldaError, match="no score|something else.*str"):
        guard.apply(round_context(teacher, student, inputs=images()))
    assert guard.update.rounds == 0


def test_after_rejections_the_optimizer_is_as_if_they_had_not_been() -> None:
    """Otherwise the momentum of a rejected step would be part of the next one."""

    def rounds(verdicts: List[bool]) -> nn.Module:
        teacher, student = pair()
        scores = iter([score for accepted in verdicts for score in (0.0, 1.0 if accepted else -1.0)])
        guard = Guard(
            MaskedDistillation(learning_rate=0.01), criterion=lambda t, o, s: torch.tensor(next(scores)), backtracks=0
        )
        for accepted in verdicts:
            seed = 0 if accepted else 1
            result = guard.apply(round_context(teacher, student, ["layer1.1", "fc"], inputs=images(seed)))
            assert result.accepted is accepted
        return teacher

    expected = rounds([True, True])
    for verdicts in ([False, True, True], [True, False, False, True], [True, True, False]):
        assert not changed(rounds(verdicts), values(expected))
    assert changed(rounds([True]), values(expected))


def test_it_passes_on_what_the_update_is() -> None:
    assert Guard(Average()).needs_relation
    assert not Guard(MaskedDistillation()).needs_relation


def test_a_numpy_tolerance_gives_a_plain_decision() -> None:
    numpy = pytest.importorskip("numpy")
    guard = Guard(Writes(lambda tensor: tensor), tolerance=numpy.float64(0.5))
    assert type(guard.apply(round_context(*pair(), ["fc"], inputs=images())).accepted) is bool


def test_bad_options_and_no_inputs() -> None:
    with pytest.raises(CldaError, match="tolerance is out of range.*>= 0, received -0.1"):
        Guard(Average(), tolerance=-0.1)
    with pytest.raises(CldaError, match="backtracks is out of range.*>= 0, received -1"):
        Guard(Average(), backtracks=-1)
    with pytest.raises(CldaError, match="needs this step's target batch"):
        Guard(Average()).apply(round_context(mlp(), mlp()))


SHAPES = [(5, 3), (1, 4), (2, 3, 4, 5), (3, 2, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_criteria_equal_their_oracles(shape: Any, dtype: torch.dtype) -> None:
    teacher, original, student = (logits(*shape, seed=seed, dtype=dtype) for seed in (1, 3, 2))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for found, expected in (
        (mutual_information(teacher, original, student), reference.mutual_information(teacher)),
        (agreement(teacher, original, student), reference.agreement(teacher, student)),
    ):
        assert found.dtype == wide
        assert found.dim() == 0
        assert found.item() == pytest.approx(expected, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("criterion", [consensus, mutual_information, agreement])
def test_criteria_ignore_shifts_and_the_order_of_classes_samples_and_positions(criterion: Any, shape: Any) -> None:
    given = [logits(*shape, seed=seed) for seed in (1, 3, 2)]
    expected = pytest.approx(criterion(*given).item(), rel=1e-9, abs=1e-12, nan_ok=True)
    assert criterion(*(one + shift for one, shift in zip(given, (7.0, 1.0, -3.0)))).item() == expected
    for dim in range(len(shape)):
        assert criterion(*(one.flip(dim) for one in given)).item() == expected
    assert criterion(*(torch.cat([one, one]) for one in given)).item() == expected


def test_mutual_information_between_its_bounds() -> None:
    student = torch.zeros(1)
    blurred, collapsed = torch.zeros(6, 3), torch.eye(3)[[0] * 6] * 1000
    confident = torch.eye(3).repeat(2, 1) * 1000
    assert mutual_information(blurred, student, student).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information(collapsed, student, student).item() == pytest.approx(0, abs=1e-6)
    assert mutual_information(confident, student, student).item() == pytest.approx(math.log(3))


def test_agreement_is_highest_with_itself_and_resizes_grids() -> None:
    student = logits(2, 3, 4, 4)
    assert agreement(student, student, student).item() == 0.0
    assert agreement(logits(2, 3, 4, 4, seed=1), student, student).item() < 0
    finer = student.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert agreement(finer, finer, student).item() == pytest.approx(0, abs=1e-9)


def test_consensus_is_the_agreement_where_both_were_of_one_mind() -> None:
    original, student, updated = (logits(9, 3, seed=seed) for seed in (1, 2, 3))
    original[:5] += 2 * student[:5]
    shared = original.argmax(1) == student.argmax(1)
    assert 5 <= int(shared.sum()) < 9
    expected = reference.agreement(updated[shared], student[shared])
    assert consensus(updated, original, student).item() == pytest.approx(expected, rel=1e-9)
    elsewhere = torch.where(shared[:, None], updated, -7 * updated)
    assert consensus(elsewhere, original, student).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("shared", "known"), [(4, True), (2, True), (1, False), (0, False)])
def test_consensus_needs_a_majority_of_one_mind(shared: int, known: bool) -> None:
    student, original = torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 1, 2, 0]]
    original[shared:] = original[shared:].roll(1, 1)
    assert math.isnan(consensus(original, original, student)) is not known


def test_consensus_on_different_grids() -> None:
    coarse = logits(2, 3, 4, 4)
    finer = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert consensus(finer, finer, coarse).item() == pytest.approx(0, abs=1e-9)
    assert consensus(-finer, finer, coarse).item() < -1


@pytest.mark.parametrize("criterion", [consensus, mutual_information, agreement])
def test_criteria_of_non_finite_logits_are_nan(criterion: Any) -> None:
    broken = logits(4, 3)
    broken[1, 2] = float("nan")
    assert math.isnan(criterion(broken, logits(4, 3, seed=1), logits(4, 3)))


def test_agreement_of_logits_that_do_not_fit() -> None:
    with pytest.raises(CldaError, match="class counts differ"):
        agreement(logits(2, 3), logits(2, 3), logits(2, 4))


CRITERIA = [consensus, mutual_information, agreement]


@pytest.mark.parametrize("filling", [0.0, 1e4, float("nan")])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_what_a_mask_leaves_out_does_not_enter_a_score(criterion: Any, dtype: torch.dtype, filling: float) -> None:
    """As much as the whole of a batch that never had the positions left out, whatever stands there."""
    given = [logits(4, 3, 6, seed=seed) for seed in (1, 2, 3)]
    given[1] += 2 * given[2]
    alone = criterion(*given).item()
    assert math.isfinite(alone)
    padded = [torch.cat([one, torch.full((4, 3, 5), filling, dtype=one.dtype)], 2) for one in given]
    mask = (torch.arange(11) < 6).expand(4, 11).to(dtype)
    assert criterion(*padded, mask=mask).item() == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_weight_of_3_counts_as_three_of_the_same(criterion: Any) -> None:
    given = [logits(8, 3, seed=seed) for seed in (1, 2, 3)]
    given[1] += 2 * given[2]
    weights = torch.tensor([3.0, 1.0, 0.0, 2.0, 1.0, 3.0, 1.0, 0.0])
    repeated = [one.repeat_interleave(weights.long(), 0) for one in given]
    assert criterion(*given, mask=weights).item() == pytest.approx(criterion(*repeated).item(), rel=1e-6)
    assert criterion(*given, mask=weights).item() != pytest.approx(criterion(*given).item(), rel=1e-3)


def test_criteria_under_a_mask_equal_their_oracles() -> None:
    teacher, original, student = (logits(3, 4, 5, 2, seed=seed) for seed in (1, 3, 2))
    mask = torch.rand(3, 5, 2, generator=torch.Generator().manual_seed(0)) < 0.5
    ours, theirs = (one.permute(0, 2, 3, 1)[mask] for one in (teacher, student))
    found = mutual_information(teacher, original, student, mask=mask).item()
    assert found == pytest.approx(reference.mutual_information(ours), rel=1e-9)
    found = agreement(teacher, original, student, mask=mask).item()
    assert found == pytest.approx(reference.agreement(ours, theirs), rel=1e-9)


@pytest.mark.parametrize(("shared", "known"), [(3, True), (2, True), (1, False)])
def test_the_majority_is_one_of_what_counts(shared: int, known: bool) -> None:
    """Of four samples that count and any number that do not."""
    student, original = torch.eye(3)[[0, 1, 2, 0]], torch.eye(3)[[0, 1, 2, 0]]
    original[shared:] = original[shared:].roll(1, 1)
    mask = torch.tensor([True] * 4 + [False] * 9)
    for filling in (torch.eye(3)[[0] * 9], torch.eye(3)[[1] * 9]):
        padded = [torch.cat([student, torch.eye(3)[[0] * 9]]), torch.cat([original, filling])]
        score = consensus(padded[1], padded[1], padded[0], mask=mask)
        assert math.isnan(score) is not known


class Tagger(nn.Sequential):
    """A network whose positions do not see each other."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.Conv1d(3, width, 1), nn.ReLU(), nn.Conv1d(width, 4, 1))


def spread(teacher_logits: Tensor, original_logits: Tensor, student_logits: Tensor) -> Tensor:
    """A criterion of a user's own, who has not thought of masks."""
    assert teacher_logits.shape[:2] == original_logits.shape[:2] == student_logits.shape[:2]
    return teacher_logits.std() - (teacher_logits - student_logits).pow(2).mean()


@pytest.mark.parametrize("criterion", [*CRITERIA, spread])
@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_padding_changes_no_decision(criterion: Any, dtype: torch.dtype) -> None:
    def decided(inputs: Tensor, mask: Any) -> UpdateResult:
        teacher, student = randomise(Tagger(8), 1), randomise(Tagger(8), 1)
        student[2].bias.data.add_(torch.tensor([0.3, 0.0, 0.0, 0.0]))
        guard = Guard(Average(decay=0.5), criterion=criterion, tolerance=1.0)
        return guard.apply(round_context(teacher, student, inputs=inputs, mask=mask))

    generator = torch.Generator().manual_seed(0)
    inputs, padding = torch.randn(4, 3, 6, generator=generator), 30 * torch.randn(4, 3, 20, generator=generator)
    expected = decided(inputs, None)
    assert expected.accepted is True
    result = decided(torch.cat([inputs, padding], 2), (torch.arange(26) < 6).expand(4, 26).to(dtype))
    assert result.accepted is True
    assert result.score_before == pytest.approx(expected.score_before, rel=1e-4)
    assert result.score_after == pytest.approx(expected.score_after, rel=1e-4)
    unmasked = decided(torch.cat([inputs, padding], 2), None)
    assert unmasked.score_before != pytest.approx(expected.score_before, rel=1e-2)


def test_a_criterion_gets_the_mask_if_it_takes_one() -> None:
    mask = torch.tensor([1.0, 0.5, 0.0, 1.0])
    seen: List[Any] = []

    def named(t: Tensor, o: Tensor, s: Tensor, mask: Any) -> Tensor:
        seen.append((mask, len(t)))
        return torch.zeros(())

    def others(t: Tensor, o: Tensor, s: Tensor, **others: Any) -> Tensor:
        return named(t, o, s, others["mask"])

    def without(*three: Tensor) -> Tensor:
        return named(*three, mask=None)

    for criterion in (named, others, functools.partial(named), without):
        Guard(Average(), criterion=criterion).apply(round_context(*pair(), ["fc"], inputs=images(), mask=mask))
    assert len(seen) == 8
    assert all(given is mask and rows == 4 for given, rows in seen[:6])
    assert seen[6:] == [(None, 3)] * 2, "one row for each sample that counts"


def test_a_criterion_may_have_a_coarser_student_under_a_mask() -> None:
    coarse = logits(2, 3, 4, 4)
    finer = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    mask = torch.ones(2, 8, 8).bool()
    mask[:, 4:] = False
    finer[:, :, 4:] = 7.0
    for criterion in (consensus, agreement):
        assert criterion(finer, finer, coarse, mask=mask).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("criterion", ["consensus", None, lambda t, o: t, lambda t, o, s, other: t, lambda: 0])
def test_what_cannot_be_called_with_three_logits_is_refused_at_construction(criterion: Any) -> None:
    with pytest.raises(CldaError, match=r"cannot be called with three logits.*Fix: write for example def criterion"):
        Guard(Average(), criterion=criterion)


def test_a_criterion_whose_arguments_cannot_be_told_is_called_with_three() -> None:
    assert Guard(Average(), criterion=max).criterion is max


def test_a_criterion_may_bind_arguments() -> None:
    criterion = functools.partial(lambda t, o, s, factor: factor * bias_towards_0(t, o, s), factor=2.0)
    teacher, student = pair()
    result = Guard(Average(decay=1.0), criterion=criterion).apply(
        round_context(teacher, student, ["fc"], inputs=images())
    )
    assert result.score_before == pytest.approx(2 * bias_towards_0(teacher.eval()(images()), images(), images()).item())
