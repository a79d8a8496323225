"""The projectors: made lazily, apart from the host's random state, saved and restored."""

import copy
import pickle

import pytest
import torch

from clda_core.distillation import FeatureDistillation, feature_distillation
from tests.distillation.cases import pair

STUDENT = (torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.ones(2, 6))
TEACHER = (torch.randn(2, 8, 2, 2, generator=torch.Generator().manual_seed(1)), torch.zeros(2, 6))


def test_projectors_are_made_by_the_first_call_from_the_widths():
    loss = FeatureDistillation()
    assert not loss.state_dict()
    loss(STUDENT, TEACHER)
    shapes = {name: tuple(tensor.shape) for name, tensor in loss.state_dict().items()}
    assert shapes == {
        "projectors.0.weight": (8, 3),
        "projectors.0.bias": (8,),
        "projectors.1.weight": (6, 6),
        "projectors.1.bias": (6,),
    }
    before = [id(parameter) for parameter in loss.parameters()]
    loss(STUDENT, TEACHER)
    assert [id(parameter) for parameter in loss.parameters()] == before


def test_only_mismatched_widths_are_projected_on_demand():
    loss = FeatureDistillation(project="mismatched")
    loss(STUDENT, TEACHER)
    assert list(loss.projectors) == ["0"]
    assert FeatureDistillation(project="mismatched")(STUDENT[1], TEACHER[1]).item() == pytest.approx(1.0)


def test_projection_is_a_linear_map_at_every_position():
    loss = FeatureDistillation()
    student, teacher = pair(2, 3, 4, 4, dtype=torch.float32)[0], pair(2, 5, 4, 4, dtype=torch.float32)[1]
    value = loss(student, teacher)
    projector = loss.projectors["0"]
    projected = torch.nn.functional.conv2d(student, projector.weight[:, :, None, None], projector.bias)
    assert value.item() == pytest.approx(feature_distillation(projected, teacher).item(), rel=1e-5)


def test_making_projectors_leaves_the_random_state_and_does_not_depend_on_it():
    starts = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        loss = FeatureDistillation()
        loss(STUDENT, TEACHER)
        assert torch.equal(torch.get_rng_state(), before)
        starts.append(loss.state_dict())
    assert all(torch.equal(starts[0][name], starts[1][name]) for name in starts[0])
    assert starts[0]["projectors.0.weight"].std() > 0.1


def test_projectors_learn_and_only_they_and_the_student_get_gradients():
    loss = FeatureDistillation()
    student = [feature.clone().requires_grad_() for feature in STUDENT]
    teacher = [feature.clone().requires_grad_() for feature in TEACHER]
    first = loss(student, teacher)
    first.backward()
    assert all(feature.grad is not None for feature in student)
    assert all(feature.grad is None for feature in teacher)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    optimizer.step()
    assert loss(STUDENT, TEACHER) < first


@pytest.mark.parametrize("restore", ["load", "pickle", "deepcopy"])
def test_a_restored_loss_goes_on_the_same(restore):
    loss = FeatureDistillation()
    loss(STUDENT, TEACHER).backward()
    torch.optim.SGD(loss.parameters(), lr=0.1).step()
    if restore == "load":
        restored = FeatureDistillation()
        restored.load_state_dict(loss.state_dict())
    else:
        restored = pickle.loads(pickle.dumps(loss)) if restore == "pickle" else copy.deepcopy(loss)
    assert restored(STUDENT, TEACHER) == loss(STUDENT, TEACHER)
    assert [parameter.requires_grad for parameter in restored.parameters()] == [True] * 4


def test_loading_into_made_projectors_keeps_the_parameters():
    loss, other = FeatureDistillation(), FeatureDistillation()
    loss(STUDENT, TEACHER)
    other(STUDENT, TEACHER).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    before = [id(parameter) for parameter in loss.parameters()]
    loss.load_state_dict(other.state_dict())
    assert [id(parameter) for parameter in loss.parameters()] == before
    assert loss(STUDENT, TEACHER) == other(STUDENT, TEACHER)


def test_loading_another_architecture_is_refused():
    loss, other = FeatureDistillation(), FeatureDistillation()
    loss(STUDENT, TEACHER)
    other(TEACHER, STUDENT)
    with pytest.raises(RuntimeError, match="size mismatch"):
        loss.load_state_dict(other.state_dict())


@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="this torch has no autocast on the CPU")
def test_projection_is_not_autocast():
    loss = FeatureDistillation()
    expected = loss(STUDENT, TEACHER)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert loss(STUDENT, TEACHER) == expected


def test_gradcheck_through_the_projector():
    student, teacher = pair(2, 3, 2, 2)[0].requires_grad_(), pair(2, 4, 2, 2)[1]
    mask = torch.tensor([[[True, False], [True, True]]] * 2)
    loss = FeatureDistillation()
    assert torch.autograd.gradcheck(lambda x: loss(x, teacher, mask), (student,))


@pytest.mark.skipif(not hasattr(torch, "inference_mode"), reason="came with torch 1.9")
def test_projectors_made_in_inference_mode_can_be_trained():
    """Validation may come before the first training step, as it does in Lightning."""
    loss = FeatureDistillation()
    with torch.inference_mode():
        loss((torch.ones(2, 3),), (torch.ones(2, 4),))
    loss((torch.ones(2, 3),), (torch.ones(2, 4),)).backward()
    assert next(loss.parameters()).grad is not None
