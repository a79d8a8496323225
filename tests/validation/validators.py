"""Every validator with its oracle, and logits to score."""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional

import torch
from torch import Tensor

from clda_core.validation import (
    ConsistencyIoU,
    ConsistentInformation,
    HardConsistency,
    MixVal,
    MutualInformation,
    NegativeEntropy,
    NeighbourhoodDensity,
    SoftConsistency,
)
from tests import reference_validation as reference

Seen = List[reference.Position]


class Case(NamedTuple):
    """A validator, and what its scores are by their definition.

    Attributes:
        make: The validator.
        score: Of positions and the number of images.
        by_class: The same of each class, ``None`` where there is none.
        length: Of the statistics, by the class count.
        adds_up: Whether the statistics of two batches add up to those of both in one.
    """

    make: Callable[[], Any]
    score: Callable[[Seen, int], float]
    by_class: Optional[Callable[[Seen, int], List[float]]]
    length: Callable[[int], int]
    adds_up: bool = True


CASES: Dict[str, Case] = {
    "MutualInformation": Case(
        MutualInformation,
        lambda seen, _: reference.mean_entropy(seen) - reference.over(seen, reference.entropies(seen)),
        None,
        lambda classes: classes + 2,
    ),
    "ConsistentInformation": Case(
        ConsistentInformation,
        lambda seen, _: reference.mean_entropy(seen) + reference.over(seen, reference.likelihoods(seen)),
        None,
        lambda classes: classes + 2,
    ),
    "NegativeEntropy": Case(
        NegativeEntropy,
        lambda seen, _: -reference.over(seen, reference.entropies(seen)),
        lambda seen, _: reference.by_label(seen, [-value for value in reference.entropies(seen)]),
        lambda classes: 2 * classes,
    ),
    "SoftConsistency": Case(
        SoftConsistency,
        lambda seen, _: reference.over(seen, reference.likelihoods(seen)),
        lambda seen, _: reference.by_label(seen, reference.likelihoods(seen)),
        lambda classes: 2 * classes,
    ),
    "HardConsistency": Case(
        HardConsistency,
        lambda seen, _: reference.over(seen, reference.agreements(seen)),
        lambda seen, _: reference.by_label(seen, reference.agreements(seen)),
        lambda classes: 2 * classes,
    ),
    "ConsistencyIoU": Case(
        ConsistencyIoU,
        lambda seen, _: reference.known(reference.ious(seen)),
        lambda seen, _: reference.ious(seen),
        lambda classes: 3 * classes,
    ),
    "NeighbourhoodDensity": Case(
        lambda: NeighbourhoodDensity(temperature=0.1),
        lambda seen, _: reference.density(seen, 0.1),
        None,
        lambda classes: 2,
        adds_up=False,
    ),
    "MixVal": Case(
        MixVal,
        lambda seen, images: reference.mixval(seen, images)[0],
        lambda seen, images: reference.mixval(seen, images)[1:],
        lambda classes: 4 * classes,
        adds_up=False,
    ),
}
"""By name: one case for every validator that the package offers."""


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)


def view_of(given: Tensor, seed: int = 7, scale: float = 2.0) -> Tensor:
    """Return logits near the given ones."""
    return given + logits(*given.shape, seed=seed, scale=scale).to(given.dtype)


def scored(validator: Any, *args: Any) -> float:
    return float(validator.score(validator.statistics(*args)))


def same(found: float, expected: float, relative: float = 1e-9) -> bool:
    """Return whether two scores are equal, NaN with NaN."""
    if math.isnan(found) or math.isnan(expected):
        return math.isnan(found) and math.isnan(expected)
    return abs(found - expected) <= relative * max(1.0, abs(expected))
