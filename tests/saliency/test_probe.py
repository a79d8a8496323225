import numpy as np
import pytest
import torch

from clda_core.errors import CldaError
from clda_core.saliency import PseudoLabelCrossEntropy
from tests import reference_saliency as reference

probe = PseudoLabelCrossEntropy()


def logits(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 5), (2, 4, 3, 5), (1, 2, 2, 3, 4)])
def test_matches_the_reference(shape) -> None:
    scores = logits(*shape)
    assert probe(scores, None).item() == pytest.approx(reference.probe(scores.numpy(), None), rel=1e-5)
    weights = torch.rand(shape[0], *shape[2:], generator=torch.Generator().manual_seed(1))
    expected = reference.probe(scores.numpy(), weights.numpy())
    assert probe(scores, weights).item() == pytest.approx(expected, rel=1e-5)


def test_masks_of_every_kind_agree() -> None:
    scores = logits(2, 4, 3, 5)
    valid = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) > 0.5
    expected = reference.probe(scores.numpy(), valid.numpy())
    for mask in (valid, valid.float(), valid.double(), valid.half(), valid.unsqueeze(1), 1e30 * valid, 1e-30 * valid):
        assert probe(scores, mask).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("mask", [torch.zeros(2), torch.zeros(2, 3, dtype=torch.bool)], ids=["weights", "bool"])
def test_no_valid_position_means_a_zero_loss_with_a_zero_gradient(mask) -> None:
    """As the KD losses, and without asking the device."""
    scores = logits(2, 4, 3).requires_grad_()
    loss = probe(scores, mask)
    loss.backward()
    assert loss.item() == 0
    assert (scores.grad == 0).all()


def test_one_weight_a_sample() -> None:
    scores = logits(3, 4, 2, 2)
    weights = torch.tensor([1.0, 0.0, 0.5])
    expected = reference.probe(scores.numpy(), np.repeat(weights.numpy(), 4))
    assert probe(scores, weights).item() == pytest.approx(expected, rel=1e-5)


def test_a_mask_at_the_images_resolution_is_resized() -> None:
    scores = logits(1, 3, 2, 2)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[:, :2, 2:] = True
    small = torch.tensor([[[False, True], [False, False]]])
    assert probe(scores, mask) == probe(scores, small)


def test_weights_that_are_no_positive_number_count_as_zero() -> None:
    scores = logits(3, 4)
    assert probe(scores, torch.tensor([1.0, float("nan"), -2.0])) == probe(scores, torch.tensor([True, False, False]))


def test_what_is_ignored_may_be_nan_and_gets_no_gradient() -> None:
    scores = logits(2, 3, 2, 2)
    scores[0, :, 0, 0] = float("nan")
    scores.requires_grad_()
    mask = torch.ones(2, 2, 2, dtype=torch.bool)
    mask[0, 0, 0] = False
    loss = probe(scores, mask)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(scores.grad).all()
    assert (scores.grad[0, :, 0, 0] == 0).all()


def test_the_pseudo_labels_carry_no_gradient_so_the_gradient_is_softmax_minus_one_hot() -> None:
    scores = logits(4, 3).requires_grad_()
    probe(scores, None).backward()
    one_hot = torch.nn.functional.one_hot(scores.argmax(1), 3)
    assert torch.allclose(scores.grad, (scores.softmax(1) - one_hot).detach() / 4, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "computed"),
    [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)],
)
def test_computing_dtype(dtype, computed) -> None:
    scores = logits(4, 3).to(dtype)
    loss = probe(scores, torch.ones(4))
    assert loss.dtype == computed
    assert loss.item() == pytest.approx(reference.probe(scores.double().numpy(), None), rel=1e-5)


@pytest.mark.parametrize(
    ("scores", "mask", "match"),
    [
        (torch.zeros(0, 3), None, "logits are empty"),
        (torch.zeros(2, 3, 2, 2), torch.full((2, 2, 2), 255), "integer mask is ambiguous"),
        (torch.zeros(2, 3), torch.tensor([0, 1], dtype=torch.uint8), "integer mask is ambiguous"),
        (
            torch.zeros(2, 3, 2, 2),
            torch.ones(2, 3, 2, 2),
            r"mask has a wrong shape.*\(2, 2, 2\).*received.*\(2, 3, 2, 2\)",
        ),
        (torch.zeros(2, 3), torch.ones(3), "mask has a wrong shape"),
    ],
)
def test_wrong_input(scores, mask, match) -> None:
    with pytest.raises(CldaError, match=match):
        probe(scores, mask)
