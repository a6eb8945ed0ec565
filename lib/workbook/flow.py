"""Flow matching: the straight path between data and noise, its time grids, its steps and its training loss.

Everywhere x_sigma = (1 - sigma) x_0 + sigma n with sigma from 1 (noise) down to 0 (data), and a model is a function
v(x, sigma) that returns the velocity n - x_0 it expects at x. The loop is `diffusion.sample`.
"""

from __future__ import annotations

from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from workbook.diffusion import Method, Model, Step


class StraightPath:
    """x_sigma = (1 - sigma) x_0 + sigma n, what the methods below take as their schedule."""

    start, end = 1.0, 0.0

    def signal(self, sigma: ArrayLike) -> NDArray:
        """1 - sigma: the factor on the data."""
        return 1 - np.asarray(sigma, float)

    def noise(self, sigma: ArrayLike) -> NDArray:
        """sigma: the factor on the noise."""
        return np.asarray(sigma, float)


PATH = StraightPath()
AT_ONCE = 2**14  # pixels in one pass on a CPU: activations that stay in its cache made a pass 1.5 times faster


def shift(sigma: ArrayLike, s: float) -> NDArray:
    """s sigma / (1 + (s - 1) sigma): noise levels moved towards 1 for s > 1 (Esser et al. 2024, equation 23)."""
    if not s > 0:
        raise ValueError(f"shift = {s}: a shift is above 0; 1 changes nothing.")
    sigma = np.asarray(sigma, float)
    return s * sigma / (1 + (s - 1) * sigma)


def grid(steps: int, s: float = 1.0) -> NDArray:
    """Noise levels 1 = sigma_0 > … > sigma_steps = 0: equal steps, shifted by s; shape (steps + 1,)."""
    if steps < 1:
        raise ValueError(f"steps = {steps}: a grid has at least one step.")
    return shift(np.linspace(1, 0, steps + 1), s)


def euler(schedule: Any, sigmas: NDArray) -> Step:
    """x + (sigma' - sigma) v(x, sigma): one call a step."""

    def step(model: Model, x: torch.Tensor, i: int) -> torch.Tensor:
        return x + float(sigmas[i + 1] - sigmas[i]) * model(x, float(sigmas[i]))

    return step


def heun(schedule: Any, sigmas: NDArray) -> Step:
    """The trapezoidal rule after an Euler step: two calls a step, one in the last, which ends at sigma = 0."""

    def step(model: Model, x: torch.Tensor, i: int) -> torch.Tensor:
        width, first = float(sigmas[i + 1] - sigmas[i]), model(x, float(sigmas[i]))
        if sigmas[i + 1] == 0:
            return x + width * first
        return x + width / 2 * (first + model(x + width * first, float(sigmas[i + 1])))

    return step


def diffusers_flow(name: str = "FlowMatchEulerDiscreteScheduler", **options) -> Method:
    """A flow-matching scheduler of diffusers by class name, on any grid that ends at 0: one call a step.

    FlowMatchHeunDiscreteScheduler makes two calls a step, one in the last: `heun` is the same rule.
    """

    def build(schedule: Any, sigmas: NDArray) -> Step:
        import diffusers

        scheduler = getattr(diffusers, name)(**options)
        scheduler.set_timesteps(sigmas=list(sigmas[:-1]))
        scheduler.set_begin_index(0)

        def step(model: Model, x: torch.Tensor, i: int) -> torch.Tensor:
            return scheduler.step(model(x, float(sigmas[i])), scheduler.timesteps[i], x).prev_sample

        return step

    return build


def conditional(network: torch.nn.Module, labels: torch.Tensor, *, guidance: float = 1.0) -> Model:
    """A class-conditional network as a model: v(x, sigma), or v(none) + guidance (v(label) - v(none)).

    labels: (n,) of int64, one for each picture that the model will see. Guidance 1 needs one call of the network,
    any other value one call of twice the batch (Ho and Salimans 2022). A CPU takes a large batch in parts.
    """
    from workbook.models.dit import NO_LABEL

    def one_pass(x: torch.Tensor, sigma: float, named: torch.Tensor) -> torch.Tensor:
        if guidance == 1.0:
            return network(x, sigma, named)
        nobody = torch.full_like(named, NO_LABEL)
        told, untold = network(torch.cat([x, x]), sigma, torch.cat([named, nobody])).chunk(2)
        return torch.lerp(untold, told, guidance)

    @torch.inference_mode()
    def velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
        pixels = x[0].numel() * (1 if guidance == 1.0 else 2)
        count = len(x) if x.is_cuda else max(1, AT_ONCE // pixels)
        return torch.cat([one_pass(*part) for part in zip(x.split(count), repeat(sigma), labels.split(count))])

    return velocity


def training_loss(
    network: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor, generator: torch.Generator, *, dropped: float = 0.1
) -> torch.Tensor:
    """mean (v - (n - x_0))² at noise levels whose logit is standard normal (Esser et al. 2024, section 3.1).

    x: pictures (n, c, h, h) or films (n, c, frames, h, h); labels: (n,); dropped: the share of labels that the
    network is not told. The levels of a batch are stratified, one from each of n equally likely ranges: a gradient of
    less variance at no cost.
    """
    from workbook.models.dit import NO_LABEL

    n = len(x)
    quantile = (torch.arange(n) + torch.rand(n, generator=generator).clamp(1e-4, 1 - 1e-4)) / n
    sigma = torch.special.ndtri(quantile).sigmoid().to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x.device)
    labels = torch.where(torch.rand(n, generator=generator).to(x.device) < dropped, NO_LABEL, labels)
    mixed = torch.lerp(x, noise, sigma.view(n, *[1] * (x.ndim - 1)))
    return (network(mixed, sigma, labels) - (noise - x)).square().mean()


DITS = {"dit_fm_fmnist_multires": 2, "freeflow_teacher": 4, "freeflow_student": 4}  # name: patch in pixels


def load_dit(name: str, *, device: str = "cpu") -> torch.nn.Module:
    """A checkpoint of `models.dit.DiT` by name, in eval mode without gradients."""
    from workbook import checkpoints
    from workbook.models.dit import DiT

    if name not in DITS:
        raise ValueError(f"{name!r} is no checkpoint of a diffusion transformer: use one of {', '.join(DITS)}.")
    return checkpoints.restore(DiT(patch=DITS[name]), name).to(device)
