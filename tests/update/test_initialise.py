from typing import Any

import pytest
import torch
from torch import nn

from clda_core import init_student
from clda_core.errors import CldaError
from clda_core.relation import Explicit
from tests.helpers import no_traces
from tests.models import ResNet, SegFormer, ViT, mlp
from tests.update.rounds import changed, randomise, same_bits, values


@pytest.mark.parametrize(
    ("depths", "student_depths", "sources"),
    [
        ((4, 6), (2, 1), {"layer1.0": "layer1.0", "layer1.1": "layer1.3", "layer2.0": "layer2.0"}),
        (
            (5, 1),
            (3, 1),
            {"layer1.0": "layer1.0", "layer1.1": "layer1.2", "layer1.2": "layer1.4", "layer2.0": "layer2.0"},
        ),
        ((2, 1), (2, 1), {"layer1.0": "layer1.0", "layer1.1": "layer1.1", "layer2.0": "layer2.0"}),
    ],
)
def test_unequal_depth_copies_by_relative_place_with_buffers(depths: Any, student_depths: Any, sources: Any) -> None:
    teacher, student = randomise(ResNet(depths), 1), randomise(ResNet(student_depths), 2)
    of_teacher, before = values(teacher), values(student)
    with no_traces(teacher, student):
        result = init_student(student, teacher)
    sources = {"conv1": "conv1", "bn1": "bn1", **sources, "fc": "fc"}
    assert result.updated == tuple(name for name in sources if name != "bn1")
    assert not result.skipped
    assert not changed(teacher, of_teacher)
    for name, now in values(student).items():
        layer = next(layer for layer in sources if name.startswith(layer + "."))
        twin = of_teacher[sources[layer] + name[len(layer) :]]
        assert same_bits(now, twin if now.is_floating_point() else before[name]), name


def test_a_student_copied_whole_predicts_what_the_teacher_does() -> None:
    teacher, student = randomise(SegFormer(), 1), randomise(SegFormer(), 2)
    init_student(student, teacher)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(student.eval()(x), teacher.eval()(x))


def test_what_does_not_fit_is_skipped_with_its_reason_and_kept() -> None:
    teacher, student = randomise(mlp(hidden=6), 1), randomise(mlp(hidden=4), 2)
    before = values(student)
    result = init_student(student, teacher)
    assert result.updated == ("5",)
    assert changed(student, before) == ["5.bias"]
    assert result.skipped["5: weight"] == "shapes differ: (3, 4) in the student, (3, 6) in the teacher"


def test_a_given_relation_and_its_gaps() -> None:
    teacher, student = randomise(ViT(), 1), randomise(ViT(), 2)
    before = values(student)
    result = init_student(student, teacher, Explicit({"blocks.0": "blocks.2"}))
    assert result.updated == ("blocks.2",)
    assert result.skipped["norm"] == "no related teacher layer"
    assert all(name.startswith("blocks.2.") for name in changed(student, before))
    assert torch.equal(student.blocks[2].mlp.fc1.weight, teacher.blocks[0].mlp.fc1.weight)


def test_a_regrouping() -> None:
    teacher, student = randomise(mlp(), 1), randomise(mlp(), 2)
    result = init_student(student, teacher, layers=["0", "5"])
    assert result.updated == ("0", "5")
    assert not torch.equal(student[2].weight, teacher[2].weight)


def test_a_regrouping_copies_what_frozen_norms_keep_in_buffers() -> None:
    def network(seed: int) -> nn.Module:
        norm = nn.BatchNorm2d(4, affine=False)
        for name in ("weight", "bias"):  # as torchvision's FrozenBatchNorm2d
            delattr(norm, name)
            norm.register_buffer(name, torch.ones(4))
        return randomise(nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1)), seed).eval()

    teacher, student, x = network(1), network(2), torch.randn(2, 3, 4, 4)
    init_student(student, teacher, layers=["0", "2"])
    assert torch.equal(student(x), teacher(x))


def test_nothing_to_copy_leaves_the_student_unchanged() -> None:
    teacher, student = nn.Sequential(nn.Linear(2, 4)), nn.Sequential(nn.Linear(2, 3))
    before = values(student)
    with pytest.raises(
        CldaError, match=r"no teacher layer can be copied.*0: weight.*\(3, 2\) in the student, \(4, 2\) in"
    ):
        init_student(student, teacher)
    assert not changed(student, before)


def test_reasons_name_the_right_model() -> None:
    teacher = nn.ModuleDict({"a": nn.Linear(2, 3, bias=False)})
    teacher["a"].register_parameter("scale", nn.Parameter(torch.ones(9)))
    student = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(1, 1)})
    result = init_student(student, teacher)
    assert result.skipped == {"a: bias": "teacher layer 'a' has no 'bias'", "b": "no related teacher layer"}


def test_a_half_copied_student_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = randomise(mlp(), 1), randomise(mlp(), 2)
    before = values(student)
    module = __import__("clda_core.update.initialise", fromlist=["pair_tensors"])
    pair_tensors = module.pair_tensors

    def failing(into: nn.Module, layer: Any, *rest: Any) -> Any:
        if layer.name == "5":
            assert changed(student, before)
            raise ValueError("stop")
        return pair_tensors(into, layer, *rest)

    monkeypatch.setattr(module, "pair_tensors", failing)
    with pytest.raises(ValueError, match="stop"):
        init_student(student, teacher)
    assert not changed(student, before)


def test_bad_input() -> None:
    model = mlp()
    with pytest.raises(CldaError, match="share parameters.*received the same object twice"):
        init_student(model, model)
    with pytest.raises(CldaError, match="the teacher is no model"):
        init_student(model, "resnet50")  # type: ignore[arg-type]
    with pytest.raises(CldaError, match="relation returned something else.*received dict"):
        init_student(model, mlp(), lambda teacher, student, inputs: {})  # type: ignore[arg-type]


def test_swapped_models_are_refused_and_unchanged() -> None:
    teacher, student = mlp(), nn.Sequential(nn.Linear(2, 2))
    before = values(teacher)
    expected = r"the student is larger than the teacher: expected init_student\(student, teacher\)"
    with pytest.raises(CldaError, match=expected):
        init_student(teacher, student)
    assert not changed(teacher, before)
