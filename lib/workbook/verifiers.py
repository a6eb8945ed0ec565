"""What a verifier of speculative decoding sees and answers, and the verifiers that methods are compared with.

A verifier looks at K draft sequences of length L and at the two models' distributions along them, and answers which
tokens to emit and which draft row they follow. Distributions are float64 vectors over the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from workbook.chance import Chance, ToyModel, enumerate_outcomes


@dataclass
class Drafts:
    """What a verifier sees: K drafted rows and the two models' distributions along them.

    tokens: (K, L) token ids; draft(row, depth) and target(row, depth): the distributions, shape (V,), of the token at
    `depth` given the first `depth` tokens of `row`; depth runs to L - 1 for the draft and to L for the target. Both
    are computed when first asked for, so that a verifier pays for the positions that it visits only.
    """

    tokens: np.ndarray
    draft: Callable[[int, int], np.ndarray]
    target: Callable[[int, int], np.ndarray]


@dataclass
class Emission:
    """A verifier's answer: the tokens to emit (1 to L + 1); all but the last are the first tokens of draft `row`."""

    tokens: list[int]
    row: int


class Verifier(Protocol):
    """Turns drafts into emitted tokens whose law is the target's."""

    def __call__(self, drafts: Drafts, chance: Chance) -> Emission: ...


# -- verifiers for one draft sequence, and the multi-round one -------------------------------------------------------


def token_verification(drafts: Drafts, chance: Chance) -> Emission:
    """Speculative sampling of row 0 (Leviathan et al. 2023, Algorithm 1; Chen et al. 2023): one token at a time."""
    emitted: list[int] = []
    for depth, token in enumerate(drafts.tokens[0].tolist()):
        t, d = drafts.target(0, depth), drafts.draft(0, depth)
        if chance.accept(t[token] / d[token]):
            emitted.append(token)
        else:
            return Emission([*emitted, chance.draw(np.maximum(t - d, 0))], 0)
    return Emission([*emitted, chance.draw(drafts.target(0, len(emitted)))], 0)


def block_verification(drafts: Drafts, chance: Chance) -> Emission:
    """Block verification of row 0 (Sun et al. 2024, arXiv 2403.10444, Algorithm 2): accept a whole prefix at once."""
    tokens = drafts.tokens[0].tolist()
    length, reach = len(tokens), [1.0]
    residuals: list[np.ndarray | None] = [None] * (length + 1)
    accepted = 0
    for i in range(length + 1):
        if i > 0:
            t, d = drafts.target(0, i - 1), drafts.draft(0, i - 1)
            reach.append(min(1.0, reach[-1] * t[tokens[i - 1]] / d[tokens[i - 1]]))
        if i == length:
            keep = reach[i]
        else:
            residuals[i] = np.maximum(reach[i] * drafts.target(0, i) - drafts.draft(0, i), 0)
            left = residuals[i].sum()
            keep = 1.0 if i == 0 else left / (left + 1 - reach[i]) if left > 0 else 0.0
        if i == 0 or chance.accept(keep):
            accepted = i
    rest = drafts.target(0, length) if accepted == length else residuals[accepted]
    return Emission([*tokens[:accepted], chance.draw(rest)], 0)


def recursive_rejection(drafts: Drafts, chance: Chance) -> Emission:
    """Multi-round rejection over K drafts (SpecInfer, Miao et al. 2024; RRS with replacement in later papers).

    At each depth the alive rows' tokens are tried in turn against what the rounds before left of the target.
    """
    alive, emitted = list(range(len(drafts.tokens))), []
    for depth in range(drafts.tokens.shape[1]):
        left, d = drafts.target(alive[0], depth), drafts.draft(alive[0], depth)
        chosen = None
        for row in alive:
            token = int(drafts.tokens[row, depth])
            if chance.accept(left[token] / d[token]):
                chosen = token
                break
            left = np.maximum(left - d, 0)
            left /= left.sum()
        last = alive[0]
        emitted.append(chance.draw(left) if chosen is None else chosen)
        alive = [row for row in alive if drafts.tokens[row, depth] == emitted[-1]]
        if not alive:
            return Emission(emitted, last)
    return Emission([*emitted, chance.draw(drafts.target(alive[0], drafts.tokens.shape[1]))], alive[0])


def exact_law(
    verifier: Verifier, target: ToyModel, draft: ToyModel, *, drafts: int, length: int, tokens: int
) -> np.ndarray:
    """Law of the first `tokens` tokens when one verified step is followed by plain sampling, by exact enumeration.

    Every random choice of the drafts and of the verifier's own code is enumerated; the result must equal
    `target.law(tokens)` to rounding if the verifier is lossless.
    """

    def step(chance: Chance) -> tuple[int, ...]:
        rows = np.zeros((drafts, length), dtype=int)
        for row in rows:
            for i in range(length):
                row[i] = chance.draw(draft(row[:i]))
        laws = [lambda r, i, model=model: model(rows[r, :i]) for model in (draft, target)]
        emitted = list(verifier(Drafts(rows, *laws), chance).tokens)
        while len(emitted) < tokens:
            emitted.append(chance.draw(target(emitted)))
        return tuple(emitted[:tokens])

    law = np.zeros((target.vocabulary,) * tokens)
    for probability, outcome in enumerate_outcomes(step):
        law[outcome] += probability
    return law
