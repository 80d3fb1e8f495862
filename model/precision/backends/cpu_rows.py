"""A few rows times a weight, compiled by Numba: what a model multiplies while it makes text.

BLAS chooses its kernel, and with it the order of a sum, by the number of rows. Here every element of the result is one dot product, by the same
instructions however many rows there are; a row of the weight stays in L1 for all of them. Below ten rows that is also the faster way.
"""
# mypy: ignore-errors
# What Numba compiles is its own dialect: a kernel's types are those it is called with.

import numpy as np
from numba import njit


@njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, fastmath={"reassoc", "contract"})
def multiply_rows(x, weight, starts, first, last, y):
    """y[i, n] = x[i] . weight[g * N + n] for rows starts[g] <= i < starts[g + 1] of every group g, and first <= n < last."""
    features, outputs = x.shape[1], y.shape[1]
    for group in range(len(starts) - 1):
        if starts[group] < starts[group + 1]:
            for n in range(first, last):
                row = weight[group * outputs + n]
                for i in range(starts[group], starts[group + 1]):
                    total = np.float32(0)
                    for k in range(features):
                        total += x[i, k] * row[k]
                    y[i, n] = total
