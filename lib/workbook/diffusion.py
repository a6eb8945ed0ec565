"""Variance-preserving diffusion: noise schedules, time grids, the sampler loop, exact models, peers to compare with.

Everywhere x_t = sqrt(abar(t)) x_0 + sqrt(1 - abar(t)) e, time runs from t = start (noise) down to t = end (data), and
a model is a function eps(x, t) that returns the noise it sees in x.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Model = Callable[[torch.Tensor, float], torch.Tensor]  # (x, t) -> eps, same shape as x
Step = Callable[[Model, torch.Tensor, int], torch.Tensor]  # (model, x at times[i], i) -> x at times[i + 1]
Callback = Callable[[int, float, torch.Tensor], None]  # (steps done, time reached, x there)


# -- noise schedules --------------------------------------------------------------------------------------------------


class NoiseSchedule:
    """How much noise there is at time t. A subclass gives log abar, its slope and its inverse, in float64."""

    start: float = 1.0
    end: float = 1e-3

    def log_alpha_bar(self, t: ArrayLike) -> NDArray:
        """log abar(t), falling in t."""
        raise NotImplementedError

    def slope(self, t: ArrayLike) -> NDArray:
        """d log abar / dt, negative."""
        raise NotImplementedError

    def time_of_log_alpha_bar(self, value: ArrayLike) -> NDArray:
        """The time at which log abar has this value."""
        raise NotImplementedError

    def signal(self, t: ArrayLike) -> NDArray:
        """sqrt(abar): the factor on the data."""
        return np.exp(self.log_alpha_bar(t) / 2)

    def noise(self, t: ArrayLike) -> NDArray:
        """sqrt(1 - abar): the factor on the noise."""
        return np.sqrt(-np.expm1(self.log_alpha_bar(t)))

    def rho(self, t: ArrayLike) -> NDArray:
        """noise / signal, rising in t."""
        return np.sqrt(np.expm1(-self.log_alpha_bar(t)))

    def time_of_rho(self, rho: ArrayLike) -> NDArray:
        """The time at which noise / signal has this value."""
        return self.time_of_log_alpha_bar(-np.log1p(np.square(rho)))


@dataclass(frozen=True)
class LinearVP(NoiseSchedule):
    """Noise rate beta(t) = beta_min + t (beta_max - beta_min) on 0 < t <= 1 (Song et al. 2021)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    start: float = 1.0
    end: float = 1e-3

    def log_alpha_bar(self, t: ArrayLike) -> NDArray:
        t = np.asarray(t, float)
        return -t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def slope(self, t: ArrayLike) -> NDArray:
        return -(self.beta_min + np.asarray(t, float) * (self.beta_max - self.beta_min))

    def time_of_log_alpha_bar(self, value: ArrayLike) -> NDArray:
        value = np.asarray(value, float)
        root = np.sqrt(self.beta_min**2 - 2 * (self.beta_max - self.beta_min) * value)
        return -2 * value / (self.beta_min + root)  # the form without cancellation at small t


class DiscreteVP(NoiseSchedule):
    """The schedule of a network trained at n discrete noise levels, continued between them.

    alpha_bar: abar of level 0 … n-1, falling. Level i is time (i + 1) / n. A cubic spline of log abar passes through
    every trained level and has a smooth slope, which quadrature and high-order solvers rely on.
    """

    def __init__(self, alpha_bar: ArrayLike):
        from scipy.interpolate import CubicSpline

        alpha_bar = np.asarray(alpha_bar, float)
        if alpha_bar.ndim != 1 or len(alpha_bar) < 4 or not np.all(np.diff(alpha_bar) < 0) or not 0 < alpha_bar[-1] < 1:
            raise ValueError("alpha_bar must be at least four values between 0 and 1 that fall strictly.")
        self.levels = len(alpha_bar)
        self.start, self.end = 1.0, 1.0 / self.levels
        self._times = (np.arange(self.levels) + 1) / self.levels
        self._values = np.log(alpha_bar)
        self._spline = CubicSpline(self._times, self._values)
        self._derivative = self._spline.derivative()

    @classmethod
    def ddpm(cls, levels: int = 1000, beta_first: float = 1e-4, beta_last: float = 0.02) -> DiscreteVP:
        """The levels of DDPM: abar_i = prod(1 - beta_j) with equally spaced beta."""
        return cls(np.exp(np.cumsum(np.log1p(-np.linspace(beta_first, beta_last, levels)))))

    def level(self, t: float) -> float:
        """The network's own time, 0 … n-1, not rounded."""
        return self.levels * float(t) - 1

    def log_alpha_bar(self, t: ArrayLike) -> NDArray:
        return self._spline(np.asarray(t, float))

    def slope(self, t: ArrayLike) -> NDArray:
        return self._derivative(np.asarray(t, float))

    def time_of_log_alpha_bar(self, value: ArrayLike) -> NDArray:
        value = np.asarray(value, float)
        t = np.interp(-value, -self._values, self._times)
        for _ in range(4):  # Newton; the table is within 1e-3 of the root
            t = np.clip(t - (self.log_alpha_bar(t) - value) / self.slope(t), self.end, self.start)
        return t


def time_grid(
    schedule: NoiseSchedule, steps: int, *, kind: Literal["t", "rho", "log"] = "t", power: float = 2.0
) -> NDArray:
    """Times from schedule.start down to schedule.end, shape (steps + 1,).

    kind "t": equal steps in t**(1/power); "rho": equal steps in rho**(1/power); "log": equal steps in log rho.
    """
    if steps < 1:
        raise ValueError(f"steps = {steps}: a time grid has at least one step.")
    ends = np.array([schedule.start, schedule.end])
    fraction = np.linspace(0, 1, steps + 1)
    if kind == "t":
        first, last = ends ** (1 / power)
        times = (first + fraction * (last - first)) ** power
    elif kind == "rho":
        first, last = schedule.rho(ends) ** (1 / power)
        times = schedule.time_of_rho((first + fraction * (last - first)) ** power)
    elif kind == "log":
        first, last = np.log(schedule.rho(ends))
        times = schedule.time_of_rho(np.exp(first + fraction * (last - first)))
    else:
        raise ValueError(f"kind = {kind!r} is no time grid: use 't', 'rho' or 'log'.")
    times[[0, -1]] = ends
    return times


# -- the loop ---------------------------------------------------------------------------------------------------------


Method = Callable[[NoiseSchedule, NDArray], Step]  # prepares a step for one schedule and grid


@torch.no_grad()
def sample(
    model: Model,
    x: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    method: Method,
    times: NDArray,
    callback: Callback | None = None,
) -> torch.Tensor:
    """Carry x from times[0] to times[-1] with the steps of `method`.

    x: noise of shape (n, …); times: falling, shape (steps + 1,); callback(i, t, x): called after each step.
    """
    if not np.all(np.diff(times) < 0):
        raise ValueError("times must fall strictly from the noise to the data.")
    step = method(schedule, times)
    for i in range(len(times) - 1):
        x = step(model, x, i)
        if callback is not None:
            callback(i + 1, float(times[i + 1]), x)
    return x


class Counted:
    """A model that counts its calls and the seconds spent in them."""

    def __init__(self, model: Model):
        self.model, self.calls, self.seconds = model, 0, 0.0

    def __call__(self, x: torch.Tensor, t: float) -> torch.Tensor:
        started = time.perf_counter()
        eps = self.model(x, t)
        if eps.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        self.calls += 1
        return eps


def eps_network(network: torch.nn.Module, schedule: DiscreteVP) -> Model:
    """A diffusers network trained at discrete levels, as a model of continuous time."""

    @torch.inference_mode()
    def eps(x: torch.Tensor, t: float) -> torch.Tensor:
        return network(x, torch.full((len(x),), schedule.level(t), dtype=torch.float32, device=x.device)).sample

    return eps


def load_eps_unet(name: str, *, device: str = "cpu") -> tuple[Model, DiscreteVP]:
    """A checkpoint of the shared U-Net as (model, schedule); pictures are float32, (n, 1, 32, 32), in [-1, 1]."""
    from workbook import checkpoints
    from workbook.models.unet import eps_unet

    schedule = DiscreteVP.ddpm()
    return eps_network(checkpoints.restore(eps_unet(), name).to(device), schedule), schedule


# -- models that are exact --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GaussianMixture:
    """Data whose eps(x, t) is known in closed form: a mixture of isotropic Gaussians.

    means: (K, D); variances, weights: (K,); weights sum to one.
    """

    means: ArrayLike
    variances: ArrayLike
    weights: ArrayLike = field(default=(1.0,))

    def _noised(self, t: float, schedule: NoiseSchedule) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        signal, noise = float(schedule.signal(t)), float(schedule.noise(t))
        means, variances, weights = (torch.as_tensor(np.asarray(v, float)) for v in (self.means, self.variances, self.weights))
        return signal * means, signal**2 * variances + noise**2, weights

    def log_components(self, x: torch.Tensor, t: float, schedule: NoiseSchedule) -> torch.Tensor:
        """log(weight_k N(x; …)) of the noised mixture, shape (n, K). x: (n, D) float64."""
        means, variances, weights = self._noised(t, schedule)
        squares = (x[:, None] - means).square().sum(-1)
        return weights.log() - squares / (2 * variances) - x.shape[1] / 2 * (2 * torch.pi * variances).log()

    def log_density(self, x: torch.Tensor, t: float, schedule: NoiseSchedule) -> torch.Tensor:
        """log p_t(x), shape (n,)."""
        return self.log_components(x, t, schedule).logsumexp(1)

    def eps(self, schedule: NoiseSchedule) -> Model:
        """The exact model: -sqrt(1 - abar) times the gradient of log p_t."""

        def model(x: torch.Tensor, t: float) -> torch.Tensor:
            means, variances, _ = self._noised(t, schedule)
            share = self.log_components(x, t, schedule).softmax(1)
            pull = ((x[:, None] - means) / variances[:, None] * share[..., None]).sum(1)
            return float(schedule.noise(t)) * pull

        return model


# -- peers ------------------------------------------------------------------------------------------------------------


def diffusers_method(name: str, **options) -> Method:
    """A scheduler of diffusers by class name, on any time grid.

    Multistep solvers that work on sigmas (DPMSolverMultistepScheduler, UniPCMultistepScheduler,
    DEISMultistepScheduler) get the grid's rho; DDIMScheduler and PNDMScheduler get a table of abar with one entry a grid
    point. All start at times[0] and end at times[-1], not at a clean image beyond it.
    PNDMScheduler calls the model once more than it has steps.
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


def probability_flow(model: Model, schedule: NoiseSchedule) -> Callable[[float, torch.Tensor], torch.Tensor]:
    """The right-hand side f(t, x) of the probability-flow ODE dx/dt = (log abar)'/2 (x - eps / sqrt(1 - abar))."""

    def velocity(t: float, x: torch.Tensor) -> torch.Tensor:
        return float(schedule.slope(t)) / 2 * (x - model(x, t) / float(schedule.noise(t)))

    return velocity


@torch.no_grad()
def sample_adaptive(
    model: Model,
    x: torch.Tensor,
    schedule: NoiseSchedule,
    *,
    tolerance: float,
    solver: str = "RK45",
    callback: Callback | None = None,
) -> torch.Tensor:
    """Solve the probability-flow ODE with a black-box solver of scipy at relative and absolute `tolerance`.

    The number of calls is the solver's choice: wrap the model in `Counted` to know it.
    """
    from scipy.integrate import solve_ivp

    flow = probability_flow(model, schedule)

    def velocity(t: float, flat: NDArray) -> NDArray:
        return flow(t, torch.from_numpy(flat).to(x).reshape(x.shape)).double().cpu().numpy().ravel()

    flat = x.detach().double().cpu().numpy().ravel()
    found = solve_ivp(velocity, (schedule.start, schedule.end), flat, solver, rtol=tolerance, atol=tolerance)
    if not found.success:
        raise RuntimeError(f"{solver} stopped at t = {found.t[-1]:.4g}: {found.message}")
    end = torch.from_numpy(found.y[:, -1].copy()).to(x).reshape(x.shape)
    if callback is not None:
        callback(len(found.t) - 1, schedule.end, end)
    return end
