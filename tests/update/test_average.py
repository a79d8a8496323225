import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from clda_core.errors import CldaError
from clda_core.update import Average
from tests.models import ResNet, ViT, Wrapped, mlp
from tests.reference_update import average
from tests.update.rounds import changed, randomise, round_context, values


def close(tensor: torch.Tensor, oracle: Any) -> bool:
    return torch.allclose(tensor.double(), torch.from_numpy(oracle), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("decay", [0.0, 0.25, 0.999])
@pytest.mark.parametrize("strength", [1.0, 0.3])
@pytest.mark.parametrize("buffers", ["keep", "average"])
def test_equals_the_formula_on_the_related_layer_and_touches_nothing_else(
    decay: float, strength: float, buffers: Any
) -> None:
    teacher, student = randomise(ResNet((3, 1)), 1), randomise(ResNet((2, 1)), 2)
    teacher.layer1[2].bn1.num_batches_tracked += 7
    teacher.layer1[2].register_buffer("scratch", torch.ones(2), persistent=False)
    student.layer1[1].register_buffer("scratch", torch.zeros(2), persistent=False)
    of_teacher, of_student = values(teacher), values(student)
    context = round_context(teacher, student, ["layer1.2", "fc"], strength=strength)
    result = Average(decay=decay, buffers=buffers).apply(context)
    assert result.updated == ("layer1.2", "fc")
    assert not result.skipped
    related = {"layer1.2.": "layer1.1.", "fc.": "fc."}
    moved = [name for name in of_teacher if name.startswith(tuple(related)) and "scratch" not in name]
    moved = [name for name in moved if "num_batches" not in name and (buffers == "average" or "running" not in name)]
    assert sorted(changed(teacher, of_teacher)) == sorted(moved)
    now = values(teacher)
    for name in moved:
        twin = name.replace("layer1.2.", "layer1.1.")
        assert close(now[name], average(of_teacher[name], of_student[twin], decay, strength)), name
    assert not changed(student, of_student)


def test_decay_0_copies_and_decay_1_or_strength_0_changes_nothing() -> None:
    teacher, student = randomise(ViT(), 1), randomise(ViT(), 2)
    before = values(teacher)
    Average(decay=1.0).apply(round_context(teacher, student))
    Average(decay=0.0).apply(round_context(teacher, student, strength=0.0))
    assert not changed(teacher, before)
    Average(decay=0.0).apply(round_context(teacher, student))
    assert not changed(teacher, values(student))


def test_what_has_no_counterpart_is_skipped_by_name_with_its_reason() -> None:
    teacher, student = randomise(mlp(hidden=6), 1), randomise(mlp(hidden=4), 2)
    before = values(teacher)
    context = round_context(
        teacher, student, ["0", "5"], related={"5": round_context(student, student, ["5"]).layers[0]}
    )
    result = Average(decay=0.5).apply(context)
    assert result.updated == ("5",)
    assert result.skipped == {
        "0": "no related student layer",
        "5: weight": "shapes differ: (3, 6) in the teacher, (3, 4) in the student",
    }
    assert changed(teacher, before) == ["5.bias"]


def test_a_layer_of_which_nothing_fits_is_not_updated() -> None:
    teacher, student = mlp(hidden=6), mlp(hidden=4)
    result = Average().apply(round_context(teacher, student, ["0"]))
    assert result.updated == ()
    assert set(result.skipped) == {"0: weight", "0: bias"}


def test_tied_weights_are_written_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight

    teacher, student = randomise(Tied(), 1), randomise(Tied(), 2)
    before = values(teacher)
    Average(decay=0.5).apply(round_context(teacher, student))
    assert teacher.second.weight is teacher.first.weight
    assert close(teacher.first.weight, average(before["first.weight"], student.first.weight, 0.5))


def test_a_wrapped_student_in_half_precision() -> None:
    teacher, student = randomise(mlp(), 1), randomise(mlp(), 2).half()
    before = values(teacher)
    result = Average(decay=0.5).apply(round_context(teacher, Wrapped(student)))
    assert result.updated == ("0", "2", "5")
    for (name, now), (_, twin) in zip(teacher.named_parameters(), student.named_parameters()):
        assert now.dtype == torch.float32
        assert close(now, average(before[name], twin, 0.5))


def test_it_has_no_state() -> None:
    update = Average()
    assert update.state_dict() == {}
    update.load_state_dict({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": -0.1}, "decay is out of range.*>= 0 and <= 1.*received -0.1"),
        ({"decay": 1.1}, "decay is out of range"),
        ({"decay": float("nan")}, "decay is not a finite number"),
        ({"decay": "0.9"}, "decay is not a finite number"),
        ({"buffers": "copy"}, "buffers is unknown: expected 'keep' or 'average', received 'copy'"),
    ],
)
def test_bad_options(options: Any, message: str) -> None:
    with pytest.raises(CldaError, match=message):
        Average(**options)


def _new_head(model: Any) -> None:
    model.fc = randomise(copy.deepcopy(model.fc), 7)


def _new_weight(model: Any) -> None:
    model.fc.weight = torch.nn.Parameter(torch.full_like(model.fc.weight, 3.0))


def _new_statistics(model: Any) -> None:
    model.layer1[0].bn1.running_mean = torch.full_like(model.layer1[0].bn1.running_mean, 3.0)


@pytest.mark.parametrize("change", [_new_head, _new_weight, _new_statistics, nn.Module.double])
@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_later_rounds_follow_a_model_that_was_changed(change: Any, whose: str) -> None:
    models = {"teacher": randomise(ResNet((2, 1)), 1), "student": randomise(ResNet((2, 1)), 2)}
    update = Average(decay=0.5, buffers="average")
    update.apply(round_context(models["teacher"], models["student"]))
    change(models[whose])
    twins = copy.deepcopy(models)
    update.apply(round_context(models["teacher"], models["student"]))
    Average(decay=0.5, buffers="average").apply(round_context(twins["teacher"], twins["student"]))
    assert not changed(models["teacher"], values(twins["teacher"]))
    assert not changed(models["student"], values(twins["student"]))


@pytest.mark.parametrize("whose", ["teacher", "student"])
def test_a_model_without_buffers_may_change_its_dtype_between_rounds(whose: str) -> None:
    """It keeps its Parameters then, and gives them other memory."""
    models = {"teacher": randomise(mlp(), 1), "student": randomise(mlp(), 2)}
    update = Average(decay=0.5)
    update.apply(round_context(models["teacher"], models["student"]))
    models[whose].double()
    before = values(models["teacher"])
    update.apply(round_context(models["teacher"], models["student"]))
    for name, parameter in models["teacher"].named_parameters():
        assert parameter.dtype == before[name].dtype
        assert close(parameter, average(before[name], models["student"].state_dict()[name], 0.5)), name


def test_rounds_after_the_first_follow_the_formula_too() -> None:
    teacher, student = randomise(ResNet((3, 2)), 1), randomise(ResNet((2, 1)), 2)
    update, context = Average(decay=0.5), round_context(teacher, student, ["layer1.2", "layer2.1"])
    for _ in range(3):
        before = values(teacher)
        assert update.apply(context).updated == ("layer1.2", "layer2.1")
        for ours, theirs in (("layer1.2", "layer1.1"), ("layer2.1", "layer2.0")):
            for name in ("conv2.weight", "bn2.bias"):
                now, source = teacher.state_dict()[f"{ours}.{name}"], student.state_dict()[f"{theirs}.{name}"]
                assert close(now, average(before[f"{ours}.{name}"], source, 0.5)), (ours, name)


def test_one_update_serves_other_models_layers_and_relations_too() -> None:
    update, other = Average(decay=0.5), randomise(ResNet((2, 1)), 3)
    for seed, names in ((1, None), (1, ["fc"]), (2, ["layer1.0", "fc"])):
        teacher, twin = (randomise(ResNet((2, 1)), seed) for _ in range(2))
        result = update.apply(round_context(teacher, other, names))
        expected = Average(decay=0.5).apply(round_context(twin, other, names))
        assert result == expected
        assert not changed(teacher, values(twin))


def test_it_keeps_no_model_alive_and_can_be_pickled() -> None:
    update, teacher = Average(), randomise(mlp(), 1)
    update.apply(round_context(teacher, randomise(mlp(), 2)))
    dead = [weakref.ref(teacher), *map(weakref.ref, teacher.parameters())]
    del teacher
    gc.collect()
    assert not any(reference() is not None for reference in dead)
    restored = pickle.loads(pickle.dumps(update))
    teacher, twin, student = (randomise(mlp(), seed) for seed in (1, 1, 2))
    restored.apply(round_context(teacher, student))
    Average().apply(round_context(twin, student))
    assert not changed(teacher, values(twin))
