"""Class maps: rows of classes go where the map says, and what may be classes but is not known to be is left out."""

import copy
from typing import Any, List, Optional, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clda_core import CollaborativeLearner, Outputs, Schedule, init_student
from clda_core.distillation import KLDistillation
from clda_core.errors import CldaError
from clda_core.lead import FixedTrust
from clda_core.selection import AllLayers
from clda_core.update import AlignedAverage, Average, Guard, agreement
from clda_core.update.classes import MAY_BE_CLASSES, Classes, is_logits
from tests.helpers import loaded, saved
from tests.reference_update import average
from tests.update.rounds import changed, randomise, round_context, same_bits, values

BOTH = pytest.mark.parametrize("kind", [Average, AlignedAverage])
ORDER = [2, 0, 3, 1]


class Net(nn.Module):
    """A network with an auxiliary head, whose output is no part of the logits."""

    def __init__(self, classes: int = 4, width: int = 8) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(5, width), nn.LayerNorm(width)
        self.head, self.auxiliary = nn.Linear(width, classes), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.norm(self.stem(x)).relu()
        self.auxiliary(features)
        return self.head(features)


def images(count: int = 64) -> Tensor:
    return torch.randn(count, 5, generator=torch.Generator().manual_seed(0))


def with_classes(network: nn.Module, order: Sequence[int], heads: Sequence[str] = ("head", "auxiliary")) -> nn.Module:
    """Return a copy whose class ``i`` is the network's class ``order[i]``."""
    copied = copy.deepcopy(network)
    with torch.no_grad():
        for name in heads:
            head = getattr(copied, name)
            head.weight = nn.Parameter(head.weight[list(order)].clone())
            head.bias = nn.Parameter(head.bias[list(order)].clone())
            head.out_features = len(order)
    return copied


def context(teacher: nn.Module, student: nn.Module, class_map: Optional[Sequence[int]], **options: Any) -> Any:
    """Return the context that the learner makes: its forward gives the teacher's logits in the student's classes."""

    def forward(model: nn.Module, inputs: Any) -> Outputs:
        logits = model(inputs)
        return Outputs(logits[:, list(class_map)] if class_map is not None and model is teacher else logits)

    options = {"inputs": images(), "forward": forward, "class_map": class_map, **options}
    return round_context(teacher, student, **options)


@BOTH
@pytest.mark.parametrize("order", [ORDER, [2, 0], [0, 1, 2, 3], [0, 1]], ids=str)
def test_a_student_that_is_the_teacher_in_other_classes_leaves_it_as_it_is(kind: Any, order: List[int]) -> None:
    teacher = randomise(Net(), 1)
    student = with_classes(teacher, order)
    before = values(teacher)
    result = kind(decay=0.5).apply(context(teacher, student, order))
    assert {"stem", "head"} <= set(result.updated)
    for name, value in values(teacher).items():
        assert torch.allclose(value, before[name], atol=1e-6), name


@pytest.mark.parametrize("order", [ORDER, [3, 1]], ids=str)
def test_rows_of_the_head_are_averaged_by_class_and_other_rows_stay_bit_for_bit(order: List[int]) -> None:
    teacher, student = randomise(Net(), 1), randomise(Net(len(order)), 2)
    before = values(teacher)
    result = Average(decay=0.7).apply(context(teacher, student, order, strength=0.5))
    assert result.updated == ("stem", "head")
    assert result.skipped == {"auxiliary: weight": MAY_BE_CLASSES, "auxiliary: bias": MAY_BE_CLASSES}
    now, theirs = values(teacher), values(student)
    for name in ("head.weight", "head.bias"):
        for index, of in enumerate(order):
            expected = average(before[name][of], theirs[name][index], 0.7, 0.5)
            assert np.allclose(now[name][of].numpy(), expected, atol=1e-6)
        others = [of for of in range(4) if of not in order]
        assert same_bits(now[name][others], before[name][others])


@pytest.mark.parametrize("order", [ORDER, [3, 1]], ids=str)
def test_aligned_rows_are_averaged_by_class(order: List[int]) -> None:
    teacher = randomise(Net(), 1)
    student = with_classes(teacher, order)
    with torch.no_grad():
        student.head.bias.add_(torch.arange(1.0, len(order) + 1))
    before = values(teacher)
    AlignedAverage(decay=0.5).apply(context(teacher, student, order, selected=["head"]))
    moved = torch.zeros(4)
    moved[order] = torch.arange(1.0, len(order) + 1) / 2
    assert torch.allclose(teacher.head.bias - before["head.bias"], moved, atol=1e-6)
    assert torch.allclose(teacher.head.weight, before["head.weight"], atol=1e-6)


@BOTH
def test_a_teachers_class_that_several_of_the_students_share_keeps_its_row(kind: Any) -> None:
    teacher, student = randomise(Net(), 1), randomise(Net(3), 2)
    student.stem.load_state_dict(teacher.stem.state_dict())
    before = values(teacher)
    kind(decay=0.5).apply(context(teacher, student, [1, 3, 3]))
    kept = (teacher.head.bias == before["head.bias"]).tolist()
    assert kept == [True, False, True, True]


@BOTH
@pytest.mark.parametrize("batch", [None, images(8)], ids=["no inputs", "8 images"])
def test_where_the_head_cannot_be_found_it_is_left_out_until_it_can(kind: Any, batch: Any) -> None:
    if kind is AlignedAverage and batch is None:
        batch = images(31)
    teacher, student = randomise(Net(), 1), randomise(Net(), 2)
    before, update = values(teacher), kind(decay=0.5)
    result = update.apply(context(teacher, student, ORDER, inputs=batch))
    assert "head" not in result.updated
    assert "head.weight" not in changed(teacher, before)
    assert {"head: weight", "head: bias"} <= set(result.skipped)
    assert "head" in update.apply(context(teacher, student, ORDER)).updated


@BOTH
def test_a_head_that_puts_out_nothing_yet_is_left_out(kind: Any) -> None:
    teacher, student = randomise(Net(), 1), randomise(Net(), 2)
    nn.init.zeros_(student.head.weight)
    nn.init.zeros_(student.head.bias)
    before = values(teacher)
    result = kind(decay=0.5).apply(context(teacher, student, ORDER))
    assert not {"head.weight", "head.bias"}.intersection(changed(teacher, before))
    assert {"head: weight", "head: bias"} <= set(result.skipped)


def test_layers_as_wide_as_there_are_classes_are_left_out() -> None:
    teacher, student = (randomise(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 4)), seed) for seed in (1, 2))
    before = values(teacher)
    result = Average(decay=0.5).apply(context(teacher, student, ORDER))
    assert changed(teacher, before) == ["2.bias"], (
        "which has a row for each class; the weight may have columns of them too"
    )
    assert set(result.skipped) == {"0: weight", "0: bias", "2: weight"}
    assert set(result.skipped.values()) == {MAY_BE_CLASSES}
    same = Average(decay=0.5).apply(context(teacher, student, [0, 1, 2, 3]))
    assert same.updated == ("0", "2"), "nothing has another place"
    assert not same.skipped


def test_of_heads_of_other_widths_the_biases_are_averaged_by_class_alone() -> None:
    teacher, student = randomise(Net(width=8), 1), randomise(Net(width=6), 2)
    before = values(teacher)
    result = Average(decay=0.5).apply(context(teacher, student, ORDER))
    assert changed(teacher, before) == ["head.bias"]
    assert "head: weight" in result.skipped
    for index, of_teacher in enumerate(ORDER):
        expected = (before["head.bias"][of_teacher] + student.head.bias[index]) / 2
        assert teacher.head.bias[of_teacher].item() == pytest.approx(expected.item())
    before = values(student)
    result = init_student(student, teacher, inputs=images(), class_map=ORDER)
    assert changed(student, before) == ["head.bias"]
    assert torch.equal(student.head.bias, teacher.head.bias[ORDER])
    assert "head: weight" in result.skipped


def test_a_scalar_parameter_is_no_head() -> None:
    class Scaled(Net):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * super().forward(x)

    teacher, student = Scaled(2.0), Scaled(4.0)
    result = Average(decay=0.5).apply(context(teacher, student, ORDER))
    assert {"head", "scale"} <= set(result.updated)
    assert teacher.scale.item() == 3.0


def test_a_head_with_its_classes_in_the_second_dimension_is_left_out() -> None:
    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prototypes = nn.Parameter(torch.zeros(8, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.prototypes

    teacher, student = (randomise(nn.Sequential(nn.Linear(5, 8), Cosine()), seed) for seed in (1, 2))
    before = values(teacher)
    result = Average(decay=0.5).apply(context(teacher, student, ORDER))
    assert result.skipped == {"1: prototypes": MAY_BE_CLASSES}
    assert changed(teacher, before) == ["0.weight", "0.bias"]


@BOTH
def test_the_learner_passes_the_class_map_on(kind: Any) -> None:
    teacher = randomise(Net(), 1).eval()
    student = with_classes(teacher, ORDER)
    expected = teacher(images())
    learner = CollaborativeLearner(
        teacher,
        student,
        update=kind(decay=0.5),
        selection=AllLayers(),
        distillation=KLDistillation(class_map=ORDER),
        schedule=Schedule(interval=1),
        trust=FixedTrust(),
    )
    for _ in range(2):
        assert learner.distill(student(images()), images()).item() == pytest.approx(0, abs=1e-6)
        learner.step(step_fn=lambda: None)
    assert "head" in learner.report().rounds[1].updated
    assert torch.allclose(teacher(images()), expected, atol=1e-5)


def test_both_models_are_run_once_for_the_classes_and_not_at_all_without_a_class_map() -> None:
    teacher, student = randomise(Net(), 1), randomise(Net(), 2)
    runs: List[nn.Module] = []
    for model in (teacher, student):
        model.register_forward_hook(lambda module, _, output: runs.append(module))
    update = Average()
    for selected in (None, ["head"], ["stem"]):
        update.apply(context(teacher, student, ORDER, selected=selected))
    assert runs == [teacher, student]
    update.apply(context(teacher, student, None))
    assert len(runs) == 2
    update.apply(context(teacher, student, ORDER[::-1]))
    assert len(runs) == 4


@BOTH
@pytest.mark.parametrize("guarded", [True, False])
def test_a_resumed_update_averages_classes_on_a_small_batch_as_one_that_was_not_interrupted(
    kind: Any, guarded: bool
) -> None:
    teacher, student = randomise(Net(), 1), randomise(Net(), 2)
    update, resumed = (
        Guard(kind(decay=0.5), criterion=agreement, tolerance=9.0) if guarded else kind(decay=0.5) for _ in range(2)
    )
    update.apply(context(teacher, student, ORDER))
    resumed.load_state_dict(loaded(saved(update.state_dict())))
    before, results = copy.deepcopy(teacher.state_dict()), []
    for one in (update, resumed):
        teacher.load_state_dict(before)
        result = one.apply(context(teacher, student, ORDER, inputs=images(4)))
        results.append((result.updated, dict(result.skipped), teacher.head.weight.tolist()))
    assert "head" in results[0][0]
    assert results[0] == results[1]


@pytest.mark.parametrize("order", [ORDER, [3, 1], [0, 2, 2]], ids=str)
def test_init_student_copies_the_rows_of_its_classes(order: List[int]) -> None:
    teacher, student = randomise(Net(width=16), 1), randomise(Net(len(order), width=16), 2)
    before = values(student)
    student.train()
    result = init_student(student, teacher, inputs=images(), class_map=order)
    assert result.updated == ("stem", "head")
    assert result.skipped == {"auxiliary: weight": MAY_BE_CLASSES, "auxiliary: bias": MAY_BE_CLASSES}
    assert torch.allclose(student.eval()(images()), teacher.eval()(images())[:, order], atol=1e-5)
    assert torch.equal(student.head.weight, teacher.head.weight[order])
    assert same_bits(values(student)["auxiliary.weight"], before["auxiliary.weight"])


def test_init_student_reads_the_logits_by_extract() -> None:
    class Named(Net):
        def forward(self, x: Tensor) -> Any:
            return {"logits": super().forward(x)}

    teacher, student = randomise(Named(), 1), randomise(Named(2), 2)
    init_student(student, teacher, inputs=images(), class_map=[3, 1], extract=lambda output: output["logits"])
    assert torch.equal(student.head.bias, teacher.head.bias[[3, 1]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "layers that make the logits cannot be found.*received no inputs"),
        ({"inputs": images(31)}, "expected a batch of at least 32 samples.*received a smaller one"),
        ({"inputs": images(), "class_map": [0, 1, 2]}, r"class_map does not fit.*received \[0, 1, 2\] and 4 classes"),
        ({"inputs": images(), "class_map": [0, 1, 2, 4]}, "class_map does not fit.*classes of the teacher"),
        ({"inputs": images(), "class_map": "0123"}, "class_map is of a wrong type"),
    ],
)
def test_init_student_refuses_a_class_map_it_cannot_follow(options: Any, message: str) -> None:
    teacher, student = randomise(Net(), 1), randomise(Net(), 2)
    before = values(student)
    with pytest.raises(CldaError, match=message):
        init_student(student, teacher, **{"class_map": ORDER, **options})
    assert not changed(student, before)


def test_what_may_be_classes() -> None:
    classes = Classes((2, 0))
    assert classes.concern((3, 7), (2, 7))
    assert classes.concern((7, 3), (7, 2))
    assert classes.concern((2, 9), (2, 9)) is False, "the teacher has three classes at least"
    assert classes.concern((5, 5, 3, 3), (5, 5, 2, 2)) is False, "kernels are no classes"
    assert classes.concern((), ()) is False
    assert Classes((0, 1)).concern((2, 2), (2, 2)) is False, "all classes keep their places"
    assert Classes((0, 1)).concern((3, 2), (2, 2))


def test_what_cannot_be_compared_with_the_logits_is_not_the_logits() -> None:
    logits = images(40)
    assert is_logits(2 * logits + 1, logits)
    assert not is_logits(logits, None)
    assert not is_logits(logits[:, :4], logits)
    assert not is_logits(logits[:, [1, 0, 2, 3, 4]], logits)
    assert not is_logits(logits[:31], logits[:31]), "too few rows to tell"
    assert not is_logits(logits[:36], logits), "another batch"
    assert not is_logits(logits[:, :, None, None], logits), "a grid of another rank"
