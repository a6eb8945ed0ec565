"""Editing canvases by their captions: edits with a known answer, and the peers of InfEdit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch.nn import functional

from workbook import images
from workbook.attention import AttentionControl
from workbook.diffusion import DiscreteVP
from workbook.models import canvas
from workbook.models.canvas import Conditional

KINDS = {"class": canvas.NOUN, "brightness": canvas.BRIGHT, "direction": canvas.MIRRORED}  # and where their words stand


# -- edits with a known answer ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edits:
    """Edits of one word each: pictures x (n, 1, 32, 64), captions (n, 9), the side (n,) that changes, kinds (n,)."""

    x: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    side: torch.Tensor
    kind: NDArray

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, picked) -> Edits:
        """Some of the edits; picked: a slice or an array of indices."""
        return Edits(*(part[picked] for part in (self.x, self.source, self.target, self.side, self.kind)))

    def words(self, i: int) -> str:
        """Edit number i in words: "left: bag → sneaker"."""
        place = KINDS[self.kind[i]][self.side[i]]
        old, new = (canvas.WORDS[int(part[i, place])] for part in (self.source, self.target))
        return f"{('left', 'right')[self.side[i]]}: {old} → {new}"


def draw_edits(
    count: int, pool: canvas.Canvases, judge: canvas.Judge, generator: torch.Generator, *, device: str = "cpu"
) -> Edits:
    """`count` edits, one word each: class, brightness and direction in turn, the last of shoes alone.

    Only canvases whose half to be edited the judge reads as its caption says, so that a failure is the editor's.
    """
    x, source = pool.draw(20 * count, generator)
    side = torch.randint(2, (len(x),), generator=generator)
    words, target, picked = canvas.item_words(source, side), source.clone(), []
    left = np.flatnonzero(judge(canvas.half(x, side), words)["all"]).tolist()
    shoes = torch.isin(words[:, 2] - 8, torch.tensor(canvas.SHOES))
    kinds = [list(KINDS)[i % 3] for i in range(count)]
    for kind in kinds:
        i = next(i for i in left if kind != "direction" or shoes[i])
        left.remove(i)
        picked.append(i)
        place, shift = KINDS[kind][side[i]], int(torch.randint(1, 10, (), generator=generator))
        old = int(source[i, place])
        target[i, place] = {"class": 8 + (old - 8 + shift) % 10, "brightness": 9 - old, "direction": 13 - old}[kind]
    return Edits(*(part[picked].to(device) for part in (x, source, target, side)), np.array(kinds))


def self_similarity(classifier: torch.nn.Module, canvases: torch.Tensor) -> torch.Tensor:
    """Cosines between all places of the classifier's second feature map in each half, shape (n, 2, 64, 64)."""
    maps = torch.stack([classifier.stages[:2](part).flatten(2) for part in canvases.split(32, dim=3)], 1)
    unit = functional.normalize(maps, dim=2, eps=1e-6)
    return unit.transpose(2, 3) @ unit


@torch.inference_mode()
def score(edits: Edits, edited: torch.Tensor, judge: canvas.Judge, *, ceiling: float = 60.0) -> pd.DataFrame:
    """How good each edit is, its canvas and the source as pictures of 8 bits.

    Columns: kind; right, 100 if the judge reads the target caption's three words off the edited half, else 0; psnr (dB,
    cut at `ceiling`, above which 8 bits show no difference) and ssim of the other half; structure, the mean squared
    difference of self-similarities, in thousandths.
    """
    shown, source = (((x.clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1 for x in (edited, edits.x))
    verdict = judge(canvas.half(shown, edits.side), canvas.item_words(edits.target, edits.side))
    ground = [canvas.half(x, 1 - edits.side) for x in (shown, source)]
    maps = [self_similarity(judge.classifier, x) for x in (shown, source)]
    return pd.DataFrame(
        {
            "kind": edits.kind,
            "right": 100.0 * verdict["all"],
            "psnr": np.minimum(images.psnr(*ground), ceiling),
            "ssim": images.ssim(*ground),
            "structure": 1e3 * (maps[0] - maps[1]).square().mean((1, 2, 3)).cpu().numpy(),
        }
    )


# -- editors ----------------------------------------------------------------------------------------------------------


class Evaluations:
    """A conditional model that counts on how many canvases it was asked."""

    def __init__(self, eps: Conditional):
        self.eps, self.count = eps, 0

    def __call__(self, x: torch.Tensor, t: float, numbers: torch.Tensor) -> torch.Tensor:
        self.count += len(x)
        return self.eps(x, t, numbers)


def guided_noise(
    eps: Conditional,
    states: Mapping[str, torch.Tensor],
    t: float,
    captions: Mapping[str, torch.Tensor],
    scales: Mapping[str, float],
) -> dict[str, torch.Tensor]:
    """Noise of several branches under classifier-free guidance, from one batched call: {branch: like its state}.

    states, captions, scales: {branch: (n, …)}, {branch: (n, 9)}, {branch: number}, in the order of the batch. The noise
    is null + scale (caption - null); a branch of scale 1 has no null row, and the null rows come after all branches.
    """
    guided = [branch for branch in states if scales[branch] != 1]
    count = len(next(iter(states.values())))
    blank = canvas.null_tokens(count).to(next(iter(captions.values())).device)
    x = torch.cat([*states.values(), *(states[branch] for branch in guided)])
    found = eps(x, t, torch.cat([*(captions[branch] for branch in states), *(blank for _ in guided)])).split(count)
    noises = dict(zip(states, found, strict=False))
    for branch, null in zip(guided, found[len(states) :], strict=True):
        noises[branch] = null + scales[branch] * (noises[branch] - null)
    return noises


def even_times(schedule: DiscreteVP, steps: int) -> NDArray:
    """Evenly spaced times from pure noise down; the last is one step above the picture. Shape (steps,)."""
    return schedule.whole(1 - np.arange(steps) / steps)


def consistency_times(schedule: DiscreteVP, steps: int, *, origin: int = 50) -> NDArray:
    """Times of latent consistency models: `steps` of `origin` evenly spaced ones, from pure noise down. Shape (steps,).

    Raises ValueError if steps is not 1 … origin.
    """
    if not 1 <= steps <= origin:
        raise ValueError(f"steps = {steps}: use 1 to {origin}.")
    return schedule.whole(1 - np.floor(np.arange(steps) * origin / steps) / origin)


def shares(schedule: DiscreteVP, times: NDArray) -> tuple[list[float], list[float]]:
    """Signal and noise at `times`, and at the picture itself after them: two lists of len(times) + 1."""
    return [*schedule.signal(times).tolist(), 1.0], [*schedule.noise(times).tolist(), 0.0]


def invert(
    eps: Conditional, x: torch.Tensor, schedule: DiscreteVP, *, source: torch.Tensor, times: NDArray
) -> torch.Tensor:
    """DDIM inversion: carry pictures x up to times[0] along the deterministic path of their captions.

    times: falling, (N,). The network is asked at the time where a step ends, as in diffusers' DDIMInverseScheduler.
    """
    signal, sigma = (part[::-1] for part in shares(schedule, times))
    for i, t in enumerate(times[::-1]):
        e = eps(x, float(t), source)
        x = signal[i + 1] * (x - sigma[i] * e) / signal[i] + sigma[i + 1] * e
    return x


def regenerate(
    eps: Conditional,
    z: torch.Tensor,
    schedule: DiscreteVP,
    *,
    source: torch.Tensor,
    target: torch.Tensor,
    times: NDArray,
    scale: float = 2.3,
    control: AttentionControl | None = None,
) -> torch.Tensor:
    """Deterministic DDIM from z at times[0] down to pictures of the target captions, under guidance.

    control: a source branch, unguided, runs first in the batch and lends its attention (Prompt-to-Prompt, Hertz et al.
    2022).
    """
    branches = ["target"] if control is None else ["source", "target"]
    captions, scales = {"source": source, "target": target}, {"source": 1.0, "target": scale}
    (signal, sigma), states = shares(schedule, times), dict.fromkeys(branches, z)
    with control or nullcontext():
        for i, t in enumerate(times):
            if control is not None:
                control.begin((i + 1) / len(times))
            e = guided_noise(eps, states, float(t), captions, scales)
            clean = {b: (states[b] - sigma[i] * e[b]) / signal[i] for b in branches}
            states = {b: signal[i + 1] * clean[b] + sigma[i + 1] * e[b] for b in branches}
    return states["target"]


def ddim_edit(
    eps: Conditional, x: torch.Tensor, schedule: DiscreteVP, *, source: torch.Tensor, times: NDArray, **options
) -> torch.Tensor:
    """DDIM inversion under the source captions, then `regenerate` with its options."""
    z = invert(eps, x, schedule, source=source, times=times)
    return regenerate(eps, z, schedule, source=source, times=times, **options)


def sdedit(
    eps: Conditional,
    x: torch.Tensor,
    schedule: DiscreteVP,
    *,
    strength: float,
    times: NDArray,
    noise: torch.Tensor,
    **options,
) -> torch.Tensor:
    """SDEdit (Meng et al. 2022): noise x up to the share `strength` of the grid `times`, and come down again.

    noise: like x; options: as for `regenerate`.
    """
    times = times[len(times) - max(1, round(strength * len(times))) :]
    z = float(schedule.signal(times[0])) * x + float(schedule.noise(times[0])) * noise
    return regenerate(eps, z, schedule, times=times, **options)


def cycle_diffusion(
    eps: Conditional,
    x: torch.Tensor,
    schedule: DiscreteVP,
    *,
    source: torch.Tensor,
    target: torch.Tensor,
    times: NDArray,
    noise: torch.Tensor,
    scale: float = 2.3,
    variance: Callable[[float, float], float] | None = None,
) -> torch.Tensor:
    """CycleDiffusion (Wu and De la Torre 2022): read the noises of a stochastic sampler off x, and replay them.

    noise: (N, *x.shape), draws the path of the source; variance(t, s): sigma^2 of the step from t down to s, by default
    DDPM's. The last step goes to the picture itself, without noise.
    """
    (signal, sigma), scales = shares(schedule, times), {"source": 1.0, "target": scale}
    states, captions = {"source": noise[0], "target": noise[0]}, {"source": source, "target": target}
    for i, t in enumerate(times):
        e = guided_noise(eps, states, float(t), captions, scales)
        clean = {b: (states[b] - sigma[i] * e[b]) / signal[i] for b in states}
        if i + 1 == len(times):
            return x + clean["target"] - clean["source"]  # the last noise is what the source's guess misses
        if variance is None:
            square = (sigma[i + 1] / sigma[i]) ** 2 * (1 - (signal[i] / signal[i + 1]) ** 2)
        else:
            square = float(variance(t, times[i + 1]))
        rest = max(sigma[i + 1] ** 2 - square, 0.0) ** 0.5
        mean = {b: signal[i + 1] * clean[b] + rest * e[b] for b in states}
        true = (states["source"] - signal[i] * x) / sigma[i]
        path = signal[i + 1] * x + rest * true + square**0.5 * noise[i + 1]  # drawn from q(z_s | z_t, z_0)
        states = {"source": path, "target": mean["target"] + path - mean["source"]}
    raise ValueError("times is empty.")
