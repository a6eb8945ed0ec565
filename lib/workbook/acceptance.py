"""Acceptance rates of multi-draft rules that methods are compared with, in closed form or by linear program."""

from __future__ import annotations

import numpy as np


def recursive_acceptance(target: np.ndarray, draft: np.ndarray, k: int) -> float:
    """Probability that recursive rejection (RRS, SpecInfer's rule) emits one of k i.i.d. drafts.

    target, draft: probabilities, shape (V,), float64. After each rejection the target becomes the normalised
    max(target - draft, 0).
    """
    rejected, left = 1.0, target
    for _ in range(k):
        rejected *= 1 - np.minimum(left, draft).sum()
        left = np.maximum(left - draft, 0)
        if left.sum() <= 0:
            break
        left = left / left.sum()
    return float(1 - rejected)


def linear_program_acceptance(target: np.ndarray, draft: np.ndarray, k: int) -> float:
    """The optimal acceptance by its definition, for tiny vocabularies: scipy's HiGHS packs the transport plan.

    Variables w(x_1..x_k, y) >= 0 with y among the x; sums over y stay below the product of the draft's probabilities,
    sums over x below the target's. Size about k V**k: use V <= 6.
    """
    from scipy.optimize import linprog

    vocabulary = len(target)
    tuples = np.stack(np.meshgrid(*[np.arange(vocabulary)] * k, indexing="ij"), -1).reshape(-1, k)
    edges = [(i, y) for i, xs in enumerate(tuples) for y in set(xs.tolist())]
    rows = [i for i, _ in edges] + [len(tuples) + y for _, y in edges]
    packing = np.zeros((len(tuples) + vocabulary, len(edges)))
    packing[rows, list(range(len(edges))) * 2] = 1
    limits = np.concatenate([draft[tuples].prod(1), target])
    return float(-linprog(-np.ones(len(edges)), A_ub=packing, b_ub=limits, method="highs").fun)
