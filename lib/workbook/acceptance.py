"""Acceptance rates of multi-draft rules that methods are compared with, in closed form or by linear program."""

from __future__ import annotations

from itertools import permutations, product

import numpy as np

# -- verification rules ----------------------------------------------------------------------------------------------


def recursive_acceptance(target: np.ndarray, draft: np.ndarray, k: int) -> float:
    """Probability that recursive rejection (RRS, SpecInfer's rule) emits one of k i.i.d. drafts.

    target, draft: probabilities, shape (V,), float64. After each rejection the target becomes the normalised
    max(target - draft, 0).
    """
    rejected, left = 1.0, target
    for _ in range(k):
        rejected *= 1 - np.minimum(left, draft).sum()
        left = np.maximum(left - draft, 0)
        if left.sum() <= 0:
            break
        left = left / left.sum()
    return float(1 - rejected)


def distinct_recursive_acceptance(
    target: np.ndarray, draft: np.ndarray, k: int, *, samples: int = 4000, seed: int = 0
) -> float:
    """Probability that recursive rejection emits one of k drafts without replacement, over sampled paths.

    The later rounds depend on which tokens were rejected: those are sampled, and each path carries its exact
    probability of acceptance (Rao-Blackwell), so the mean is unbiased. target, draft: (V,) float64.
    """
    rng = np.random.default_rng(seed)
    drawn = draft > 0
    left = np.broadcast_to(target[drawn], (samples, drawn.sum()))
    law = np.broadcast_to(draft[drawn], left.shape)
    elsewhere = np.full(samples, target[~drawn].sum())  # of the target's rest, on tokens that are never drafted
    rejected = np.ones(samples)
    for left_to_try in reversed(range(k)):
        surplus = np.maximum(law - left, 0).cumsum(1)
        rejected = rejected * np.clip(surplus[:, -1], 0, 1)  # 1 - sum min(left, law)
        if left_to_try == 0 or not rejected.any():
            break
        threshold = rng.random((samples, 1)) * surplus[:, -1:]
        token = np.minimum((surplus <= threshold).sum(1), left.shape[1] - 1)  # the law of the token, given rejection
        left = np.maximum(left - law, 0)
        total = np.maximum(left.sum(1) + elsewhere, np.finfo(float).tiny)
        left, elsewhere = left / total[:, None], elsewhere / total
        law = law.copy()
        law[np.arange(samples), token] = 0
        law /= np.maximum(law.sum(1, keepdims=True), np.finfo(float).tiny)
    return float(1 - rejected.mean())


def kseq_discount(target: np.ndarray, draft: np.ndarray, k: int) -> float:
    """The discount rho in [1, k] of K-SEQ: the root of 1 - (1 - beta)**k = rho beta, beta = sum min(draft, target/rho).

    target, draft: (V,) float64 (SpecTr, Theorem 1). Found by Brent's method.
    """
    from scipy.optimize import brentq

    drawn = draft > 0
    t, d = target[drawn], draft[drawn]

    def surplus(rho: float) -> float:
        beta = np.minimum(d, t / rho).sum()
        return 1 - (1 - beta) ** k - rho * beta

    if k == 1 or surplus(1.0) <= 0:
        return 1.0
    return brentq(surplus, 1.0, float(k), xtol=1e-13) if surplus(float(k)) < 0 else float(k)


def kseq_acceptance(target: np.ndarray, draft: np.ndarray, k: int) -> float:
    """Probability that K-SEQ emits one of k i.i.d. drafts. target, draft: (V,) float64."""
    beta = np.minimum(draft, target / kseq_discount(target, draft, k)).sum()
    return float(1 - (1 - beta) ** k)


# -- the optimum -----------------------------------------------------------------------------------------------------


def all_draws_inside(
    draft: np.ndarray, order: np.ndarray, n: int, *, step: float = 0.25, block: int = 2**17
) -> np.ndarray:
    """Q(H) = probability that n draws without replacement all fall in H, for every prefix H of `order`.

    draft: (V,) float64; order: (K,) token ids; step: of the trapezoid rule in log time (error about exp(-10 / step));
    block: numbers worked on at once. Returns (K,), for prefixes of 1 .. K tokens; a law with fewer than n tokens
    gives all of them.

    The draws are the order of a race of exponential clocks with rates d: Q is the integral over s of
    outside exp(-outside s) P(n clocks of H rang by s). At a time s the clocks are independent, and the elementary
    symmetric polynomials of exp(d s) - 1 that count them are running sums over the prefixes, of positive terms. The
    n - 1 likeliest tokens are counted apart, and the event is compared with the n-th ring of a Poisson clock, so that
    the integrand vanishes at both ends.
    """
    import torch
    from scipy.special import gammaincc

    d = draft[order]
    outside = np.delete(draft, order).sum() + np.append(np.cumsum(d[::-1])[::-1][1:], 0.0)  # 1 - d(H), all digits
    largest = np.argsort(-draft)[:n]
    if len(largest) < n or draft[largest[-1]] == 0:
        return (outside == 0).astype(float)
    heavy = np.isin(order, largest[:-1])
    segment = np.cumsum(heavy)  # how many heavy tokens a prefix has
    light, away = torch.from_numpy(np.where(heavy, 0.0, d)), torch.from_numpy(outside)
    mass, inside = light.cumsum(0), (1 + away) ** -float(n)
    first, last = np.log(1e-14) / (n + 1), np.log(60 / draft[largest[-1]])
    times = np.exp(np.arange(first, last + step, step))
    for now in np.array_split(times, -(-len(times) * len(d) // block)):
        s = torch.from_numpy(now)[:, None]
        late = torch.from_numpy(_late_rings(d[heavy], now, n)).split(1, dim=2)
        stop = int(torch.searchsorted(mass, 500 / now[0]))  # later: n clocks rang, or one outside did, up to exp(-50)
        runs = np.bincount(segment[:stop], minlength=len(late))  # of prefixes with the same heavy tokens
        load = mass[:stop] * s
        x = torch.exp(light[:stop] * s).sub_(1).masked_fill_(load > 500, 0.0)
        rang, before, few = torch.ones_like(x), torch.ones_like(x), torch.zeros_like(x)
        for r in range(n):  # r light clocks rang, and so at most n - 1 - r heavy ones
            few += rang * torch.cat([p[:, n - 1 - r].expand(-1, m) for p, m in zip(late, runs, strict=True)], 1)
            if r < n - 1:
                rang = torch.cumsum(x * before, 1)
                before = torch.nn.functional.pad(rang[:, :-1], (1, 0))
        gap = torch.from_numpy(gammaincc(n, now))[:, None].repeat(1, len(d))
        gap[:, :stop] -= few * torch.exp(-load)
        inside += step * away * (s * torch.exp(-away * s) * gap).sum(0)
    return np.where(outside == 0, 1.0, inside.numpy())


def _late_rings(rates: np.ndarray, times: np.ndarray, n: int) -> np.ndarray:
    """Probability that at most r of the first 0 .. m clocks rang by each time, r = 0 .. n - 1: (S, n, m + 1)."""
    exactly = np.zeros((len(times), n, len(rates) + 1))
    exactly[:, 0, 0] = 1
    for j, rate in enumerate(rates):
        silent = np.exp(-rate * times)[:, None]
        exactly[:, :, j + 1] = exactly[:, :, j] * silent
        exactly[:, 1:, j + 1] += exactly[:, :-1, j] * (1 - silent)
    return exactly.cumsum(axis=1)


# -- the optimum by its definition, for tiny vocabularies ------------------------------------------------------------


def draft_sets(draft: np.ndarray, k: int, *, replace: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """The sets of tokens that k draws can give, and their probabilities: (N, k) token ids, (N,).

    A set with fewer than k tokens repeats its first. About V**k / k! sets: the one that a token may come from is all
    that a transport plan sees, so orders of the same draws are merged. replace: whether a token can be drawn twice.
    """
    vocabulary = range(len(draft))
    k = k if replace else min(k, int(np.count_nonzero(draft)))
    tuples = np.array(list(product(vocabulary, repeat=k) if replace else permutations(vocabulary, k)))
    law = draft[tuples]
    if not replace:
        left = np.tile(draft, (len(tuples), 1))  # what a draw finds, summed: 1 minus the drawn would lose its digits
        for draw in range(1, k):
            np.put_along_axis(left, tuples[:, draw - 1 : draw], 0.0, axis=1)
            mass = left.sum(1)
            law[:, draw] = np.divide(law[:, draw], mass, out=np.zeros_like(mass), where=mass > 0)
    tuples.sort(axis=1)
    repeated = np.zeros(tuples.shape, dtype=bool)
    repeated[:, 1:] = tuples[:, 1:] == tuples[:, :-1]
    sets = np.sort(np.where(repeated, tuples[:, :1], tuples), axis=1)
    sets, inverse = np.unique(sets, axis=0, return_inverse=True)
    return sets, np.bincount(inverse.ravel(), law.prod(1), minlength=len(sets))


def membership(sets: np.ndarray, vocabulary: int) -> np.ndarray:
    """Which token is in which set: (N, V) bool."""
    inside = np.zeros((len(sets), vocabulary), dtype=bool)
    inside[np.arange(len(sets))[:, None], sets] = True
    return inside


def subsets(target: np.ndarray, sets: np.ndarray, law: np.ndarray) -> float:
    """The largest probability that the token is in the drafted set, by the dual: 1 + min over all 2**V subsets H.

    Each H counts the target's mass in it minus the probability that the whole set is. sets, law: as of `draft_sets`.
    """
    chosen = (np.arange(2 ** len(target))[:, None] >> np.arange(len(target)) & 1).astype(bool)
    return float(1 + min(target[inside].sum() - law[inside[sets].all(1)].sum() for inside in chosen))


def linear_program(target: np.ndarray, sets: np.ndarray, law: np.ndarray) -> float:
    """The same over all couplings, by definition: scipy's HiGHS packs the transport plan.

    Variables w(set, y) >= 0 with y in the set, a sparse matrix; sums over y stay below the set's probability, sums
    over sets below the target's. target: (V,); sets, law: as `draft_sets` gives them.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_array

    row, token = np.nonzero(membership(sets, len(target)))
    edges = np.arange(len(row))
    places = np.concatenate([row, len(sets) + token]), np.concatenate([edges, edges])
    packing = csr_array((np.ones(2 * len(row)), places), shape=(len(sets) + len(target), len(row)))
    found = linprog(-np.ones(len(row)), A_ub=packing, b_ub=np.concatenate([law, target]), method="highs")
    if found.status != 0:
        raise RuntimeError(f"HiGHS found no optimum: {found.message}")
    return float(-found.fun)


def transport(target: np.ndarray, sets: np.ndarray, law: np.ndarray) -> float:
    """The same by POT's network simplex on the full cost matrix: 0 where the token is in the set, 1 elsewhere."""
    import ot

    cost = 1.0 - membership(sets, len(target))
    value, log = ot.emd2(law / law.sum(), target / target.sum(), cost, numItermax=10**9, log=True)
    if log["warning"] is not None:
        raise RuntimeError(f"POT found no optimum: {log['warning']}")
    return float(1 - value)


def linear_program_acceptance(target: np.ndarray, draft: np.ndarray, k: int, *, replace: bool = True) -> float:
    """The optimal acceptance of k drafts by its definition, for tiny vocabularies: V**k / k! sets of drafts."""
    return linear_program(target, *draft_sets(draft, k, replace=replace))
