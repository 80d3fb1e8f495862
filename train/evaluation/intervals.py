"""How sure a share is: bootstrap intervals over independent pieces of text."""

import numpy as np

RESAMPLES = 1000
COVERED = 95  # percent


def share_interval(hits: np.ndarray, chances: np.ndarray) -> tuple[float, float, float]:
    """sum(hits) / sum(chances) and the 95% bootstrap interval of it, (share, low, high).

    hits, chances: [pieces], counts of each piece of text; what counts as one draw of the bootstrap is a piece, as neighbouring tokens depend on
    each other (the ratio estimator under the cluster bootstrap of Efron and Tibshirani 1993, with percentile limits). The same counts give the
    same interval. Raises ZeroDivisionError without a chance.
    """
    if not chances.sum():
        raise ZeroDivisionError("a share needs a chance")
    draws = np.random.Generator(np.random.Philox(key=len(hits))).integers(len(hits), size=(RESAMPLES, len(hits)))
    tried = chances[draws].sum(1)
    shares = hits[draws].sum(1)[tried > 0] / tried[tried > 0]
    low, high = np.percentile(shares, [(100 - COVERED) / 2, (100 + COVERED) / 2])
    return float(hits.sum() / chances.sum()), float(low), float(high)
