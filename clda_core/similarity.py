"""How alike the layers of two models are: linear CKA of their output features."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from ._host.activations import LEAST_ROWS, capturing, positions, rows
from ._host.compat import wide
from ._host.names import canonical_modules
from ._host.ranks import sum_across_ranks
from .errors import problem
from .layers import ModelView
from .outputs import call_model

CHANCE = 0.25
"""The linear CKA that unrelated features may have at most for a comparison to count."""


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    r"""Compute the linear centred kernel alignment of two sets of features of the same samples.

    .. math:: \mathrm{CKA}(X, Y) = \frac{\lVert Y^\top X \rVert_F^2}
              {\lVert X^\top X \rVert_F \, \lVert Y^\top Y \rVert_F}

    with the columns of :math:`X, Y` centred: the feature-space form. It does not change when features are rotated,
    permuted, scaled by one number, or shifted.

    Args:
        x: Shape ``(n, p)``, float; one row per sample.
        y: Shape ``(n, q)``, float; rows of the same samples.

    Returns:
        Scalar in [0, 1], dtype of ``x``, computed in float64; 0 if either does not vary.

    Raises:
        CldaError: If the shapes are not ``(n, p)`` and ``(n, q)`` with n >= 2, or a dtype is not floating-point.

    Note:
        Biased upwards when n is not much larger than p and q: for unrelated features towards 1.

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])
        >>> round(linear_cka(x, 3 * x.flip(1) + 1).item(), 6)
        1.0

    References:
        Kornblith et al., Similarity of Neural Network Representations Revisited, ICML 2019, Table 1 ("Linear CKA").
        <https://arxiv.org/abs/1905.00414>
    """
    fine = x.dim() == y.dim() == 2 and x.shape[0] == y.shape[0] >= 2
    if not fine or not x.is_floating_point() or not y.is_floating_point():
        raise problem(
            "linear CKA cannot compare these features",
            expected="two floating-point tensors (n, p) and (n, q) with n >= 2",
            received=f"{x.dtype} of shape {tuple(x.shape)} and {y.dtype} of shape {tuple(y.shape)}",
            fix="flatten to one row per sample and pass the same samples in the same order",
        )
    return cka_and_chance(x, y)[0].to(x.dtype)


def cka_and_chance(x: Tensor, y: Tensor) -> Tuple[Tensor, Tensor]:
    """Return the linear CKA and its mean over all pairings of the rows of ``x`` with those of ``y``, in float64.

    That mean, exact and cheap, is what chance alone gives: with the columns centred, the mean of ``||Y'X||^2`` over
    permutations is ``tr(X'X) tr(Y'Y) / (n - 1)``, and the denominator does not depend on them.
    """
    a, b = _centred(x), _centred(y)
    first, second = a.t() @ a, b.t() @ b
    within = first.norm() * second.norm()
    zero = torch.zeros_like(within)
    scale = torch.where(within == 0, zero + 1, within)
    across = (b.t() @ a).pow(2).sum() / scale
    chance = first.trace() * second.trace() / (max(len(x) - 1, 1) * scale)
    return torch.where(within == 0, zero, across), torch.where(within == 0, zero, chance)


def _centred(x: Tensor) -> Tensor:
    """Centre columns and scale the whole to a largest magnitude of 1, so that fourth powers stay in range."""
    centred = wide(x) - wide(x).mean(0, keepdim=True)
    scale = centred.abs().max() if centred.numel() else centred.new_zeros(())
    floor = 1e-12 * wide(x).abs().max() if x.numel() else scale
    varies = (scale > floor) | (scale != scale)
    return torch.where(varies, centred / torch.where(varies, scale, torch.ones_like(scale)), torch.zeros_like(centred))


def layer_features(view: ModelView, inputs: Any, samples: int) -> Tuple[Dict[str, Tensor], Dict[str, str]]:
    """Run a model once and return its layers' output features by layer name, and why some layers have none."""
    modules = canonical_modules(view.model)
    watched = {layer.name: modules[layer.name] for layer in view.layers if layer.name in modules}
    features: Dict[str, Optional[Tensor]] = {}

    def read(name: str, module: nn.Module, _: Tuple[Any, ...], output: Any) -> None:
        features[name] = positions(output, module, samples)

    with capturing(watched, read):
        call_model(view.model, inputs if view.inputs is None else view.inputs)
    reasons: Dict[str, str] = {}
    usable: Dict[str, Tensor] = {}
    for layer in view.layers:
        value = features.get(layer.name)
        if layer.name not in watched:
            reasons[layer.name] = "it is a group of parameters, not a module with an output to compare"
        elif layer.name not in features:
            reasons[layer.name] = "its module is not called in the forward pass"
        elif value is None:
            reasons[layer.name] = "its module's output is not a floating-point tensor (N, ...)"
        else:
            usable[layer.name] = value
    return usable, reasons


class Similarity(NamedTuple):
    """What two layers' features say, averaged over ranks.

    Attributes:
        cka: Linear CKA over the ranks that have enough rows, -1 where none has.
        chance: What unrelated features would have.
        rows: Number of rows, 0 where the features cannot be compared.
    """

    cka: float
    chance: float
    rows: float


def similarities(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> List[List[Similarity]]:
    """Return the similarities by teacher layer and student layer; equal on every rank."""
    if not ours or not theirs:
        return [[] for _ in ours]
    figures = [_figures(first, second) for first in ours.values() for second in theirs.values()]
    device = figures[0].device
    (summed,) = sum_across_ranks([torch.stack([figure.to(device) for figure in figures])])
    found = [
        Similarity(cka / enough if enough else -1.0, chance / (comparable or 1.0), count / (comparable or 1.0))
        for comparable, enough, cka, chance, count in summed.tolist()
    ]
    return [found[start : start + len(theirs)] for start in range(0, len(found), len(theirs))]


def _figures(first: Tensor, second: Tensor) -> Tensor:
    """Return what ranks add up: whether comparable, whether by enough rows; and CKA, chance and rows if they are."""
    both = rows(first, second)
    nothing = wide(first.new_zeros(()))
    if both is None:
        return torch.stack([nothing] * 5)
    cka, chance = cka_and_chance(*both)
    count = nothing + len(both[0])
    comparable = torch.isfinite(cka)
    enough = comparable & (chance <= CHANCE) & (count >= LEAST_ROWS)
    if_enough = torch.where(enough, cka, nothing)
    if_comparable = [torch.where(comparable, one, nothing) for one in (chance, count)]
    return torch.stack([comparable.to(cka), enough.to(cka), if_enough, *if_comparable])
