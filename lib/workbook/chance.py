"""Random choices that can also be enumerated: the same code samples in an experiment and is exact in a proof."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np


def check_distribution(p: np.ndarray, name: str) -> None:
    """Raise ValueError unless `p` is non-negative and sums to 1 within 1e-6."""
    if p.min() < 0 or abs(p.sum() - 1) > 1e-6:
        raise ValueError(
            f"{name} is no distribution: minimum {p.min():.3g}, sum {p.sum():.9g}; 0 or more and 1 ± 1e-6 wanted."
        )


class Chance:
    """Where a decoder's random choices come from; a procedure that asks only this object can be enumerated exactly."""

    def __init__(self, seed: int | np.random.Generator = 0):
        self.rng = np.random.default_rng(seed)

    def accept(self, probability: float) -> bool:
        """True with the given probability (values above 1 count as 1)."""
        return bool(self.rng.random() < probability)

    def draw(self, weights: np.ndarray) -> int:
        """An index with probability proportional to `weights`, by inversion: one uniform number a draw."""
        cumulative = np.cumsum(weights)
        index = int(np.searchsorted(cumulative, self.rng.random() * cumulative[-1], side="right"))
        return min(index, len(weights) - 1)


class _Replay(Chance):
    """Takes the branches that `path` names, then the first possible one at each new choice, and keeps the others."""

    def __init__(self, path: tuple[int, ...]):
        self.path, self.taken, self.probability, self.open = path, (), 1.0, []

    def _choose(self, law: np.ndarray) -> int:
        at = len(self.taken)
        possible = np.flatnonzero(law > 0).tolist()
        branch = self.path[at] if at < len(self.path) else possible[0]
        if at >= len(self.path):
            self.open += [(*self.taken, other) for other in possible[1:]]
        self.taken = (*self.taken, branch)
        self.probability *= float(law[branch])
        return branch

    def accept(self, probability: float) -> bool:
        probability = min(max(float(probability), 0.0), 1.0)
        return bool(self._choose(np.array([1 - probability, probability])))

    def draw(self, weights: np.ndarray) -> int:
        return self._choose(np.asarray(weights, float) / np.sum(weights))


def enumerate_outcomes(procedure: Callable[[Chance], object]) -> list[tuple[float, object]]:
    """All results of a random procedure with their exact probabilities.

    procedure(chance) must take every random choice from `chance`; it is run once for each branch of its choices.
    """
    outcomes, waiting = [], [()]
    while waiting:
        replay = _Replay(waiting.pop())
        result = procedure(replay)
        waiting += replay.open
        outcomes.append((replay.probability, result))
    return outcomes


class ToyModel:
    """A language over a few tokens whose next-token law depends on the whole context, through a seed."""

    def __init__(self, seed: int, vocabulary: int = 3):
        self.seed, self.vocabulary = seed, vocabulary

    def __call__(self, context: Sequence[int]) -> np.ndarray:
        """Law of the next token, shape (vocabulary,)."""
        rng = np.random.default_rng([self.seed, len(context), *map(int, context)])
        return rng.dirichlet(np.ones(self.vocabulary))

    def law(self, length: int) -> np.ndarray:
        """Exact law of the first `length` tokens, an array with one axis a token."""
        law = np.zeros((self.vocabulary,) * length)
        for tokens in np.ndindex(*law.shape):
            law[tokens] = np.prod([self(tokens[:i])[token] for i, token in enumerate(tokens)])
        return law
