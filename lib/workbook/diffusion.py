"""Variance-preserving diffusion: noise schedules, time grids, the one sampler loop, networks and exact models.

Everywhere x_t = sqrt(abar(t)) x_0 + sqrt(1 - abar(t)) e, time runs from t = start (noise) down to t = end (data), and
a model is a function eps(x, t) that returns the noise it sees in x.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
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

    def whole(self, times: NDArray) -> NDArray:
        """A falling grid of times rounded to trained levels, and kept strictly falling."""
        found = np.rint(self.levels * np.asarray(times) - 1).astype(int)
        for i in reversed(range(len(found) - 1)):
            found[i] = max(found[i], found[i + 1] + 1)
        return (found + 1) / self.levels

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


def probability_flow(model: Model, schedule: NoiseSchedule) -> Callable[[float, torch.Tensor], torch.Tensor]:
    """The right-hand side f(t, x) of the probability-flow ODE dx/dt = (log abar)'/2 (x - eps / sqrt(1 - abar))."""

    def velocity(t: float, x: torch.Tensor) -> torch.Tensor:
        return float(schedule.slope(t)) / 2 * (x - model(x, t) / float(schedule.noise(t)))

    return velocity


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


def noise(count: int, seeds: Iterable[int], *, shape: Sequence[int] = (1, 32, 32), device: str = "cpu") -> torch.Tensor:
    """`count` samples of white noise from each seed, the same on every device, shape (count * len(seeds), *shape)."""
    drawn = [torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.cat(drawn).to(device)


def eps_network(
    network: torch.nn.Module, schedule: DiscreteVP, *, prediction: Literal["noise", "velocity"] = "noise"
) -> Model:
    """A diffusers network trained at discrete levels, as a model of continuous time.

    prediction: what the network returns, the noise e itself or the velocity sqrt(abar) e - sqrt(1 - abar) x_0, from
    which follows e = sqrt(1 - abar) x_t + sqrt(abar) velocity.
    """
    if prediction not in ("noise", "velocity"):
        raise ValueError(f"prediction = {prediction!r}: a network predicts 'noise' or 'velocity'.")

    @torch.inference_mode()
    def eps(x: torch.Tensor, t: float) -> torch.Tensor:
        level = torch.full((len(x),), schedule.level(t), dtype=torch.float32, device=x.device)
        found = network(x, level).sample
        return found if prediction == "noise" else float(schedule.noise(t)) * x + float(schedule.signal(t)) * found

    return eps


def load_eps_unet(name: str, *, device: str = "cpu") -> tuple[Model, DiscreteVP]:
    """A checkpoint of the shared U-Net as (model, schedule); pictures are float32, (n, 1, 32, 32), in [-1, 1].

    The header of the checkpoint says what the network predicts; the model returns the noise in either case.
    """
    from workbook import checkpoints
    from workbook.models.unet import eps_unet

    schedule, prediction = DiscreteVP.ddpm(), checkpoints.provenance(name).get("prediction", "noise")
    network = checkpoints.restore(eps_unet(), name).to(device, memory_format=torch.channels_last)  # a tenth faster
    return eps_network(network, schedule, prediction=prediction), schedule


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
        parts = (self.means, self.variances, self.weights)
        means, variances, weights = (torch.as_tensor(np.asarray(part, float)) for part in parts)
        return signal * means, signal**2 * variances + noise**2, weights

    def log_components(self, x: torch.Tensor, t: float, schedule: NoiseSchedule) -> torch.Tensor:
        """log(weight_k N(x; …)) of the noised mixture, shape (n, K). x: (n, D) float64."""
        means, variances, weights = self._noised(t, schedule)
        squares = (x[:, None] - means).square().sum(-1)
        return weights.log() - squares / (2 * variances) - x.shape[1] / 2 * (2 * torch.pi * variances).log()

    def log_density(self, x: torch.Tensor, t: float, schedule: NoiseSchedule) -> torch.Tensor:
        """log p_t(x), shape (n,)."""
        return self.log_components(x, t, schedule).logsumexp(1)

    def rank(self, x: torch.Tensor, t: float, schedule: NoiseSchedule) -> torch.Tensor:
        """The share of probability below each point of a one-dimensional mixture, shape (n,): the ODE preserves it."""
        means, variances, weights = self._noised(t, schedule)
        return torch.special.ndtr((x - means.T) / variances.sqrt()) @ weights

    def eps(self, schedule: NoiseSchedule) -> Model:
        """The exact model: -sqrt(1 - abar) times the gradient of log p_t."""

        def model(x: torch.Tensor, t: float) -> torch.Tensor:
            means, variances, _ = self._noised(t, schedule)
            share = self.log_components(x, t, schedule).softmax(1)
            pull = ((x[:, None] - means) / variances[:, None] * share[..., None]).sum(1)
            return float(schedule.noise(t)) * pull

        return model
