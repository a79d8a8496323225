"""What holds for every loss: the oracle's value, the gradient, the laws, the dtypes and the masks."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import clda_core.distillation.chunked as chunked_module
from clda_core.distillation import FeatureDistillation, decoupled_distillation, kl_distillation
from clda_core.errors import CldaError
from tests.distillation.cases import (
    FEATURE_LOSSES,
    LOGIT_LOSSES,
    LOSSES,
    SPATIAL,
    STRATEGIES,
    flat,
    ignoring,
    pair,
    weights_of,
)

quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)
every_loss = pytest.mark.parametrize("name", LOSSES)
every_logit_loss = pytest.mark.parametrize("name", LOGIT_LOSSES)


def gradient(loss, student, *args, **kwargs):
    student = student.detach().clone().requires_grad_()
    value = loss(student, *args, **kwargs)
    value.backward()
    return value.detach(), student.grad


@every_loss
@pytest.mark.parametrize("kind", ["none", "bool", "float", "labels"])
@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 5), (2, 3, 4, 3), (2, 3, 2, 3, 2)], ids=str)
def test_matches_the_oracle(name, shape, kind):
    if len(shape) == 2 and name in SPATIAL:
        pytest.skip("needs spatial dimensions")
    loss, oracle = LOSSES[name]
    student, teacher = pair(*shape)
    mask, weights = weights_of((shape[0], *shape[2:]), kind)
    expected = oracle(flat(student), flat(teacher), None if weights is None else weights.reshape(shape[0], -1).numpy())
    options = {"temperature": 1.0} if name in LOGIT_LOSSES else {}
    options.update(ignoring(kind))
    assert loss(student, teacher, mask, **options).item() == pytest.approx(expected, rel=1e-9)
    single = loss(student.float(), teacher.float(), mask, **options)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(expected, rel=1e-4)


@every_logit_loss
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_temperature_matches_the_oracle(name, temperature):
    loss, oracle = LOSSES[name]
    student, teacher = pair(2, 3, 2, 3)
    expected = oracle(flat(student), flat(teacher), temperature=temperature)
    assert loss(student, teacher, temperature=temperature).item() == pytest.approx(expected, rel=1e-9)


@every_loss
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_gradient_is_that_of_finite_differences(name, kind):
    student, teacher = pair(2, 3, 2, 3)
    mask, _ = weights_of((2, 2, 3), kind)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: LOSSES[name][0](x, teacher, mask), (student,))


@every_loss
def test_gradient_goes_to_the_student_only(name):
    student, teacher = (x.requires_grad_() for x in pair(2, 3, 4, 4))
    LOSSES[name][0](student, teacher).backward()
    assert student.grad.abs().sum() > 0
    assert teacher.grad is None


@every_loss
def test_without_gradients_there_is_no_graph(name):
    student, teacher = pair(2, 3, 4, 4)
    assert not LOSSES[name][0](student, teacher).requires_grad


@every_loss
def test_upstream_gradient_and_second_backward(name):
    student, teacher = pair(2, 3, 4, 4)
    _, once = gradient(LOSSES[name][0], student, teacher)
    leaf = student.clone().requires_grad_()
    loss = 3 * LOSSES[name][0](leaf, teacher)
    loss.backward(retain_graph=True)
    loss.backward()
    np.testing.assert_allclose(leaf.grad, 6 * once, rtol=1e-12, atol=1e-15)


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_identical_student_and_teacher_cost_nothing(name, dtype):
    student, _ = pair(2, 3, 4, 4, dtype=dtype)
    value, slope = gradient(LOSSES[name][0], student, student)
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert slope.float().abs().max().item() < 1e-5


@every_loss
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_image_size_does_not_matter(name, kind):
    student, teacher = pair(2, 3, 4, 3)
    mask, _ = weights_of((2, 4, 3), kind)
    tiled = LOSSES[name][0](
        student.repeat(1, 1, 2, 3), teacher.repeat(1, 1, 2, 3), None if mask is None else mask.repeat(1, 2, 3)
    )
    assert tiled.item() == pytest.approx(LOSSES[name][0](student, teacher, mask).item(), rel=1e-9)


@every_logit_loss
def test_loss_scales_with_the_squared_temperature(name):
    student, teacher = pair(2, 3, 4, 3)
    loss = LOSSES[name][0]
    at_one = loss(student, teacher, temperature=1.0).item()
    assert loss(3 * student, 3 * teacher, temperature=3.0).item() == pytest.approx(9 * at_one, rel=1e-9)


@quick
@given(st.sampled_from(sorted(LOGIT_LOSSES)), st.integers(0, 1000), st.floats(-50, 50))
def test_shifted_logits_are_the_same_logits(name, seed, shift):
    student, teacher = pair(2, 3, 4, seed=seed)
    loss = LOSSES[name][0]
    # CWD normalises over positions, so a shift of each channel drops out there; elsewhere one of each position.
    shifts = shift * pair(2, 3, 1, seed=seed + 1)[0] if name == "channel_wise" else shift * pair(2, 1, 4)[0]
    assert loss(student + shifts, teacher).item() == pytest.approx(loss(student, teacher).item(), rel=1e-6, abs=1e-9)


@quick
@given(st.sampled_from(sorted(LOSSES)), st.integers(0, 1000))
def test_losses_are_not_negative(name, seed):
    student, teacher = pair(2, 3, 4, seed=seed)
    assert LOSSES[name][0](student, teacher).item() >= 0


@quick
@given(st.sampled_from(sorted(LOSSES)), st.integers(0, 1000), st.floats(1e-3, 1e3))
def test_only_ratios_of_the_weights_matter(name, seed, factor):
    student, teacher = pair(2, 3, 4, seed=seed)
    mask, _ = weights_of((2, 4), "float", seed)
    loss = LOSSES[name][0]
    assert loss(student, teacher, factor * mask).item() == pytest.approx(loss(student, teacher, mask).item(), rel=1e-9)


@every_loss
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e30])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_values_at_ignored_positions_do_not_matter(name, whose, value):
    student, teacher = pair(2, 3, 4, 3, dtype=torch.float32)
    mask, _ = weights_of((2, 4, 3), "bool")
    loss = LOSSES[name][0]
    expected, slope = gradient(loss, student, teacher, mask)
    spoilt = (student if whose == "student" else teacher).clone()
    spoilt.masked_fill_(~mask.unsqueeze(1), value)
    got = gradient(loss, spoilt, teacher, mask) if whose == "student" else gradient(loss, student, spoilt, mask)
    assert got[0] == expected
    assert torch.equal(got[1], slope)
    assert (slope.masked_select(~mask.unsqueeze(1)) == 0).all()


@every_loss
def test_nan_at_ignored_positions_does_not_spread_by_resizing(name):
    student, teacher = pair(2, 3, 4, 4, dtype=torch.float32)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[:, :2, 1] = False
    student = student.masked_fill(~mask.unsqueeze(1), float("nan"))
    value, slope = gradient(LOSSES[name][0], student, teacher[:, :, :2, :2], mask)
    assert torch.isfinite(value)
    assert torch.isfinite(slope).all()


@every_loss
@pytest.mark.parametrize("shape", [(2, 3, 4, 3), (2, 3)], ids=str)
def test_no_valid_position_means_zero_loss_and_gradient(name, shape):
    if len(shape) == 2 and name in SPATIAL:
        pytest.skip("needs spatial dimensions")
    student, teacher = pair(*shape, dtype=torch.float32)
    student[0, 0] = float("nan")
    value, slope = gradient(LOSSES[name][0], student, teacher, torch.zeros(2, *shape[2:], dtype=torch.bool))
    assert value.item() == 0
    assert (slope == 0).all()


@every_loss
def test_images_without_a_valid_position_do_not_count(name):
    student, teacher = pair(3, 3, 4, 3)
    mask, _ = weights_of((3, 4, 3), "bool")
    mask[1] = False
    loss = LOSSES[name][0]
    kept = [0, 2]
    assert loss(student, teacher, mask).item() == pytest.approx(
        loss(student[kept], teacher[kept], mask[kept]).item(), rel=1e-9
    )


@every_loss
@pytest.mark.parametrize("kind", ["bool", "float", "labels"])
def test_a_mask_may_weigh_samples_or_carry_a_channel(name, kind):
    student, teacher = pair(3, 3, 2, 3)
    loss = LOSSES[name][0]
    mask, _ = weights_of((3,), kind)
    options = ignoring(kind)
    everywhere = mask.reshape(3, 1, 1).expand(3, 2, 3)
    expected = loss(student, teacher, everywhere, **options).item()
    assert loss(student, teacher, mask, **options).item() == pytest.approx(expected, rel=1e-12)
    assert loss(student, teacher, everywhere.unsqueeze(1), **options).item() == pytest.approx(expected, rel=1e-12)


@every_loss
@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 255])
def test_ignore_index_says_which_label_is_left_out(name, ignore_index):
    student, teacher = pair(2, 3, 2, 4)
    labels = torch.tensor([[[0, 1, 7, 255], [-1, -100, 2, 0]], [[7, 7, 255, 0], [1, 2, -100, -1]]])
    counts = (labels != ignore_index) & (labels >= 0)
    loss = LOSSES[name][0]
    assert loss(student, teacher, labels, ignore_index=ignore_index) == loss(student, teacher, counts)


@every_loss
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64], ids=str)
def test_an_integer_mask_without_an_ignore_index_is_refused(name, dtype):
    """Of 0 and 1 it might be: taken for labels, every position would count."""
    student, teacher = pair(2, 3, 2, 4)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 1, 1]], dtype=dtype).unsqueeze(1).expand(2, 2, 4)
    with pytest.raises(CldaError, match="integer mask is ambiguous"):
        LOSSES[name][0](student, teacher, mask)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_take_no_integer_mask(strategy):
    student, teacher = pair(2, 3, 4, 4, dtype=torch.float32)
    with pytest.raises(CldaError, match="integer mask is ambiguous"):
        strategy()(student, teacher, torch.ones(2, dtype=torch.long))


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(name, dtype):
    student, teacher = pair(2, 5, 4, 4, dtype=dtype)
    loss = LOSSES[name][0]
    value, slope = gradient(loss, student, teacher)
    expected, exact = gradient(loss, student.double(), teacher.double())
    assert value.dtype == torch.float32
    assert slope.dtype == dtype
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    tolerance = 2e-3 if dtype == torch.float16 else 1.6e-2
    np.testing.assert_allclose(slope.double(), exact, rtol=tolerance, atol=1e-6)


def test_half_precision_gradient_of_many_pixels_survives_under_a_loss_scale():
    student, teacher = pair(1, 3, 256, 256, dtype=torch.float16)
    leaf = student.clone().requires_grad_()
    (65536 * kl_distillation(leaf, teacher)).backward()
    _, exact = gradient(lambda x, y: 65536 * kl_distillation(x, y), student.double(), teacher.double())
    np.testing.assert_allclose(leaf.grad.double(), exact, rtol=2e-3, atol=1e-5)


@every_loss
def test_extreme_half_precision_values_stay_finite(name):
    student = torch.tensor([1e4, -1e4, 0.0]).reshape(1, 3, 1).repeat(2, 1, 4)
    student[0, :, 1:] *= -1
    teacher = -student.flip(2)
    value, slope = gradient(LOSSES[name][0], student.half(), teacher.half())
    assert torch.isfinite(value)
    assert torch.isfinite(slope.float()).all()


@every_loss
@pytest.mark.skipif(not hasattr(torch, "autocast"), reason="this torch has no autocast on the CPU")
def test_autocast_changes_nothing(name):
    student, teacher = pair(2, 3, 4, 4, dtype=torch.float32)
    outside = gradient(LOSSES[name][0], student, teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradient(LOSSES[name][0], student, teacher)
    assert inside[0] == outside[0]
    assert torch.equal(inside[1], outside[1])


@every_loss
def test_memory_formats_give_the_same(name):
    student, teacher = pair(2, 3, 4, 5)
    strided = student.to(memory_format=torch.channels_last)
    assert LOSSES[name][0](strided, teacher).item() == pytest.approx(LOSSES[name][0](student, teacher).item())


@every_loss
def test_different_grids_meet_on_the_smaller(name):
    student, _ = pair(2, 3, 8, 4)
    teacher, _ = pair(2, 3, 4, 6, seed=5)
    mask, _ = weights_of((2, 8, 4), "bool")
    loss = LOSSES[name][0]

    def resize(x):
        return torch.nn.functional.interpolate(x, size=(4, 4), mode="bilinear", align_corners=False)

    expected = loss(resize(student), resize(teacher), mask[:, 1::2])
    assert loss(student, teacher, mask).item() == pytest.approx(expected.item(), rel=1e-9)


@every_logit_loss
def test_class_map_picks_the_teachers_classes(name):
    student, _ = pair(2, 3, 2, 3)
    teacher, _ = pair(2, 5, 2, 3, seed=3)
    loss = LOSSES[name][0]
    expected = loss(student, teacher[:, [4, 0, 0]]).item()
    assert loss(student, teacher, class_map=[4, 0, 0]).item() == expected
    assert loss(student, teacher, class_map=(4, 0, 0)).item() == expected


@every_loss
def test_inputs_are_untouched(name):
    student, teacher = pair(2, 3, 4, 4)
    mask, _ = weights_of((2, 4, 4), "float")
    copies = [x.clone() for x in (student, teacher, mask)]
    gradient(LOSSES[name][0], student, teacher, mask)
    assert all(torch.equal(a, b) for a, b in zip((student, teacher, mask), copies))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_strategies_survive_pickling(strategy):
    student, teacher = pair(2, 3, 4, 4, dtype=torch.float32)
    loss = strategy()
    value = loss(student, teacher)
    assert value.item() > 0
    restored = pickle.loads(pickle.dumps(loss))
    assert restored(student, teacher).item() == value.item()
    assert repr(restored) == repr(loss)


@pytest.mark.parametrize("chunk", [1, 7, 24, 1000])
@pytest.mark.parametrize("kind", ["none", "float"])
@every_loss
def test_the_size_of_the_chunks_does_not_matter(name, kind, chunk, monkeypatch):
    student, teacher = pair(3, 4, 2, 3)
    mask, _ = weights_of((3, 2, 3), kind)
    expected, slope = gradient(LOSSES[name][0], student, teacher, mask)
    monkeypatch.setattr(chunked_module, "_ON_CPU", chunk)
    value, chunked = gradient(LOSSES[name][0], student, teacher, mask)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    np.testing.assert_allclose(chunked, slope, rtol=1e-12, atol=1e-15)


@every_loss
def test_second_derivatives_are_refused_rather_than_wrong(name):
    student, teacher = pair(2, 3, 2)
    student.requires_grad_()
    with pytest.raises(CldaError, match="differentiated twice"):
        torch.autograd.grad(LOSSES[name][0](student, teacher), student, create_graph=True)


@pytest.mark.skipif(not hasattr(torch.autograd, "graph"), reason="this torch cannot count them")
@pytest.mark.parametrize(("name", "dtype"), [("kl", torch.float16), ("kl", torch.float32), ("dist", torch.float32)])
def test_one_tensor_of_the_students_size_is_kept(name, dtype):
    student, teacher = pair(2, 19, 64, 64, dtype=dtype)
    student.requires_grad_()
    kept = []

    def pack(tensor):
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = LOSSES[name][0](student, teacher)
    assert loss.requires_grad
    assert sum(kept) < 1.2 * student.numel() * student.element_size()


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_features_are_averaged_over_pairs(name):
    loss = LOSSES[name][0]
    first, second = pair(2, 3, 4, 4), pair(2, 5, 2, 2, seed=2)
    both = loss((first[0], second[0]), [first[1], second[1]])
    assert both.item() == pytest.approx((loss(*first) + loss(*second)).item() / 2)


def test_every_strategy_says_what_it_reads():
    reads = {strategy.__name__: getattr(strategy, "reads", "logits") for strategy in STRATEGIES}
    assert {name for name, kind in reads.items() if kind == "features"} == {"FeatureDistillation", "AttentionTransfer"}
    assert isinstance(FeatureDistillation(), torch.nn.Module)


def test_values_at_positions_without_a_label_do_not_matter():
    student, teacher = pair(2, 3, 4, dtype=torch.float32)
    labels = torch.tensor([[0, 1, 255, 2], [255, 0, 1, 2]])
    left_out = (labels == 255).unsqueeze(1)

    def of_labels(student, teacher, mask):
        return decoupled_distillation(student, teacher, labels=labels, ignore_index=255)

    expected, slope = gradient(of_labels, student, teacher, None)
    got = gradient(of_labels, student.masked_fill(left_out, float("nan")), teacher, None)
    assert got[0] == expected
    assert torch.equal(got[1], slope)
