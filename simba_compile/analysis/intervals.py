"""95% confidence intervals of a mean over sequences."""

import math
import statistics
from collections.abc import Sequence

Z = statistics.NormalDist().inv_cdf(0.975)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The interval of the mean of independent values.

    Parameters
    ----------
    values : sequence of float
        One for each sequence. Where all are 0 or 1 they are taken for right and wrong answers, and Wilson's score interval
        is used (Wilson 1927), which does not shrink to a point at 0 and 1; else the normal one, mean ± 1.96 s/√n.

    Returns
    -------
    tuple of float
        Lower and upper end; of a single value that is not 0 or 1, minus and plus infinity.
    """
    count, mean = len(values), statistics.fmean(values)
    if all(value in (0, 1) for value in values):
        spread = Z * math.sqrt(mean * (1 - mean) / count + (Z / (2 * count)) ** 2)
        centre = mean + Z * Z / (2 * count)
        scale = 1 + Z * Z / count
        return (centre - spread) / scale, (centre + spread) / scale
    if count == 1:
        return -math.inf, math.inf
    half = Z * statistics.stdev(values) / math.sqrt(count)
    return mean - half, mean + half


def paired(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """The mean of ``values − others``, sequence by sequence, with its normal interval: mean, lower, upper.

    Far narrower than what the two intervals tell where both settings find the same sequences hard.
    """
    differences = [value - other for value, other in zip(values, others, strict=True)]
    if len(differences) == 1:
        return differences[0], -math.inf, math.inf
    mean = statistics.fmean(differences)
    half = Z * statistics.stdev(differences) / math.sqrt(len(differences))
    return mean, mean - half, mean + half
