"""Comparing diffusion samplers: one table for all of them, and the peers that diffusers and scipy bring."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from workbook.diffusion import Counted, Method, Model, NoiseSchedule, Step, probability_flow, sample

if TYPE_CHECKING:
    import pandas as pd

    from workbook.study import Measured


@dataclass(frozen=True)
class Sampler:
    """A method and its price: steps = (calls - extra) // calls_per_step."""

    method: Method
    calls_per_step: int = 1
    extra: int = 0


def compare(
    model: Model,
    x: torch.Tensor,
    schedule: NoiseSchedule,
    samplers: Mapping[str, Sampler],
    budgets: Sequence[int],
    reference: torch.Tensor,
    *,
    grid: Callable[[NoiseSchedule, int], NDArray],
) -> tuple[pd.DataFrame, dict[tuple[str, int], torch.Tensor]]:
    """Every sampler at every budget of network calls, from the same noises x, on the same kind of grid.

    reference: where x should end; grid(schedule, steps): the times. A sampler that cannot make one step is left out.
    Returns a table with one row a noise (sampler, budget, calls, noise, error, seconds, network_seconds; calls are
    counted, error is the root mean square over pixels, seconds are of the whole batch), and the end points.
    """
    import pandas as pd
    from tqdm.auto import tqdm

    runs = [(name, budget) for budget in budgets for name in samplers]
    parts, ends = [], {}
    for name, budget in tqdm(runs, desc="samplers", leave=False, delay=2):
        sampler, counted = samplers[name], Counted(model)
        steps = (budget - sampler.extra) // sampler.calls_per_step
        if steps < 1:
            continue
        started = time.perf_counter()
        end = sample(counted, x, schedule, method=sampler.method, times=grid(schedule, steps))
        seconds = time.perf_counter() - started
        error = (end - reference).double().flatten(1).square().mean(1).sqrt().cpu().numpy()
        facts = {"sampler": name, "budget": budget, "calls": counted.calls, "noise": np.arange(len(x)), "error": error}
        parts.append(pd.DataFrame(facts | {"seconds": seconds, "network_seconds": counted.seconds}))
        ends[name, budget] = end
    return pd.concat(parts, ignore_index=True), ends


def rmse(errors: ArrayLike) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(np.asarray(errors)))))


def summarise(table: pd.DataFrame, by: Sequence[str] = ("sampler", "calls")) -> pd.DataFrame:
    """One row a group of a table of `compare`: rmse with its 95 % bootstrap interval over noises, and the median."""
    import pandas as pd

    from workbook.measure import bootstrap

    rows = []
    for key, part in table.groupby(list(by), sort=False):
        m = bootstrap(part.error, lambda e: np.sqrt(np.mean(e * e)), draws=200)
        facts = {"rmse": m.value, "low": m.low, "high": m.high, "median": part.error.median()}
        rows.append(dict(zip(by, key, strict=True)) | facts)
    return pd.DataFrame(rows)


# -- peers ------------------------------------------------------------------------------------------------------------


def rmse_ratio(table: pd.DataFrame, *pairs: tuple[Any, Any], key: str | Sequence[str] = "sampler") -> Measured:
    """The largest ratio rmse(a) / rmse(b) among pairs (a, b) of a table of `compare`, with its interval over noises.

    key: the column, or columns, that a and b name; the rows that remain must be one a noise.
    """
    from workbook.measure import bootstrap

    wide = table.pivot(index="noise", columns=key if isinstance(key, str) else list(key), values="error")
    squares = np.stack([np.stack([wide[a], wide[b]], 1) for a, b in pairs], 1) ** 2  # (noise, pair, 2)

    def worst(rows: NDArray) -> float:
        return np.sqrt(rows[..., 0].mean(0) / rows[..., 1].mean(0)).max()

    return bootstrap(squares, worst, unit="×", tolerance=0.05)


def diffusers_method(name: str, **options) -> Method:
    """A scheduler of diffusers by class name, on any time grid.

    Multistep solvers that work on sigmas (DPMSolverMultistepScheduler, UniPCMultistepScheduler,
    DEISMultistepScheduler) get the grid's rho; DDIMScheduler and PNDMScheduler get a table of abar with one entry a
    grid point. All start at times[0] and end at times[-1], not at a clean image beyond it. PNDMScheduler calls the
    model once more than it has steps.
    """

    def build(schedule: NoiseSchedule, times: NDArray) -> Step:
        import diffusers

        return (_by_table if name in ("DDIMScheduler", "PNDMScheduler") else _by_sigma)(
            getattr(diffusers, name), options, schedule, times
        )

    return build


def _by_sigma(kind: type, options: dict, schedule: NoiseSchedule, times: NDArray) -> Step:
    scheduler = kind(**options)
    scheduler.set_timesteps(len(times) - 1)
    scheduler.sigmas = torch.from_numpy(schedule.rho(times)).float()
    scheduler.timesteps = torch.arange(len(times) - 1)
    scheduler.set_begin_index(0)

    def step(model: Model, x: torch.Tensor, i: int) -> torch.Tensor:
        return scheduler.step(model(x, float(times[i])), scheduler.timesteps[i], x).prev_sample

    return step


def _by_table(kind: type, options: dict, schedule: NoiseSchedule, times: NDArray) -> Step:
    last = len(times) - 1
    table = np.exp(schedule.log_alpha_bar(times))[::-1].copy()
    if kind.__name__ == "PNDMScheduler":
        options = {"skip_prk_steps": True} | options
    else:
        options = {"clip_sample": False} | options
    scheduler = kind(num_train_timesteps=last + 1, set_alpha_to_one=False, **options)
    scheduler.set_timesteps(last + 1)
    scheduler.alphas_cumprod = torch.from_numpy(table)
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]

    def step(model: Model, x: torch.Tensor, i: int) -> torch.Tensor:
        following = scheduler.step(model(x, float(times[i])), last - i, x).prev_sample
        if i == 0 and kind.__name__ == "PNDMScheduler":  # its first step looks ahead once and starts again
            following = scheduler.step(model(following, float(times[1])), last - 1, following).prev_sample
        return following.to(x.dtype)

    return step


def adaptive_method(tolerance: float, solver: str = "RK45") -> Method:
    """A black-box solver of scipy on the probability-flow ODE, at relative and absolute `tolerance`.

    It takes as many calls as it wants between two points of the grid: give it one interval, and count.
    """

    def build(schedule: NoiseSchedule, times: NDArray) -> Step:
        from scipy.integrate import solve_ivp

        def step(model: Model, x: torch.Tensor, i: int) -> torch.Tensor:
            flow = probability_flow(model, schedule)

            def velocity(t: float, flat: NDArray) -> NDArray:
                return flow(t, torch.from_numpy(flat).to(x).reshape(x.shape)).double().cpu().numpy().ravel()

            flat, ends = x.double().cpu().numpy().ravel(), (times[i], times[i + 1])
            found = solve_ivp(velocity, ends, flat, solver, t_eval=ends[1:], rtol=tolerance, atol=tolerance)
            if not found.success:
                raise RuntimeError(f"{solver} gave up between t = {ends[0]:.4g} and {ends[1]:.4g}: {found.message}")
            return torch.from_numpy(found.y[:, -1].copy()).to(x).reshape(x.shape)

        return step

    return build
