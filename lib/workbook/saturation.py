"""Saturating laws: a sigmoid with free height and floor, its inverse and its fits; predictions for what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

Method = Callable[[NDArray, NDArray, NDArray], NDArray]  # (features, y, features to predict) -> predictions


def sigmoid(x, height: float, slope: float, centre: float, floor: float) -> np.ndarray:
    """A saturating law: height / (1 + exp(-slope (x + centre))) + floor."""
    from scipy.special import expit

    return height * expit(slope * (np.asarray(x) + centre)) + floor


def inverse_sigmoid(y, height: float, slope: float, centre: float, floor: float) -> np.ndarray:
    """x with sigmoid(x) = y; ValueError if a y does not lie strictly between floor and floor + height."""
    share = (np.asarray(y) - floor) / height
    if (share <= 0).any() or (share >= 1).any():
        ends = f"{floor:.3g} to {floor + height:.3g}"
        raise ValueError(f"y from {np.min(y):.3g} to {np.max(y):.3g} leaves the sigmoid's open range, {ends}.")
    return np.log(share / (1 - share)) / slope - centre


def fit_sigmoid(x, y, *, room: float = 0.25) -> tuple[float, float, float, float]:
    """Least-squares (height, slope, centre, floor) of y against x; the range exceeds y's by `room` or more each way."""
    from scipy.optimize import curve_fit

    low, high = np.min(y) - room, np.max(y) + room

    def curve(x, slope, centre, above, below):
        return sigmoid(x, high - low + above + below, slope, centre, low - below)

    bounds = ([0.05, -5, 0, 0], [20, 5, 5, 5])
    slope, centre, above, below = curve_fit(curve, x, y, p0=(1.0, 0.0, 0.1, 0.1), bounds=bounds, max_nfev=20_000)[0]
    return high - low + above + below, slope, centre, low - below


def fit_at_once(
    columns: NDArray, y: NDArray, weights: NDArray, shape: tuple[float, ...]
) -> tuple[NDArray, tuple[float, ...]]:
    """Weights and shape of y = sigmoid(columns @ weights) by nonlinear least squares, started from those given.

    Those are returned where the search does not converge.
    """
    from scipy.optimize import curve_fit

    n = len(weights)
    start = np.concatenate([weights, shape])
    try:
        found = curve_fit(lambda c, *p: sigmoid(c @ p[:n], *p[n:]), columns, y, p0=start, maxfev=20_000)[0]
    except RuntimeError:  # no convergence
        return weights, tuple(shape)
    return found[:n], tuple(found[n:])


def held_out(method: Method, features: NDArray, y: NDArray, masks: Iterable[NDArray]) -> NDArray:
    """y, but where a mask is True the prediction by a fit on all rows where it is False."""
    out = np.array(y, float)
    for mask in masks:
        out[mask] = method(features[~mask], np.asarray(y)[~mask], features[mask])
    return out
