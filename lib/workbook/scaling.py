"""Scaling laws: fits with intervals, and frontiers of score against cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PowerLaw:
    """y = factor * x**exponent, with the interval of the exponent."""

    factor: float
    exponent: float
    low: float
    high: float
    n: int

    def __call__(self, x):
        """The law at x."""
        return self.factor * np.asarray(x, float) ** self.exponent


def power_law(x, y, *, level: float = 0.95) -> PowerLaw:
    """Least squares of log y on log x; the exponent's interval is Student's t with n - 2 degrees of freedom.

    x, y: positive, at least three points with two different x. Raises ValueError otherwise.
    """
    from scipy.stats import linregress, t

    x, y = np.asarray(x, float), np.asarray(y, float)
    if x.shape != y.shape or x.ndim != 1 or len(x) < 3:
        raise ValueError(f"a power law needs at least three points (x, y), got shapes {x.shape} and {y.shape}.")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (x > 0).all() and (y > 0).all()):
        raise ValueError("a power law needs finite positive x and y.")
    if np.ptp(x) == 0:
        raise ValueError("a power law needs two different x.")
    fit = linregress(np.log(x), np.log(y))
    margin = t.ppf((1 + level) / 2, len(x) - 2) * fit.stderr
    return PowerLaw(float(np.exp(fit.intercept)), fit.slope, fit.slope - margin, fit.slope + margin, len(x))


def additive_fit(features, y) -> tuple[np.ndarray, np.ndarray]:
    """Non-negative weights of y = features @ weights, by least squares of the relative error, and held-out values.

    features: (n, terms), a column of ones for a constant; y: (n,), positive. Returns (weights, predictions), where
    each prediction comes from a fit that did not see its point.
    """
    from scipy.optimize import nnls

    features, y = np.asarray(features, float), np.asarray(y, float)
    scale = features.max(0)
    columns = features / scale / y[:, None]
    others = [np.arange(len(y)) != i for i in range(len(y))]
    held_out = [features[i] / scale @ nnls(columns[keep], np.ones(keep.sum()))[0] for i, keep in enumerate(others)]
    return nnls(columns, np.ones(len(y)))[0] / scale, np.array(held_out)


def smooth(curves: np.ndarray) -> np.ndarray:
    """Moving average over three neighbours of the last axis; the ends count themselves twice."""
    padded = np.concatenate([curves[..., :1], curves, curves[..., -1:]], axis=-1)
    return (padded[..., :-2] + padded[..., 1:-1] + padded[..., 2:]) / 3


def envelope(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The best value over the first axis at each budget, and which row has it. curves: (models, budgets)."""
    return curves.max(0), curves.argmax(0)


def cheapest(curves: np.ndarray, budgets: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Least budget at which each curve reaches each level, (models, levels); infinite where it never does."""
    reached = np.maximum.accumulate(curves, axis=1)[:, None, :] >= levels[None, :, None]
    return np.where(reached.any(2), budgets[reached.argmax(2)], np.inf)
