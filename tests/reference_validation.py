"""Slow float64 oracles for validators, written from the equations alone: one position after the other."""

import math
from typing import Dict, List, NamedTuple, Optional

import numpy as np
from torch import Tensor

from tests.reference_update import entropy, float64


class Position(NamedTuple):
    """The log-probabilities at one position on both views, and how much it counts."""

    image: int
    log_p: List[float]
    log_q: List[float]
    weight: float

    @property
    def p(self) -> List[float]:
        return [math.exp(value) for value in self.log_p]

    @property
    def label(self) -> int:
        return int(np.argmax(self.log_p))

    @property
    def view_label(self) -> int:
        return int(np.argmax(self.log_q))


def log_softmax(row: np.ndarray) -> List[float]:
    row = row - row.max()
    return [float(value) for value in row - math.log(sum(math.exp(value) for value in row))]


def positions(logits: Tensor, view: Optional[Tensor] = None, weights: Optional[Tensor] = None) -> List[Position]:
    """Return every position, also those of weight 0, image by image."""
    count, classes = logits.shape[:2]
    first, second = (
        np.moveaxis(float64(one).reshape(count, classes, -1), 1, 2)
        for one in (logits, logits if view is None else view)
    )
    of_position = np.ones(first.shape[:2]) if weights is None else float64(weights).reshape(count, -1)
    return [
        Position(image, log_softmax(p), log_softmax(q), float(weight))
        for image in range(count)
        for p, q, weight in zip(first[image], second[image], of_position[image])
    ]


def mean(values: List[float], weights: List[float]) -> float:
    total = sum(weights)
    return sum(value * weight for value, weight in zip(values, weights)) / total if total else math.nan


def over(seen: List[Position], of_position: List[float]) -> float:
    return mean(of_position, [one.weight for one in seen])


def by_label(seen: List[Position], of_position: List[float]) -> List[float]:
    classes = range(len(seen[0].log_p))
    return [mean(of_position, [one.weight * (one.label == c) for one in seen]) for c in classes]


def mean_entropy(seen: List[Position]) -> float:
    marginal = [over(seen, [one.p[c] for one in seen]) for c in range(len(seen[0].log_p))]
    return math.nan if math.isnan(marginal[0]) else entropy(marginal)


def entropies(seen: List[Position]) -> List[float]:
    return [entropy(one.p) for one in seen]


def likelihoods(seen: List[Position]) -> List[float]:
    return [sum(math.exp(p) * q for p, q in zip(one.log_p, one.log_q)) for one in seen]


def agreements(seen: List[Position]) -> List[float]:
    return [float(one.label == one.view_label) for one in seen]


def ious(seen: List[Position]) -> List[float]:
    found = []
    for c in range(len(seen[0].log_p)):
        both = sum(one.weight for one in seen if one.label == c and one.view_label == c)
        either = sum(one.weight for one in seen if one.label == c or one.view_label == c)
        found.append(both / either if either else math.nan)
    return found


def known(values: List[float]) -> float:
    """Return the mean of what is known, NaN if nothing is."""
    left = [value for value in values if not math.isnan(value)]
    return sum(left) / len(left) if left else math.nan


def density(seen: List[Position], temperature: float) -> float:
    """Return the soft neighbourhood density of the positions that count."""
    seen = [one for one in seen if one.weight > 0]
    if len(seen) < 2:
        return math.nan
    found = []
    for i, one in enumerate(seen):
        others = [np.array(other.p) for j, other in enumerate(seen) if j != i]
        mine = np.array(one.p)
        near = [float(mine @ p / np.linalg.norm(mine) / np.linalg.norm(p)) / temperature for p in others]
        found.append(entropy([math.exp(value) for value in log_softmax(np.array(near))]))
    return over(seen, found)


def mixval(seen: List[Position], images: int) -> List[float]:
    """Return the mean of the accuracies intra and inter: over all classes, then of each."""
    each = len(seen) // images
    hits: Dict[bool, List[List[float]]] = {True: [], False: []}
    for index, one in enumerate(seen):
        other = seen[(index + each) % len(seen)]
        weight = one.weight if other.weight > 0 and images > 1 else 0.0
        hits[one.label == other.label].append([one.label, float(one.view_label == one.label), weight])

    def accuracy(kind: bool, of: Optional[int]) -> float:
        rows = [row for row in hits[kind] if of is None or row[0] == of]
        return mean([row[1] for row in rows], [row[2] for row in rows])

    every = [None, *range(len(seen[0].log_p))]
    return [(accuracy(True, of) + accuracy(False, of)) / 2 for of in every]
