"""What a saliency estimator is, and the derivatives it may ask for."""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence

import torch
from torch import Tensor
from typing_extensions import Protocol, runtime_checkable

from .._host.layout import strided
from ..errors import check_number, problem

__all__ = ["Elementwise", "Probe", "RandomVectors", "SaliencyEstimator", "derivatives"]

Probe = Callable[[Tensor, Optional[Tensor]], Tensor]
"""A loss on unlabelled target data: ``probe(logits, mask) -> scalar``, differentiable by the logits."""


class SaliencyEstimator(Protocol):
    r"""Scores parameters; it neither selects layers nor touches the model.

    One of order 2 may be one of :class:`RandomVectors` too, and any one :class:`Elementwise`.
    """

    @property
    def order(self) -> int:
        """The derivative of the loss that :meth:`score` receives.

        0 for none, 1 for the gradient, 2 for an estimate of the Hessian's diagonal (Hutchinson).
        """
        ...

    def score(self, parameter: Tensor, derivative: Optional[Tensor], /) -> Tensor:
        """Return how much each element of one parameter matters.

        Args:
            parameter: Any shape, detached, float32 or wider.
            derivative: The same shape and dtype, detached; ``None`` when ``order`` is 0.

        Returns:
            Non-negative finite scores of the same shape; higher matters more. Only ratios within the model count.
        """
        ...


@runtime_checkable
class RandomVectors(Protocol):
    """What an estimator of order 2 may have: the Hessian's diagonal is estimated by one random vector otherwise."""

    @property
    def samples(self) -> int:
        """The number of random vectors that the estimate averages over, >= 1."""
        ...


@runtime_checkable
class Elementwise(Protocol):
    """What an estimator may have: it is then given the parameters of a layer in one piece, which takes less time."""

    @property
    def elementwise(self) -> bool:
        """Whether an element's score depends on its own value and derivative alone, not on its place in a tensor."""
        ...


def derivatives(
    order: int,
    loss: Tensor,
    parameters: Sequence[Tensor],
    generator: torch.Generator,
    *,
    samples: int = 1,
    retain_graph: bool = False,
) -> List[Optional[Tensor]]:
    r"""Differentiate a loss by parameters, once or (on the Hessian's diagonal) twice.

    For order 2 the diagonal is estimated as :math:`\frac{1}{S}\sum_s z_s \odot (H z_s)` with Rademacher vectors
    :math:`z_s` (Hutchinson's estimator): unbiased, and exact wherever :math:`H` is diagonal. :math:`H` is the block of
    the Hessian that belongs to ``parameters``; differentiating fewer at a time gives a different random estimate, with
    less variance.

    Args:
        order: 0, 1 or 2, as in :class:`SaliencyEstimator`.
        loss: A scalar.
        parameters: Leaf tensors; one that does not require a gradient counts as not used by the loss.
        generator: A CPU generator, advanced only for order 2. The same state gives the same result on every device.
        samples: Number of random vectors for order 2, >= 1.
        retain_graph: Keep the graph of ``loss``, to differentiate by further parameters afterwards.

    Returns:
        One detached tensor for each parameter, of its shape and dtype; ``None`` where the loss does not use the
        parameter, which means *unknown*, not zero. For order 0 all are ``None``.

    Raises:
        CldaError: If ``order`` or ``samples`` is out of range, the loss is no scalar or has no gradient, or an
            operation in the model has no second derivative.

    Note:
        Neither ``parameter.grad`` nor the global random state is touched. Order 2 holds the graph of the gradient
        (about twice the memory of a backward pass), and costs one further backward pass for each sample. Autograd
        takes the backward pass of a custom function marked ``once_differentiable`` as constant, without an error:
        curvature that passes through one (deformable convolution, for example) is missing.

    Example:
        >>> w = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> derivatives(2, (w ** 3).sum(), [w], torch.Generator())
        [tensor([ 6., 12.])]

    References:
        Yao et al., ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning, AAAI 2021, Hutchinson diagonal.
        <https://arxiv.org/abs/2006.00719>
    """
    check_number("order", order, at_least=0, at_most=2, integer=True)
    check_number("samples", samples, at_least=1, integer=True)
    if order == 0:
        return [None] * len(parameters)
    if loss.dim() != 0 or not loss.requires_grad:
        raise problem(
            "the saliency loss cannot be differentiated",
            expected="a scalar that depends on the model's parameters",
            received=f"shape {tuple(loss.shape)}, requires_grad={loss.requires_grad}",
            fix="return a differentiable scalar from the probe, computed without torch.no_grad() or .detach()",
        )
    gradients = _gradients(loss, parameters, create_graph=order == 2, retain_graph=retain_graph or order == 2)
    if order == 1:
        return gradients
    return _hessian_diagonal(gradients, parameters, generator, samples, retain_graph)


def _gradients(
    loss: Tensor, parameters: Sequence[Tensor], *, create_graph: bool, retain_graph: bool
) -> List[Optional[Tensor]]:
    wanted = [parameter for parameter in parameters if parameter.requires_grad]
    if not wanted:
        return [None] * len(parameters)
    found = iter(
        torch.autograd.grad(loss, wanted, create_graph=create_graph, retain_graph=retain_graph, allow_unused=True)
    )
    gradients = [next(found) if parameter.requires_grad else None for parameter in parameters]
    return [None if gradient is None else strided(gradient) for gradient in gradients]


def _hessian_diagonal(
    gradients: Sequence[Optional[Tensor]],
    parameters: Sequence[Tensor],
    generator: torch.Generator,
    samples: int,
    retain_graph: bool,
) -> List[Optional[Tensor]]:
    diagonal = [None if gradient is None else torch.zeros_like(gradient.detach()) for gradient in gradients]
    # A gradient that is constant in the parameters has no graph: its row of the Hessian is zero.
    rows = [
        (gradient, parameter, total)
        for gradient, parameter, total in zip(gradients, parameters, diagonal)
        if gradient is not None and total is not None and gradient.requires_grad
    ]
    if not rows:
        return diagonal
    for sample in range(samples):
        signs = [_rademacher(parameter, generator) for _, parameter, _ in rows]
        try:
            products = torch.autograd.grad(
                [gradient for gradient, _, _ in rows],
                [parameter for _, parameter, _ in rows],
                grad_outputs=signs,
                retain_graph=retain_graph or sample + 1 < samples,
                allow_unused=True,
            )
        except RuntimeError as error:
            if "is not implemented" not in str(error):
                raise
            raise problem(
                "the model has no second derivative",
                expected="operations that can be differentiated twice",
                received=str(error).splitlines()[0],
                fix="use an estimator of order 1 (Taylor, Fisher), or switch off fused kernels such as flash attention",
            ) from error
        for (_, _, total), sign, product in zip(rows, signs, products):
            if product is not None:
                total.addcmul_(sign, strided(product), value=1.0 / samples)
    return diagonal


def _rademacher(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, tuple(like.shape), generator=generator, dtype=torch.float32, device="cpu")
    return bits.mul_(2).sub_(1).to(device=like.device, dtype=like.dtype)


def needed(derivative: Optional[Tensor], estimator: SaliencyEstimator) -> Tensor:
    """Return the derivative, or raise where an estimator of order 1 or 2 was given none."""
    if derivative is None:
        raise problem(
            f"{type(estimator).__name__} was given no derivative",
            expected=f"the derivative of order {estimator.order} of the loss by the parameter",
            received="None",
            fix="leave parameters out that the loss does not use: their saliency is unknown",
        )
    return derivative
