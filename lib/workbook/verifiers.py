"""What a verifier of speculative decoding sees and answers, and the verifiers that methods are compared with.

A verifier looks at K draft sequences of length L and at the two models' distributions along them, and answers which
tokens to emit and which draft row they follow. Distributions are float64 vectors over the target's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from workbook.acceptance import kseq_discount
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


Proposal = Callable[[np.ndarray, int, Chance], Sequence[int]]  # (draft law, k, chance) -> at most k first tokens
Selection = Callable[[np.ndarray, np.ndarray, np.ndarray, Chance], int]  # (target, draft, tokens, chance) -> token


# -- how the first tokens of the rows are drawn ----------------------------------------------------------------------


def independent(draft: np.ndarray, k: int, chance: Chance) -> list[int]:
    """k i.i.d. draws from the draft's law, shape (V,): sampling with replacement."""
    return [chance.draw(draft) for _ in range(k)]


def distinct(draft: np.ndarray, k: int, chance: Chance) -> list[int]:
    """k draws without replacement, the law renormalised after each; fewer where it has fewer than k tokens."""
    left, tokens = draft.copy(), []
    while len(tokens) < k and left.any():
        tokens.append(chance.draw(left))
        left[tokens[-1]] = 0
    return tokens


# -- verifiers for one draft sequence --------------------------------------------------------------------------------


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


# -- verifiers for several: a rule for one token, applied at each depth ----------------------------------------------


def descend(select: Selection, drafts: Drafts, chance: Chance) -> Emission:
    """Walk down the rows: at each depth `select` emits a token, and the rows that have it stay alive.

    select(target, draft, tokens, chance) -> a token whose law is `target`, given the tokens of the rows alive. Rows
    must part as the rule assumes: i.i.d. at every depth, or distinct at the first, so that one row at most goes on.
    """
    rows, length = drafts.tokens.shape
    alive, emitted = list(range(rows)), []
    for depth in range(length):
        row = alive[0]
        tokens = drafts.tokens[alive, depth]
        emitted.append(select(drafts.target(row, depth), drafts.draft(row, depth), tokens, chance))
        alive = [r for r in alive if drafts.tokens[r, depth] == emitted[-1]]
        if not alive:
            return Emission(emitted, row)
    return Emission([*emitted, chance.draw(drafts.target(alive[0], length))], alive[0])


def recursive_selection(target: np.ndarray, draft: np.ndarray, tokens: np.ndarray, chance: Chance) -> int:
    """Try i.i.d. tokens in turn, each against what the rounds before left of the target (SpecInfer)."""
    left = target
    for token in tokens:
        if chance.accept(left[token] / draft[token]):
            return int(token)
        left = np.maximum(left - draft, 0)
        left /= left.sum()
    return chance.draw(left)


def distinct_recursive_selection(target: np.ndarray, draft: np.ndarray, tokens: np.ndarray, chance: Chance) -> int:
    """The same for tokens drawn without replacement: a rejected token also leaves the draft's law."""
    left, law = target, draft
    for token in tokens:
        if law is not draft:
            law /= law.sum()  # not before: after the last token of the support nothing is left to divide
        if chance.accept(left[token] / law[token]):
            return int(token)
        left = np.maximum(left - law, 0)
        left /= left.sum()
        law = law.copy()
        law[token] = 0
    return chance.draw(left)


def kseq_selection(target: np.ndarray, draft: np.ndarray, tokens: np.ndarray, chance: Chance) -> int:
    """K-SEQ (SpecTr, Algorithm 2): try i.i.d. tokens in turn at the discount that makes the rule fair."""
    k = len(tokens)
    rho = kseq_discount(target, draft, k)
    for token in tokens:
        if chance.accept(target[token] / (rho * draft[token])):
            return int(token)
    accepted = np.minimum(draft, target / rho)
    beta = accepted.sum()
    given = (1 - (1 - beta) ** k) / beta if beta > 0 else 0.0
    return chance.draw(np.maximum(target - accepted * given, 0))  # only rounding is below zero


def recursive_rejection(drafts: Drafts, chance: Chance) -> Emission:
    """Multi-round rejection over i.i.d. drafts (SpecInfer, Miao et al. 2024; RRS with replacement in later papers)."""
    return descend(recursive_selection, drafts, chance)


def distinct_recursive_rejection(drafts: Drafts, chance: Chance) -> Emission:
    """Multi-round rejection over drafts without replacement (RRSw: Jeon et al. 2024; Yang et al. 2024)."""
    return descend(distinct_recursive_selection, drafts, chance)


def kseq_verification(drafts: Drafts, chance: Chance) -> Emission:
    """K-SEQ at each depth over i.i.d. drafts (SpecTr, Algorithm 3)."""
    return descend(kseq_selection, drafts, chance)


def exact_law(
    verifier: Verifier,
    target: ToyModel,
    draft: ToyModel,
    *,
    drafts: int,
    length: int,
    tokens: int,
    propose: Proposal = independent,
) -> np.ndarray:
    """Law of the first `tokens` tokens when one verified step is followed by plain sampling, by exact enumeration.

    Every random choice of the drafts and of the verifier's own code is enumerated; the result must equal
    `target.law(tokens)` to rounding if the verifier is lossless. propose: how the rows' first tokens are drawn.
    """

    def step(chance: Chance) -> tuple[int, ...]:
        first = propose(draft([]), drafts, chance)
        rows = np.zeros((len(first), length), dtype=int)
        rows[:, 0] = first
        for row in rows:
            for i in range(1, length):
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


def exact_selection(
    propose: Proposal, select: Selection, target: np.ndarray, draft: np.ndarray, k: int
) -> tuple[np.ndarray, float]:
    """Of a rule for one token, by exact enumeration: (the token's law, the probability that it is one of k guesses)."""

    def once(chance: Chance) -> tuple[int, bool]:
        tokens = np.array(propose(draft, k, chance))
        chosen = select(target, draft, tokens, chance)
        return chosen, bool(chosen in tokens)

    law, kept = np.zeros(len(target)), 0.0
    for probability, (chosen, inside) in enumerate_outcomes(once):
        law[chosen] += probability
        kept += probability * inside
    return law, kept


def proposal_sets(propose: Proposal, draft: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """What a proposal can draw, by exact enumeration: token ids (N, k) and their probabilities (N,)."""
    outcomes = enumerate_outcomes(lambda chance: propose(draft, k, chance))
    return np.array([tokens for _, tokens in outcomes]), np.array([probability for probability, _ in outcomes])
