"""Search among a flow model's half-drawn pictures: looks that are counted, the particle methods, and their table.

A method is method(search, process, budget) -> States of its last look. A process says how states move: it has `times`
(where it looks, from 1 = noise down), `look(velocity, x, r)` -> (u, mean picture), `step(x, u, stage, noise)` -> x at
the next time, and `straight(stage)` -> (S, t), such that x / S lies on the network's straight path at level t.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from workbook import flow, measure


@dataclass
class States:
    """What looks have told: x, velocity u, mean picture, its reward. Shapes (P, m, …) for m states of P problems."""

    x: torch.Tensor
    u: torch.Tensor
    clean: torch.Tensor
    reward: torch.Tensor

    def each(self, change: Callable[..., torch.Tensor], *others: States) -> States:
        """The states whose four tensors are change(own, others' …)."""
        names = [field.name for field in fields(self)]
        return States(*(change(*(getattr(s, name) for s in (self, *others))) for name in names))

    def pick(self, index: torch.Tensor) -> States:
        """The states (P, j) with these indices along the second dimension."""
        rows = torch.arange(len(index), device=index.device)[:, None]
        return self.each(lambda own: own[rows, index])

    def copies(self, count: int) -> States:
        """Each state `count` times, side by side."""
        return self.each(lambda own: own.repeat_interleave(count, 1))

    def best(self, groups: int = 1) -> States:
        """The state of the highest reward in each of `groups` equal groups, (P, groups)."""
        found = self.reward.unflatten(1, (groups, -1)).argmax(2)
        return self.pick(found + self.reward.shape[1] // groups * torch.arange(groups, device=found.device))

    def replaced(self, mask: torch.Tensor, other: States) -> States:
        """Those of `other` where the mask (P, m) is true, else these."""
        return self.each(lambda own, new: torch.where(mask[(...,) + (None,) * (own.dim() - 2)], new, own), other)


class Search:
    """A network, a reward, and how many network calls each of P problems has used.

    velocity(x, t, problem) -> n - x_0 on the straight path; reward(picture, problem) -> (n,); problem: (n,), int64.
    draw(*shape): standard normal numbers. shape: of one picture.
    """

    def __init__(self, velocity: Callable, reward: Callable, problems: int, draw: Callable, *, shape=(1, 32, 32)):
        self.network, self.reward, self.problems, self.draw, self.shape = velocity, reward, problems, draw, shape
        self.used = torch.zeros(problems, dtype=torch.int64)

    def velocity(self, x: torch.Tensor, t: torch.Tensor, problem: torch.Tensor) -> torch.Tensor:
        """The network's answer, counted for each problem."""
        self.used += torch.bincount(problem, minlength=self.problems).cpu()
        return self.network(x, t, problem)

    def noise(self, count: int) -> torch.Tensor:
        """White noise for `count` states of each problem, (P, count, …); fewer are the first of more."""
        return self.draw(count, self.problems, *self.shape).transpose(0, 1)

    def owners(self, count: int, device: torch.device) -> torch.Tensor:
        """The problem of each of `count` states a problem, flat."""
        return torch.arange(self.problems, device=device).repeat_interleave(count)

    def look(self, process: Any, x: torch.Tensor, stage: torch.Tensor | int) -> States:
        """One network call and one reward call for each state; x: (P, m, …), stage: an int or (P, m)."""
        count, flat = x.shape[1], x.flatten(0, 1)
        r = process.times[torch.as_tensor(stage, device=x.device).expand(self.problems, count).flatten()]
        owner = self.owners(count, x.device)
        u, clean = process.look(lambda x, t: self.velocity(x, t, owner), flat, r)
        return States(x, u.view_as(x), clean.view_as(x), self.reward(clean, owner).view(x.shape[:2]))

    def advance(self, process: Any, here: States, stage: torch.Tensor | int) -> States:
        """A look at one random next state of each state."""
        stage = torch.as_tensor(stage, device=here.x.device).expand(here.reward.shape)
        x, u, noise = (value.flatten(0, 1) for value in (here.x, here.u, self.noise(stage.shape[1])))
        return self.look(process, process.step(x, u, stage.flatten(), noise).view_as(here.x), stage + 1)


def best_of_n(search: Search, process: Any, budget: int) -> States:
    """Independent walks, as many as the budget pays for; (P, n)."""
    here = search.look(process, search.noise(budget // len(process.times)), 0)
    for stage in range(len(process.times) - 1):
        here = search.advance(process, here, stage)
    return here


def tenth(budget: int, chains: int) -> int:
    """How many noises each chain may look at, if a tenth of the budget is for the start."""
    return max(1, budget // (10 * chains))


def svdd(
    search: Search, process: Any, budget: int, *, chains: int = 2, starts: int | None = None, block: int = 1
) -> States:
    """The same number of candidates at every stage, the best goes on (SVDD, Li et al. 2024), (P, chains).

    block: stages between two choices; more than 1 makes it CoDe (Singh et al. 2025). Each chain starts at the best of
    `starts` noises, by default a tenth of the budget.
    """
    last, starts = len(process.times) - 1, starts or tenth(budget, chains)
    width = (budget - chains * starts) // (chains * last)
    if width < 1:
        raise ValueError(f"budget = {budget}: {chains} chains need at least {chains * (starts + last)} calls.")
    here = search.look(process, search.noise(chains * starts), 0).best(chains)
    for stage in range(last):
        here = search.advance(process, here.copies(width) if stage % block == 0 else here, stage)
        if (stage + 1) % block == 0 or stage + 1 == last:
            here = here.best(chains)
    return here


def smc(
    search: Search, process: Any, budget: int, *, temperature: float = 0.5, threshold: float = 1.0
) -> tuple[States, torch.Tensor]:
    """Particles weighted by exp(gain of reward / temperature), resampled systematically: (P, n), and log weights.

    threshold: resample where the effective number of particles is at most this share of them.
    """
    count, last = budget // len(process.times), len(process.times) - 1
    here = search.look(process, search.noise(count), 0)
    weight = here.reward / temperature
    for stage in range(last):
        share = weight.softmax(1)
        again = (1 / share.square().sum(1, keepdim=True) <= threshold * count).expand(-1, count)
        marks = torch.special.ndtr(search.draw(search.problems, 1)) + torch.arange(count, device=share.device)
        picked = torch.searchsorted(share.cumsum(1), marks.to(share) / count).clamp(max=count - 1)
        here, weight = here.replaced(again, here.pick(picked)), torch.where(again, 0.0, weight)
        before = here.reward
        here = search.advance(process, here, stage)
        weight = weight + (here.reward - before) / temperature
    return here, weight


def search_over_paths(
    search: Search, process: Any, budget: int, *, chains: int = 2, looks: int = 10,
    ends: Sequence[float] = (0.12, 0.09, 0.06, 0.03, 0.0), back: float = 0.78,
) -> tuple[States, Any]:  # fmt: skip
    """Follow the ODE to t = 0.12; noise it again by 0.78, follow it a little further, keep the best; again (SoP).

    process: the ODE on the straight path (its times are replaced); looks: Euler steps to each end (Ma et al. 2025).
    Returns the states at the last look, (P, chains), and the process that led there.
    """
    draws = (budget // chains // looks - 1) // (len(ends) - 1)
    if draws < 1:
        raise ValueError(f"budget = {budget}: {chains} chains need at least {chains * looks * len(ends)} calls.")
    x, start = search.noise(chains), 1.0
    for end in ends:
        times = torch.linspace(start, end, looks + 1, dtype=torch.float64, device=x.device)
        process = replace(process, times=times[:-1])
        here = search.look(process, x, 0)
        for stage in range(looks - 1):
            here = search.advance(process, here, stage)
        here, start = here.best(chains), end + back
        x = (here.x - (times[-2] - end).item() * here.u).repeat_interleave(draws, 1)
        keep = (1 - start) / (1 - end)  # the straight path's noising kernel, from t = end to t = start
        x = keep * x + math.sqrt(start**2 - (keep * end) ** 2) * search.noise(chains * draws)
    return here, process


def finish(search: Search, process: Any, here: States, steps: int = 10) -> torch.Tensor:
    """The pictures (P, m, …) of states at a process's last time: Euler steps of the plain ODE down to t = 0."""
    size, t = process.straight(-1)
    x, owner = here.x.flatten(0, 1) / size, search.owners(here.x.shape[1], here.x.device)
    for i in range(steps):
        level = torch.full((len(x),), t * (1 - i / steps), dtype=x.dtype, device=x.device)
        x = x - t / steps * search.velocity(x, level, owner)
    return x.view_as(here.x)


# -- networks, rewards and the table ----------------------------------------------------------------------------------


def labelled(network: torch.nn.Module, labels: torch.Tensor) -> Callable[..., torch.Tensor]:
    """A class-conditional network as velocity(x, t, problem); labels: (P,). A CPU takes a large batch in parts."""

    @torch.inference_mode()
    def velocity(x: torch.Tensor, t: torch.Tensor, problem: torch.Tensor) -> torch.Tensor:
        size = len(x) if x.is_cuda else max(1, flow.AT_ONCE // x[0].numel())
        parts = zip(x.split(size), t.to(x.dtype).split(size), labels[problem].split(size), strict=True)
        return torch.cat([network(*part) for part in parts])

    return velocity


@torch.inference_mode()
def log_chance(classifier: torch.nn.Module, x: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Log probability that a classifier of pictures (n, 1, h, w) gives to `classes` (n,)."""
    found = classifier(x.contiguous(memory_format=torch.channels_last)).log_softmax(-1)
    return found.gather(1, classes[:, None])[:, 0]


def ink(x: torch.Tensor) -> torch.Tensor:
    """Mean darkness of pictures (n, 1, h, w) in [-1, 1], in per cent, shape (n,)."""
    return 50 * (x.flatten(1).mean(1) + 1)


def tone(x: torch.Tensor) -> torch.Tensor:
    """Ink of the upper half of pictures minus that of the lower half, in per cent."""
    upper, lower = x.chunk(2, -2)
    return ink(upper) - ink(lower)


def rare(values: NDArray, labels: NDArray, classes: NDArray, seed: Sequence[int]) -> NDArray:
    """For each of `classes` a value that between 1 in 100 and 1 in 1,000 of its members reach, high or low by turns.

    values, labels: of the members, (n,). seed: decides how rare, and who is high.
    """
    rng = np.random.default_rng(seed)
    level = 10 ** rng.uniform(-3, -2, len(classes))
    level = np.where(rng.permutation(len(classes)) % 2, level, 1 - level)
    return np.array([np.quantile(values[labels == c], q) for c, q in zip(classes, level, strict=True)])


@dataclass
class Problems:
    """Problems of one reward, each with one or more noises: unit i is problem i % count.

    velocity, reward: as for Search; classes: what each unit asks for, (units,), int64; judge: a classifier that takes
    no part in the search; seed: of the noises; finish_steps: Euler steps from a winner to its picture, in no budget.
    """

    velocity: Callable
    reward: Callable
    classes: torch.Tensor
    count: int
    judge: torch.nn.Module
    seed: int
    finish_steps: int = 10

    def search(self) -> Search:
        """A fresh Search, from the same noises each time."""
        source = torch.Generator().manual_seed(self.seed)
        draw = lambda *shape: torch.randn(*shape, generator=source).to(self.classes.device)  # noqa: E731
        return Search(self.velocity, self.reward, len(self.classes), draw)

    def run(self, method: Callable, process: Any, budget: int, **facts) -> tuple[pd.DataFrame, torch.Tensor]:
        """One method on all units: a row a unit (problem, seen, reward, heldout, calls, seconds), and the pictures.

        seen: the winner's reward at the last look; reward: that of its finished picture; heldout: log probability that
        the judge gives to the class; calls: of the search alone. facts: more columns.
        """
        search, started = self.search(), time.perf_counter()
        found = method(search, process, budget)
        here, more = found if isinstance(found, tuple) else (found, None)
        seconds, used, winner = time.perf_counter() - started, search.used.clone(), here.best()
        x = finish(search, more if hasattr(more, "times") else process, winner, self.finish_steps)[:, 0]
        units = torch.arange(len(x), device=x.device)
        told = {"seen": winner.reward[:, 0], "reward": self.reward(x, units), "calls": used}
        told["heldout"] = log_chance(self.judge, x, self.classes)
        facts |= {"budget": budget, "problem": units.cpu().numpy() % self.count, "seconds": seconds / len(x)}
        return pd.DataFrame(facts | {name: value.double().cpu().numpy() for name, value in told.items()}), x


class Trace:
    """A watch for rollover budget forcing: what happened at every draw, and the first problem's pictures."""

    def __init__(self):
        self._stage, self._reward, self._roll, self._full, self._record, self._clean = [], [], [], [], [], []

    def __call__(self, stage: torch.Tensor, new: States, *flags: torch.Tensor) -> None:
        """flags: who rolls over, whose quota is spent, and the record, each (P, chains)."""
        for kept, value in zip(vars(self).values(), (stage, new.reward, *flags, new.clean[0]), strict=True):
            kept.append(value.cpu())

    def usage(self) -> pd.DataFrame:
        """By stage: draws of a chain (mean), and the share of chains that left it by rolling over."""
        stage, roll = torch.stack(self._stage).numpy(), torch.stack(self._roll).numpy()
        rows = [(k, (stage == k).sum(0).mean(), (roll & (stage == k)).any(0).mean()) for k in range(stage.max() + 1)]
        return pd.DataFrame(rows, columns=["stage", "draws", "rolled"])

    def chain(self, index: int = 0) -> tuple[pd.DataFrame, list[NDArray]]:
        """A chain of the first problem: its draws (stage, reward, record after it, move), and each stage's picture.

        move: "rolls over", "quota spent" or "answer" at the draw that a stage went on from, else "".
        """
        names = ("stage", "reward", "roll", "full", "record")
        columns = dict(zip(names, vars(self).values(), strict=False))
        table = pd.DataFrame({name: [v[0, index].item() for v in values] for name, values in columns.items()})
        chosen = table.groupby("stage").reward.idxmax()  # a draw that rolls over is the best of its stage
        spent = [i for k, i in chosen.items() if table.full[table.stage == k].any()]
        table["move"] = np.where(table.roll, "rolls over", "")
        table.loc[spent, "move"], table.loc[chosen.iloc[-1], "move"] = "quota spent", "answer"
        return table.drop(columns=["roll", "full"]), [self._clean[i][index, 0].numpy() for i in chosen]


def summarise(table: pd.DataFrame, by: Sequence[str], columns: Sequence[str]) -> pd.DataFrame:
    """Means over problems with 95 % bootstrap intervals, a row a group and column (what, value, low, high).

    table: one row a problem and noise; the noises of a problem are averaged first.
    """
    rows = []
    for key, part in table.groupby(list(by), sort=False):
        means, facts = part.groupby("problem")[list(columns)].mean(), dict(zip(by, key, strict=True))
        for column in columns:
            m = measure.bootstrap(means[column])
            rows.append(facts | {"what": column, "value": m.value, "low": m.low, "high": m.high})
    return pd.DataFrame(rows)
