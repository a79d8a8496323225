import numpy as np
import pytest
import torch
from torch import Tensor, nn

from clda_core.errors import CldaError
from clda_core.saliency import Hessian, derivatives
from tests import reference_saliency as reference
from tests.models import mlp


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny_loss(theta: Tensor) -> Tensor:
    """A two-layer network of 2 + 2 weights on three points, with a dense Hessian."""
    x = torch.tensor([[1.0, -0.5], [0.3, 0.8], [-0.7, 0.2]], dtype=theta.dtype)
    return ((x @ theta[:2]).tanh() * theta[2] + theta[3] * theta[0]).pow(2).sum()


THETA = torch.tensor([0.7, -1.1, 0.9, 0.4])


def test_order_0_needs_no_loss_and_no_random_numbers() -> None:
    own = generator()
    before = own.get_state()
    assert derivatives(0, torch.zeros(()), [THETA, THETA], own) == [None, None]
    assert torch.equal(own.get_state(), before)


def test_order_1_is_the_gradient_and_leaves_grad_alone() -> None:
    model = mlp()
    x = torch.randn(4, 5, generator=generator())
    own = generator()
    before = own.get_state()
    found = derivatives(1, model(x).pow(2).sum(), list(model.parameters()), own)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(own.get_state(), before)
    model(x).pow(2).sum().backward()
    for parameter, gradient in zip(model.parameters(), found):
        assert gradient is not None
        assert not gradient.requires_grad
        assert torch.equal(gradient, parameter.grad)


@pytest.mark.parametrize("order", [1, 2])
def test_a_parameter_without_a_gradient_is_unknown(order: int) -> None:
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    found = derivatives(order, (used**3 * frozen).sum(), [unused, used, frozen], generator())
    assert found[0] is None
    assert found[1] is not None
    assert found[2] is None


def test_no_parameter_that_requires_a_gradient() -> None:
    loss = torch.ones(2, requires_grad=True).sum()
    assert derivatives(1, loss, [torch.ones(2)], generator()) == [None]


def test_order_2_is_exact_where_the_hessian_is_diagonal() -> None:
    w = torch.tensor([1.0, -2.0, 3.0], requires_grad=True)
    b = torch.tensor([0.5], requires_grad=True)
    w_found, b_found = derivatives(2, (w**4).sum() + (b**3).sum(), [w, b], generator())
    assert torch.allclose(w_found, 12 * w.detach() ** 2)
    assert torch.allclose(b_found, 6 * b.detach())
    assert not w_found.requires_grad


def test_order_2_of_a_loss_linear_in_a_parameter_is_zero_not_unknown() -> None:
    w, v = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found = derivatives(2, (3 * w).sum() + (v**2).sum(), [w, v], generator())
    assert torch.equal(found[0], torch.zeros(2))
    assert torch.equal(found[1], torch.full((2,), 2.0))
    (alone,) = derivatives(2, (3 * w).sum(), [w], generator())
    assert torch.equal(alone, torch.zeros(2))


def test_order_2_of_a_parameter_whose_gradient_depends_on_others_alone_is_zero() -> None:
    w, other = torch.ones(2, requires_grad=True), torch.full((2,), 3.0, requires_grad=True)
    (found,) = derivatives(2, (w * other).sum(), [w], generator(), samples=2)
    assert torch.equal(found, torch.zeros(2))


def test_order_2_converges_to_the_exact_diagonal() -> None:
    exact = reference.full_hessian(tiny_loss, THETA)
    samples = 500
    theta = THETA.double().requires_grad_()
    (estimate,) = derivatives(2, tiny_loss(theta), [theta], generator(), samples=samples)
    off_diagonal = exact - torch.diag(torch.diagonal(exact))
    assert float(off_diagonal.abs().max()) > 0.1
    standard_error = (off_diagonal.pow(2).sum(dim=1) / samples).sqrt()
    assert ((estimate - torch.diagonal(exact)).abs() <= 4 * standard_error + 1e-9).all()


def test_samples_are_averaged_in_the_generators_order() -> None:
    theta = THETA.clone().requires_grad_()
    own = generator(3)
    singles = [derivatives(2, tiny_loss(theta), [theta], own)[0] for _ in range(2)]
    (both,) = derivatives(2, tiny_loss(theta), [theta], generator(3), samples=2)
    assert torch.allclose(both, (singles[0] + singles[1]) / 2)
    assert not torch.allclose(singles[0], singles[1])


def test_order_2_is_deterministic_and_leaves_the_hosts_random_state() -> None:
    model = mlp()
    x = torch.randn(2, 5, generator=generator())
    before = torch.get_rng_state()
    runs = [
        derivatives(2, model(x).logsumexp(1).mean(), list(model.parameters()), generator(1), samples=2)
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(*runs))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_graph_can_be_kept_for_further_parameters() -> None:
    theta = THETA.clone().requires_grad_()
    loss = tiny_loss(theta)
    first = derivatives(1, loss, [theta], generator(), retain_graph=True)[0]
    derivatives(2, loss, [theta], generator(), retain_graph=True)
    assert torch.equal(first, derivatives(1, loss, [theta], generator())[0])
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize(
    ("order", "loss", "options", "match"),
    [
        (3, torch.zeros(()), {}, "order is out of range"),
        (True, torch.zeros(()), {}, "order is not an integer"),
        (1, torch.zeros(2, requires_grad=True) * 1, {}, r"cannot be differentiated: .* received shape \(2,\)"),
        (1, torch.zeros(()), {}, "cannot be differentiated: .*requires_grad=False.*no_grad"),
        (2, torch.zeros((), requires_grad=True), {"samples": 0}, "samples is out of range"),
    ],
)
def test_wrong_input(order: int, loss: Tensor, options: dict, match: str) -> None:
    with pytest.raises(CldaError, match=match):
        derivatives(order, loss, [THETA], generator(), **options)


class _Failing(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return _FailingTwice.apply(gradient)


class _FailingTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("something else")


def test_an_operation_without_second_derivative() -> None:
    logits = torch.rand(3, 2, requires_grad=True)

    def loss() -> Tensor:
        return nn.functional.multi_margin_loss(logits, torch.tensor([0, 1, 0])).pow(2)

    with pytest.raises(CldaError, match="no second derivative.*Taylor, Fisher"):
        derivatives(2, loss(), [logits], generator())
    assert derivatives(1, loss(), [logits], generator())[0] is not None


def test_other_errors_in_the_second_derivative_come_through() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="^something else$"):
        derivatives(2, _Failing.apply(w * w).pow(2).sum(), [w], generator())


def test_hessian_saliency_of_a_quadratic_is_the_loss_of_removing_each_weight() -> None:
    curvature = torch.tensor([4.0, 1.0, 0.25])
    theta = torch.tensor([1.0, -2.0, 6.0], requires_grad=True)
    around = theta.detach().clone()
    (diagonal,) = derivatives(2, 0.5 * (curvature * (theta - around) ** 2).sum(), [theta], generator())
    removed = 0.5 * curvature * around**2
    np.testing.assert_allclose(Hessian().score(theta.detach(), diagonal).numpy(), removed.numpy())
