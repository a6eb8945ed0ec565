"""Timings that can be trusted: interleaved repeats, bootstrap intervals of ratios, peak memory, FLOP counts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from workbook.study import Measured


def interleaved(functions: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1) -> pd.DataFrame:
    """Time each function `repeats` times, one round after the other so that all see the same machine.

    Every other round runs in reverse order. Returns columns name, repeat, seconds; warm-up rounds are not kept.
    """
    rows = []
    for repeat in range(-warmup, repeats):
        names = list(functions) if repeat % 2 == 0 else list(functions)[::-1]
        for name in names:
            start = time.perf_counter()
            functions[name]()
            seconds = time.perf_counter() - start
            if repeat >= 0:
                rows.append({"name": name, "repeat": repeat, "seconds": seconds})
    return pd.DataFrame(rows)


def bootstrap(
    values: Sequence | np.ndarray,
    statistic: Callable[[np.ndarray], float] = np.mean,
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    **measured,
) -> Measured:
    """`statistic` of `values` with its percentile bootstrap interval over the first axis (prompts, seeds, repeats).

    values: shape (n, …); a statistic of several columns (a ratio of means) gets the resampled rows together.
    measured: fields of Measured to pass on (unit, timed, tolerance).
    """
    values = np.asarray(values, dtype=float)
    if len(values) == 0:
        raise ValueError("bootstrap needs at least one value.")
    picks = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    samples = np.array([statistic(values[pick]) for pick in picks])
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return Measured(float(statistic(values)), float(low), float(high), n=len(values), **measured)


def jackknife(values: Sequence, statistic: Callable[[np.ndarray], float], *, groups: int = 20, **options) -> Measured:
    """A statistic of all rows and its 95 % interval, from leaving out one of `groups` groups of rows after another.

    For statistics that repeated rows would distort, as a bootstrap's do a Fréchet distance's. The interval is
    symmetric, 1.96 standard errors (Efron and Tibshirani 1993, section 11.5). options: fields of Measured.
    ValueError for fewer rows than groups.
    """
    values = np.asarray(values)
    if len(values) < groups:
        raise ValueError(f"{len(values)} rows cannot be cut into {groups} groups: give more rows, or groups=.")
    blocks = np.array_split(np.arange(len(values)), groups)
    without = np.array([statistic(np.delete(values, block, axis=0)) for block in blocks], dtype=float)
    half, value = 1.96 * float(np.sqrt((groups - 1) * without.var())), float(statistic(values))
    return Measured(value, value - half, value + half, n=len(values), **options)


def ratio(numerator: Sequence, denominator: Sequence, **options) -> Measured:
    """Ratio of the two means over paired units, with its bootstrap interval (options as for `bootstrap`)."""
    pairs = np.stack([np.asarray(numerator, float), np.asarray(denominator, float)], axis=1)
    return bootstrap(pairs, lambda rows: rows[:, 0].mean() / rows[:, 1].mean(), **options)


def speed_up(table: pd.DataFrame, baseline: str, method: str, **options) -> Measured:
    """How many times faster `method` is than `baseline` in a table of `interleaved`: median of paired ratios."""
    wide = table.pivot(index="repeat", columns="name", values="seconds")
    ratios = (wide[baseline] / wide[method]).to_numpy()
    return bootstrap(ratios, np.median, **({"timed": True, "unit": "×"} | options))


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations of the matrix products and convolutions that `function` runs (torch's counter)."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()
