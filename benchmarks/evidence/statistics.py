"""Paired differences over seeds: mean, 95% bootstrap interval, and Holm's correction over a family of comparisons."""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Sequence

import numpy as np
from scipy import stats


class Difference(NamedTuple):
    """A paired difference in points.

    Attributes:
        mean: Over the seeds.
        low: Lower end of the 95% interval.
        high: Upper end.
        p: Two-sided p-value of the sign-flip permutation test.
        seeds: Number of pairs.
    """

    mean: float
    low: float
    high: float
    p: float
    seeds: int

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval is."""
        return self.low > 0


def paired(ours: Sequence[float], theirs: Sequence[float]) -> Optional[Difference]:
    """Return the difference of paired figures, or ``None`` for fewer than three pairs.

    The interval is the bias-corrected and accelerated bootstrap's (Efron, 1987), and of no width where all differences
    are equal but for rounding; the test is exact for up to twelve pairs.
    """
    difference = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    if len(difference) < 3:
        return None
    mean = float(difference.mean())
    if np.ptp(difference) < 1e-12:
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 2.0 ** (1 - len(difference)), len(difference))
    interval = stats.bootstrap(
        (difference,), np.mean, n_resamples=10_000, method="BCa", random_state=np.random.default_rng(0)
    ).confidence_interval
    test = stats.permutation_test(
        (difference,), np.mean, permutation_type="samples", n_resamples=10_000, random_state=np.random.default_rng(0)
    )
    return Difference(mean, float(interval.low), float(interval.high), float(test.pvalue), len(difference))


def holm(p_values: Dict[str, float]) -> Dict[str, float]:
    """Return adjusted p-values that hold for all of a family at once (Holm, 1979)."""
    adjusted: Dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = largest
    return adjusted
