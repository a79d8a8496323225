"""Slow float64 oracles for relations and channel alignment, written from the papers' equations with loops."""

from fractions import Fraction
from typing import List, Sequence

import numpy as np


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Kornblith 2019 with linear kernels: through Gram matrices and HSIC, not through features."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    n = len(x)
    centring = np.eye(n) - np.full((n, n), 1 / n)

    def hsic(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.trace(a @ centring @ b @ centring)) / (n - 1) ** 2

    k, l = x @ x.T, y @ y.T  # noqa: E741
    return hsic(k, l) / float(np.sqrt(hsic(k, k) * hsic(l, l)))


def relative_index(index: int, count: int, others: int) -> int:
    """The nearest of ``others`` layers at the same relative depth, the deeper of two equally near ones."""
    if count == 1:
        return 0
    depth = Fraction(index, count - 1)
    distances = [abs(depth * (others - 1) - other) for other in range(others)]
    return max(other for other in range(others) if distances[other] == min(distances))


def aligned_weight(
    teacher: np.ndarray, student: np.ndarray, out: Sequence[int], into: Sequence[int]
) -> "List[List[np.ndarray]]":
    """W'[i, j] = W_s[out(i), in(j)] / multiplicity(in(j)), the teacher's entry where a channel has no counterpart."""
    rows = []
    for i in range(teacher.shape[0]):
        row = []
        for j in range(teacher.shape[1]):
            if out[i] < 0 or into[j] < 0:
                row.append(teacher[i, j])
            else:
                multiplicity = sum(1 for other in into if other == into[j])
                row.append(student[out[i], into[j]] / multiplicity)
        rows.append(row)
    return rows


def correlation(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Pearson correlation of every column of ``x`` with every column of ``y``; 0 where one does not vary."""
    table = np.zeros((x.shape[1], y.shape[1]))
    for i in range(x.shape[1]):
        for j in range(y.shape[1]):
            if np.ptp(x[:, i]) > 0 and np.ptp(y[:, j]) > 0:
                table[i, j] = np.corrcoef(x[:, i], y[:, j])[0, 1]
    return table
