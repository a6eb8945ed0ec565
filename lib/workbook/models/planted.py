"""Planted words: questions whose answers a program grades, policies with an exact law, tiny Llamas trained on them.

A question is five words x_1 .. x_5 of thirty. A fixed map, which nobody tells the model, sends each word to its
meaning; the gold tuple is the meanings in order. A trace of H words is solved at the first step at which its last five
words are the gold tuple.
"""

from __future__ import annotations

import numpy as np
import torch

from workbook.models.lm import Llama

WORDS, LENGTH, LONGEST = 30, 5, 40  # symbols; words of a gold tuple; longest trace that the models were trained on
MEANING = np.random.default_rng(2502).integers(WORDS, size=WORDS)  # the map g*
BASES = {"heterogeneous": (10.0, 30.0, 100.0, 1000.0), "homogeneous": (100.0,), "sharp": (1000.0,)}


def questions(count: int, rng: np.random.Generator) -> np.ndarray:
    """`count` random questions, (count, 5) words."""
    return rng.integers(WORDS, size=(count, LENGTH))


def golds(asked: np.ndarray) -> np.ndarray:
    """The gold tuples of questions, (n, 5) words."""
    return MEANING[asked]


def solved_at(traces: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """The step, from 1, at which each trace first ends in its gold tuple; H + 1 where it never does. traces: (n, H)."""
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(traces), LENGTH, axis=1)
    found = (windows == gold[:, None]).all(2)
    return np.where(found.any(1), found.argmax(1) + LENGTH, np.shape(traces)[1] + 1)


def overlap_table(gold: np.ndarray) -> np.ndarray:
    """State after each word, (n, 6, 30): the longest end of the trace that begins the gold tuple (Knuth-Morris-Pratt).

    A wrong word falls back to the longest border, not to 0: after 3, 3 of the tuple 3, 3, 7, a third 3 leaves 3, 3.
    """
    rows = np.arange(len(gold))
    table = np.zeros((len(gold), LENGTH + 1, WORDS), dtype=np.int64)
    table[rows, 0, gold[:, 0]] = 1
    border = np.zeros(len(gold), dtype=np.int64)  # the state that the tuple without its first word leads to
    for state in range(1, LENGTH + 1):
        table[:, state] = table[rows, border]
        if state < LENGTH:
            table[rows, state, gold[:, state]] = state + 1
            border = table[rows, border, gold[:, state]]
    return table


def chances(gold: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """Next-word law of the procedural policy in each state, (n, 6, 30): weight gamma on the word that goes on, else 1.

    gamma: (n,) or a number. A trace that is solved goes on from the longest border of the whole tuple.
    """
    table = overlap_table(gold)
    on = table == table.max(2, keepdims=True)  # one word leads furthest in each state
    weight = 1 + on * (np.broadcast_to(gamma, len(gold))[:, None, None] - 1)
    return weight / weight.sum(2, keepdims=True)


def walk(gold: np.ndarray, gamma: np.ndarray, steps: int, rng: np.random.Generator) -> np.ndarray:
    """One trace of the procedural policy for each gold tuple, (n, steps). gamma: (n,) or a number."""
    table, cumulative = overlap_table(gold), chances(gold, gamma).cumsum(2)
    rows, state, trace = np.arange(len(gold)), np.zeros(len(gold), dtype=np.int64), []
    for _ in range(steps):
        uniform = rng.random((len(gold), 1))
        word = (cumulative[rows, state] < uniform).sum(1).clip(max=WORDS - 1)
        state = table[rows, state, word]
        trace.append(word)
    return np.stack(trace, 1)


def chain(gold: np.ndarray, gamma: float) -> np.ndarray:
    """One-step law of the states under the procedural policy, (n, 6, 6), in which a solved trace stays solved."""
    table, law = overlap_table(gold), chances(gold, gamma)
    step = np.stack([np.where(table == state, law, 0).sum(2) for state in range(LENGTH + 1)], 2)
    step[:, LENGTH] = np.eye(LENGTH + 1)[LENGTH]
    return step


def hitting_law(gold: np.ndarray, gammas: tuple[float, ...], steps: int) -> np.ndarray:
    """Exact chance that a trace is solved at step 1 .. steps, or never (last), (n, steps + 1).

    gammas: equally likely, one drawn for each trace.
    """
    law = 0
    for gamma in gammas:
        step, state, solved = chain(gold, gamma), np.eye(LENGTH + 1)[:1].repeat(len(gold), 0), [np.zeros(len(gold))]
        for _ in range(steps):
            state = (state[:, None] @ step)[:, 0]
            solved.append(state[:, LENGTH])
        law = law + np.diff(np.stack([*solved, np.ones(len(gold))], 1), axis=1) / len(gammas)
    return law


def outcomes(gold: np.ndarray, gammas: tuple[float, ...], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards r = steps, .., 1, 0 of a trace that is solved at step 1 .. steps or never, and their chances, (n, all).

    r is the number of words from the one that solves the trace to the last: finding the answer early earns more.
    """
    law = hitting_law(gold, gammas, steps)
    return np.broadcast_to(np.arange(steps, -1, -1.0), law.shape), law


def ceiling(gold: np.ndarray, gammas: tuple[float, ...], steps: int) -> np.ndarray:
    """E[r | solved] for each gold tuple, (n,): what cloning solved traces tends to."""
    reward, law = outcomes(gold, gammas, steps)
    return (reward * law).sum(1) / law[:, :-1].sum(1)


def log_likelihood(traces: np.ndarray, gold: np.ndarray, gammas: tuple[float, ...]) -> np.ndarray:
    """Exact log-probability of each trace, (n,), in nats, under the mixture: what no model can beat on average."""
    table, rows, terms = overlap_table(gold), np.arange(len(gold)), []
    for gamma in gammas:
        law, state, total = chances(gold, gamma), np.zeros(len(gold), dtype=np.int64), np.zeros(len(gold))
        for word in traces.T:
            total = total + np.log(law[rows, state, word])
            state = table[rows, state, word]
        terms.append(total)
    return np.logaddexp.reduce(terms, 0) - np.log(len(gammas))


# -- models -----------------------------------------------------------------------------------------------------------


def encode(asked: np.ndarray) -> torch.Tensor:
    """Token ids of questions, (n, 5): a word at another place is another token; answers use the ids 0 to 29."""
    return torch.from_numpy(np.asarray(asked) + WORDS * np.arange(1, LENGTH + 1))


def build(*, seed: int = 0):
    """A freshly initialised LlamaForCausalLM of 134,000 parameters, to be trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=WORDS * (LENGTH + 1), hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=LENGTH + 2 * LONGEST,
        initializer_range=64**-0.5, bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load(base: str):
    """The trained LlamaForCausalLM of one of BASES; data.DataError if its file is missing or changed."""
    from workbook import checkpoints

    if base not in BASES:
        raise ValueError(f"base = {base!r}: one of {', '.join(BASES)} is allowed.")
    tensors = checkpoints.load("planted_lm")
    model = build()
    model.load_state_dict({k.removeprefix(f"{base}/"): t for k, t in tensors.items() if k.startswith(f"{base}/")})
    return model.eval()


def answer_logits(model, asked: np.ndarray, traces: np.ndarray) -> torch.Tensor:
    """Logits of every word of the traces given what stands before it, (n, H, 30), with gradients."""
    ids = torch.cat([encode(asked), torch.as_tensor(traces)], 1).to(model.device)
    return model(ids[:, :-1], logits_to_keep=np.shape(traces)[1]).logits[..., :WORDS]


@torch.inference_mode()
def sample(model, asked: np.ndarray, steps: int, seed: int, *, begun: np.ndarray | None = None) -> np.ndarray:
    """One trace for each question, (n, steps), at temperature 1: all at once, with a KV cache.

    begun: (n, h) words to go on from, with which the traces returned begin.
    """
    model = lean(model)
    generator = torch.Generator(model.embedding.device).manual_seed(seed)
    begun = np.zeros((len(asked), 0), dtype=np.int64) if begun is None else begun
    cache, trace = model.cache(len(asked), LENGTH + steps), [torch.from_numpy(begun)]
    word = torch.cat([encode(asked), trace[0]], 1)
    for _ in range(steps - begun.shape[1]):
        word = torch.multinomial(model(word, cache, last=True)[:, 0].softmax(-1), 1, generator=generator)
        trace.append(word.cpu())
    return torch.cat(trace, 1).numpy()


def lean(model) -> Llama:
    """The inference-only form of a LlamaForCausalLM, its head restricted to answer words; a Llama stays as it is."""
    if isinstance(model, Llama):
        return model
    return Llama.from_transformers(model, head=model.lm_head.weight.detach()[:WORDS])


def solve(model, asked: np.ndarray, each: int, steps: int, seed: int, *, rows: int = 4096) -> np.ndarray:
    """The solving step of `each` sampled traces for every question, (n, each); `rows` traces are written together."""
    model, many, hit = lean(model), asked.repeat(each, 0), []
    for start in range(0, len(many), rows):
        part = many[start : start + rows]
        hit.append(solved_at(sample(model, part, steps, seed + start), golds(part)))
    return np.concatenate(hit).reshape(-1, each)


def branching_variance(model, asked: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Unbiased estimates of the sum over h of E Var_a Q(s_h, a), in tokens squared, one for each question, (n,).

    From a prefix two next words are drawn, and two independent endings from each: r_ij of ending j after word i. Then
    (r_11 - r_21)(r_12 - r_22) / 2 has the mean Var_a Q(s_h, a).
    """
    trunk, many, total = sample(model, asked, steps, seed), asked.repeat(4, 0), np.zeros(len(asked))
    for h in range(steps):
        words = sample(model, asked.repeat(2, 0), h + 1, seed + 2 * h + 1, begun=trunk[:, :h].repeat(2, 0))
        ends = sample(model, many, steps, seed + 2 * h + 2, begun=words.repeat(2, 0))
        r = (steps + 1.0 - solved_at(ends, golds(many))).reshape(-1, 2, 2)
        total += (r[:, 0, 0] - r[:, 1, 0]) * (r[:, 0, 1] - r[:, 1, 1]) / 2
    return total


def solved_traces(model, asked: np.ndarray, steps: int, seed: int, *, rounds: int = 100) -> tuple[np.ndarray, int]:
    """One solved trace for each question, (n, steps), sampled until it is one, and how many had to be written.

    RuntimeError if a question is still unsolved after `rounds` traces.
    """
    model, traces, left, written = lean(model), np.zeros((len(asked), steps), dtype=np.int64), np.arange(len(asked)), 0
    for number in range(rounds):
        traces[left] = sample(model, asked[left], steps, seed + number)
        written += len(left)
        left = left[solved_at(traces[left], golds(asked[left])) > steps]
        if not len(left):
            return traces, written
    raise RuntimeError(f"{len(left)} of {len(asked)} questions have no solved trace after {rounds}: allow more steps.")
