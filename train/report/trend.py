"""A level and a trend of a noisy series, with standard errors that hold when neighbouring points resemble each other.

    y_i = level + trend * (x_i - mean x) + noise_i,      noise_i = r noise_{i-1} + white_i

Ordinary least squares fits both. Its usual standard errors take every point for new evidence; under the noise above they are too small by about
sqrt((1 + r) / (1 - r)), a factor of 3 at r = 0.8. For a constant and a straight line the error follows from the long-run variance of the
noise alone (Grenander and Rosenblatt 1957), var(white) / (1 - r)^2, estimated here after prewhitening (Andrews and Monahan 1992), with r
corrected for its bias towards zero in short series, (1 + 3 r) / n (Kendall 1954).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FEWEST = 8  # points a fit needs
_LARGEST_R = 0.97  # beyond, a series knows nothing of its level


@dataclass(frozen=True)
class Trend:
    """level: the mean over the series; at_end: what the line has come to; trend: per unit of x; each with its standard error. r: of the noise."""

    level: float
    level_error: float
    trend: float
    trend_error: float
    at_end: float
    at_end_error: float
    r: float
    points: int


def fit_trend(x: np.ndarray, y: np.ndarray) -> Trend:
    """x: rising, fp64 [n]; y: finite, fp64 [n]. Raises ValueError for fewer than FEWEST points."""
    count = len(x)
    if count < FEWEST:
        raise ValueError(f"{count} points are too few for a trend: it takes {FEWEST}")
    centred = x - x.mean()
    spread = float(centred @ centred)
    level, trend = float(y.mean()), float(centred @ y) / spread
    noise = y - level - trend * centred
    power = float(noise[:-1] @ noise[:-1])
    raw = float(noise[:-1] @ noise[1:]) / power if power > 0 else 0.0
    r = min(max(raw + (1 + 3 * raw) / count, 0.0), _LARGEST_R)
    white = noise[1:] - r * noise[:-1]
    variance = float(white @ white) / (count - 3) / (1 - r) ** 2
    end = float(centred[-1])
    level_variance, trend_variance = variance / count, variance / spread
    return Trend(
        level,
        level_variance**0.5,
        trend,
        trend_variance**0.5,
        level + trend * end,
        (level_variance + end**2 * trend_variance) ** 0.5,
        r,
        count,
    )
