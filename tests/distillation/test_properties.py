"""Every loss over its whole range against float64, value and gradient: layouts, dtypes, scales, degenerate batches."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import clda_core.distillation as public
from clda_core.distillation import WeightedSum, decoupled_distillation
from tests import reference_distillation as reference
from tests.distillation.cases import FEATURE_LOSSES, LOGIT_LOSSES, LOSSES, SPATIAL, STRATEGIES, flat

OTHERS = {"Distillation", "WeightedSum", "check_values", "distillation_loss"}
DTYPES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2, torch.float32: 1e-5, torch.float64: 1e-6}
LARGEST = torch.finfo(torch.float32).max

every_loss = pytest.mark.parametrize("name", LOSSES)
bounded = settings(max_examples=300, deadline=None, derandomize=True, database=None)


def laid_out(tensor, layout):
    """Return equal values in another memory layout."""
    if layout == "channels_last":
        return (
            tensor.to(memory_format=torch.channels_last)
            if tensor.dim() == 4
            else tensor.transpose(1, -1).clone().transpose(1, -1)
        )
    if layout == "permuted":
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        wide = torch.stack([tensor, torch.full_like(tensor, float("nan"))], -1)
        return wide[..., 0]
    if layout == "expanded":
        return tensor[:1].expand_as(tensor)
    return tensor


def value_and_gradient(loss, student, *args, **kwargs):
    leaf = student.detach().requires_grad_()
    value = loss(leaf, *args, **kwargs)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


def of_float64(name, student, teacher, weights, **options):
    def positions(x):
        return x.detach().double().reshape(*x.shape[:2], -1)

    leaf = positions(student).requires_grad_()
    weights = None if weights is None else weights.double().reshape(len(student), -1)
    value = reference.differentiable(name, leaf, positions(teacher), weights, **options)
    return value.detach(), torch.autograd.grad(value, leaf)[0].reshape(student.shape)


def close(got, expected, name, dtype, temperature=1.0):
    """Compare value and gradient, the latter relative to its largest element, as the docs state it."""
    (value, slope), (exact, exact_slope) = got, expected
    assert abs(value.item() - exact.item()) <= 1e-5 * abs(exact.item()) + 1e-9 * temperature**2
    assert slope.dtype == dtype
    smallest = 6e-8 if dtype == torch.float16 else 1e-10
    error = (slope.double() - exact_slope).abs().max()
    assert error <= DTYPES[dtype] * exact_slope.abs().max() + smallest


@st.composite
def batches(draw):
    name = draw(st.sampled_from(sorted(LOSSES)))
    spatial = draw(st.sampled_from([(), (1,), (5,), (2, 3), (4, 4)]))
    if name in SPATIAL and not spatial:
        spatial = (3,)
    shape = (draw(st.integers(1, 3)), draw(st.sampled_from([2, 3, 7])), *spatial)
    dtype = draw(st.sampled_from(sorted(DTYPES, key=str)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    values = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    scales = [0.05, 1.0, 10.0, 1e3] + ([] if dtype == torch.float16 else [1e4])
    values = [x * draw(st.sampled_from(scales)) for x in values]
    options = {"temperature": draw(st.sampled_from([0.1, 0.5, 1.0, 4.0, 100.0]))} if name in LOGIT_LOSSES else {}
    if name in LOGIT_LOSSES:  # a class that is absent from the batch, or certain in all of it
        values[0][:, 1] -= options["temperature"] * draw(st.sampled_from([0, 0, 30, 46, 60, 130, -60]))
    layout = draw(st.sampled_from(["contiguous", "channels_last", "permuted", "sliced", "expanded"]))
    student, teacher = (laid_out(x.to(dtype), layout) for x in values)
    kind = draw(st.sampled_from(["none", "bool", "float", "tiny", "huge", "one"]))
    mask = torch.rand(shape[0], *spatial, generator=generator, dtype=torch.float64)
    keep = mask > 0.3
    keep.reshape(-1)[0] = True
    if kind == "none":
        mask = None
    elif kind == "bool":
        mask = keep
    elif kind == "one":
        mask = torch.zeros_like(keep)
        mask.reshape(-1)[-1] = True
    else:
        mask = (mask * keep * {"float": 1.0, "tiny": 1e-30, "huge": 1e30}[kind]).float()
    if name == "attention":
        options["power"] = draw(st.sampled_from([1.0, 2.0, 3.5, 8.0]))
    return name, student, teacher, mask, options


def almost_constant(logits, mask, temperature):
    """Return whether some probabilities are about what DIST takes for constant: by rounding, or too small to square."""
    q = (logits.double() / temperature).softmax(1).reshape(*logits.shape[:2], -1)
    weights = torch.ones(q.shape[0], q.shape[2]) if mask is None else mask.double().reshape(len(q), -1)
    share = (weights / weights.sum()).unsqueeze(1)
    mean = (share * q).sum((0, 2), keepdim=True)
    within = (share * (q - mean).pow(2)).sum((0, 2)).sqrt() / mean.flatten().clamp(min=1e-300)
    across = (q - 1 / q.shape[1]).pow(2).mean(1).sqrt() * q.shape[1]
    deviations = torch.cat([within.flatten(), across.flatten()])
    unsquarable = (mean > 0) & (mean < 1e-130)
    return bool(((deviations > 1e-8) & (deviations < 1e-4)).any() or unsquarable.any())


@bounded
@given(batches())
def test_value_and_gradient_are_those_of_float64(batch):
    name, student, teacher, mask, options = batch
    assume(name != "dist" or not any(almost_constant(x, mask, options["temperature"]) for x in (student, teacher)))
    got = value_and_gradient(LOSSES[name][0], student, teacher, mask, **options)
    close(
        got, of_float64(name, student, teacher, mask, **options), name, student.dtype, options.get("temperature", 1.0)
    )


@every_loss
@pytest.mark.parametrize("kind", ["none", "bool", "float"])
def test_the_differentiable_oracle_is_the_plain_one(name, kind):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    weights = torch.rand(2, 4, generator=generator, dtype=torch.float64)
    weights = {"none": None, "bool": (weights > 0.4).double(), "float": weights}[kind]
    expected = LOSSES[name][1](flat(student), flat(teacher), None if weights is None else weights.numpy())
    assert of_float64(name, student, teacher, weights)[0].item() == pytest.approx(expected, rel=1e-12)


def test_every_public_loss_is_tested():
    losses = {loss.__name__ for loss, _ in LOSSES.values()}
    assert set(public.__all__) - OTHERS == losses | {strategy.__name__ for strategy in STRATEGIES}


@every_loss
@pytest.mark.parametrize("layout", ["channels_last", "permuted", "sliced", "expanded"])
def test_the_gradient_is_right_in_every_layout(name, layout):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 4, 5, generator=generator) for _ in range(2))
    laid, other = laid_out(student, layout), laid_out(teacher, layout)
    value, slope = value_and_gradient(LOSSES[name][0], laid, other)
    plain, plain_slope = value_and_gradient(LOSSES[name][0], laid.contiguous(), other.contiguous())
    assert value == plain
    assert torch.equal(slope, plain_slope)
    if layout == "channels_last":
        assert slope.stride() == laid.stride()


DEGENERATE = {
    "equal logits": (torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)),
    "a student of equal logits": (torch.full((2, 3, 4), 0.3), torch.randn(2, 3, 4)),
    "a teacher of equal logits": (torch.randn(2, 3, 4), torch.full((2, 3, 4), 0.3)),
    "one sample, one position": (torch.tensor([1.0, 2.0, -1.0]).reshape(1, 3, 1), torch.ones(1, 3, 1)),
    "two classes": (torch.tensor([[1.0], [1.0]]).reshape(1, 2, 1), torch.tensor([[1.0], [2.0]]).reshape(1, 2, 1)),
    "the largest numbers": (torch.tensor([LARGEST, -LARGEST, 0, 1] * 6).reshape(2, 3, 4), torch.ones(2, 3, 4)),
    "opposite extremes": (torch.full((2, 3, 4), LARGEST), torch.full((2, 3, 4), -LARGEST)),
    "extreme logits of both": tuple(
        sign * torch.tensor([LARGEST, -LARGEST, 0, 1, 1e30, -1e30] * 4).reshape(2, 3, 4) for sign in (1, -1)
    ),
    "the smallest numbers": (torch.full((2, 3, 4), 1e-45), torch.tensor([1e-45, 0.0, -1e-45] * 8).reshape(2, 3, 4)),
    "one class at the end of the range": (torch.tensor([-LARGEST, 1.0, 2.0]).reshape(1, 3, 1), torch.randn(1, 3, 1)),
}


@every_loss
@pytest.mark.parametrize("temperature", [0.1, 1.0, 100.0])
@pytest.mark.parametrize("case", DEGENERATE)
def test_finite_inputs_give_finite_values_and_gradients(name, case, temperature):
    student, teacher = DEGENERATE[case]
    options = {"temperature": temperature} if name in LOGIT_LOSSES else {}
    for mask in (None, torch.ones(student.shape[0], student.shape[2]), torch.zeros(student.shape[0])):
        value, slope = value_and_gradient(LOSSES[name][0], student, teacher, mask, **options)
        assert torch.isfinite(value)
        assert torch.isfinite(slope).all()
        assert value >= 0
        if mask is not None and not (mask != 0).any():
            assert value == 0
            assert (slope == 0).all()


@every_loss
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4, 1e30])
def test_identical_networks_cost_nothing_at_any_scale(name, scale):
    student = scale * torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0))
    value, slope = value_and_gradient(LOSSES[name][0], student, student)
    assert value.item() <= 1e-10
    assert slope.abs().max() <= 1e-8 / min(scale, 1)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0, 8.0])
@pytest.mark.parametrize("scale", [1e-33, 1e-12, 1e-7, 1e4, 1e12, 1e37])
def test_attention_does_not_depend_on_the_scale_of_the_features(power, scale):
    loss, generator = FEATURE_LOSSES["attention"][0], torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 4, 3, 3, generator=generator), torch.randn(2, 6, 3, 3, generator=generator)
    value, slope = value_and_gradient(loss, student, teacher, power=power)
    scaled, scaled_slope = value_and_gradient(loss, scale * student, teacher, power=power)
    assert scaled.item() == pytest.approx(value.item(), rel=1e-5)
    error = (scaled_slope.double() * scale - slope.double()).abs().max()
    assert error <= 1e-5 * slope.abs().max() + 1e-45 * scale


@pytest.mark.parametrize("gap", [43, 46, 50, 60, 87, 104, 150, 250])
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_dist_with_a_class_far_below_the_others(gap, whose):
    """Its gradient was NaN from 43 on, where the cube of the inverse deviation overflowed."""
    generator = torch.Generator().manual_seed(gap)
    student, teacher = (torch.randn(8, 5, 4, 4, generator=generator) for _ in range(2))
    student[:, 4] -= gap if whose != "teacher" else 0
    teacher[:, 4] -= gap if whose != "student" else 0
    got = value_and_gradient(LOSSES["dist"][0], student, teacher)
    close(got, of_float64("dist", student, teacher, None), "dist", torch.float32)


def test_dist_with_a_class_that_is_rare_where_the_mask_counts_and_common_elsewhere():
    student, teacher = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), torch.randn(2, 3, 4)
    mask = torch.tensor([[True, True, False, True], [False, True, True, True]])
    student[:, 0] -= 100.0 * mask
    got = value_and_gradient(LOSSES["dist"][0], student, teacher, mask)
    close(got, of_float64("dist", student, teacher, mask), "dist", torch.float32)


def test_dist_of_a_cosine_head_with_a_class_absent_from_the_batch():
    generator = torch.Generator().manual_seed(0)
    student = 0.16 * torch.rand(32, 10, generator=generator) - 0.08
    student[torch.arange(32), torch.randint(9, (32,), generator=generator)] = 0.8
    teacher = 64 * student + torch.randn(32, 10, generator=generator)
    got = value_and_gradient(LOSSES["dist"][0], 64 * student, teacher)
    close(got, of_float64("dist", 64 * student, teacher, None), "dist", torch.float32)


@pytest.mark.parametrize("classes", [2, 3])
def test_dist_with_few_classes_on_a_large_image_has_no_noise(classes):
    generator = torch.Generator().manual_seed(1)
    student, teacher = (torch.randn(1, classes, 256, 256, generator=generator) for _ in range(2))
    value, slope = value_and_gradient(LOSSES["dist"][0], student, teacher)
    exact, exact_slope = of_float64("dist", student, teacher, None)
    assert value.item() == pytest.approx(exact.item(), rel=1e-6)
    assert (slope - exact_slope).norm() <= 1e-5 * exact_slope.norm()


def test_dist_takes_rounding_for_no_relation():
    """A dead head gives one prediction everywhere, and resizing adds rounding to it."""
    student = torch.tensor([0.3, -1.2, 2.0]).reshape(1, 3, 1, 1).expand(2, 3, 64, 64).clone()
    student += 1e-7 * torch.randn(student.shape, generator=torch.Generator().manual_seed(0))
    teacher = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    value, slope = value_and_gradient(lambda s, t: LOSSES["dist"][0](s, t, inter=0.0), student, teacher)
    assert value.item() == pytest.approx(1.0)
    assert slope.abs().max() < 10 / (2 * 64 * 64)


@pytest.mark.parametrize("name", ["kl", "channel_wise", "decoupled", "dist"])
@pytest.mark.parametrize("upstream", [1.0, 65536.0])
def test_gradients_of_many_positions_survive_in_half_precision(name, upstream):
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(1, 3, 96, 96, generator=generator).half() for _ in range(2))
    _, slope = value_and_gradient(lambda *pair: upstream * LOSSES[name][0](*pair, temperature=4.0), student, teacher)
    _, exact = of_float64(name, student, teacher, None, temperature=4.0)
    error = (slope.double() - upstream * exact).abs()
    assert (error <= 2e-3 * (upstream * exact).abs() + 6e-8).all()


def test_weights_of_a_sum_may_be_tiny_or_huge():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    value, slope = value_and_gradient(decoupled_distillation, student, teacher)
    for weight in (1e-30, 1e30):
        loss = WeightedSum([(weight, decoupled_distillation)])
        weighted, weighted_slope = value_and_gradient(loss, student, teacher)
        assert weighted.item() == pytest.approx(weight * value.item(), rel=1e-5)
        assert torch.allclose(weighted_slope / weight, slope, rtol=1e-4, atol=1e-9)


def test_a_sum_may_have_terms_of_two_dtypes():
    student, teacher = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    loss = WeightedSum([(1.0, decoupled_distillation), (1.0, lambda s, t, mask: (s.double() - t).pow(2).mean())])
    assert loss(student, teacher).item() > 0
