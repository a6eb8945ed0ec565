"""The decoding loops: plain sampling, and the draft–verify loop into which every verifier plugs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from workbook.chance import Chance
from workbook.models.lm import KVCache, Llama
from workbook.verifiers import Drafts, Emission, Proposal, Verifier, independent


def probabilities(logits: torch.Tensor | np.ndarray, temperature: float = 1.0, top_p: float = 1.0) -> np.ndarray:
    """Softmax of `logits` / temperature over the last axis in float64, then nucleus truncation.

    top_p: keep the fewest most likely tokens whose mass reaches top_p (1 keeps all). Raises ValueError for a
    temperature that is not positive: greedy decoding has no distribution to preserve.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature} is out of range: 0 < temperature.")
    z = np.asarray(logits, dtype=np.float64) / temperature
    z = np.exp(z - z.max(axis=-1, keepdims=True))
    p = z / z.sum(axis=-1, keepdims=True)
    if top_p < 1:
        order = np.argsort(-p, axis=-1)
        before = np.cumsum(np.take_along_axis(p, order, -1), -1) - np.take_along_axis(p, order, -1)
        np.put_along_axis(p, order, np.where(before < top_p, np.take_along_axis(p, order, -1), 0.0), -1)
        p /= p.sum(axis=-1, keepdims=True)
    return p


@dataclass
class Trace:
    """What a decoder did. tokens: the new tokens; emitted: tokens of each step; seconds: by phase of the loop."""

    tokens: list[int] = field(default_factory=list)
    emitted: list[int] = field(default_factory=list)
    draft_calls: int = 0
    seconds: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("prefill", "draft", "verify", "select"), 0.0)
    )

    @property
    def target_calls(self) -> int:
        """Target passes after the prompt."""
        return len(self.emitted)

    @property
    def block_efficiency(self) -> float:
        """Emitted tokens per target call."""
        return sum(self.emitted) / len(self.emitted)

    @property
    def decode_seconds(self) -> float:
        """Seconds after the prompt was read."""
        return sum(s for phase, s in self.seconds.items() if phase != "prefill")


class _Clock:
    """Adds the time since the last call to a phase of a trace."""

    def __init__(self, trace: Trace):
        self.seconds, self.last = trace.seconds, time.perf_counter()

    def __call__(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


def decode_plain(
    target: Llama,
    prompt: Sequence[int],
    *,
    new_tokens: int,
    chance: Chance,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> Trace:
    """Ordinary sampling: one target pass a token, on the same forward pass and cache as the speculative loop."""
    trace = Trace()
    clock = _Clock(trace)
    cache = target.cache(1, len(prompt) + new_tokens)
    if len(prompt) > 1:
        target.hidden(torch.tensor([list(prompt[:-1])]), cache)
    last = int(prompt[-1])
    clock("prefill")
    for _ in range(new_tokens):
        logits = target(torch.tensor([[last]]), cache)[0, 0].cpu()
        clock("verify")
        last = chance.draw(probabilities(logits, temperature, top_p))
        trace.tokens.append(last)
        trace.emitted.append(1)
        clock("select")
    return trace


def decode(
    target: Llama,
    draft: Llama,
    prompt: Sequence[int],
    *,
    verifier: Verifier,
    drafts: int,
    length: int,
    new_tokens: int,
    chance: Chance,
    temperature: float = 1.0,
    top_p: float = 1.0,
    propose: Proposal = independent,
    callback: Callable[[Drafts, Emission], None] | None = None,
) -> Trace:
    """Speculative decoding with `drafts` draft rows of `length` tokens a step (SpecTr, Algorithm 3).

    The target scores all rows in one pass over their prefix tree: rows that agree share their nodes. Both caches are
    rolled back to the accepted tokens. At least `new_tokens` tokens are emitted; the surplus of the last step is cut.
    propose: how the rows' first tokens are drawn from the draft's law, i.i.d. by default; each row goes on alone.
    callback(drafts, emission) is called after each step. Raises ValueError if drafts, length or prompt are empty.
    """
    if drafts < 1 or length < 1 or len(prompt) < 2:
        raise ValueError(
            f"drafts = {drafts}, length = {length}, prompt of {len(prompt)} tokens: at least 1, 1 and 2 wanted."
        )
    trace = Trace()
    clock = _Clock(trace)
    capacity = len(prompt) + new_tokens + drafts * length + 2
    sequence = [int(token) for token in prompt]
    target_cache, draft_cache = target.cache(1, capacity), draft.cache(1, capacity)
    target.hidden(torch.tensor([sequence[:-1]]), target_cache)
    draft.hidden(torch.tensor([sequence[:-1]]), draft_cache)
    draft_cache.expand(drafts)
    clock("prefill")
    while len(trace.tokens) < new_tokens:
        tokens, draft_law = _draft_rows(
            draft, draft_cache, sequence, drafts, length, chance, temperature, top_p, propose
        )
        trace.draft_calls += length
        clock("draft")
        nodes, parents, node_of = _prefix_tree(tokens)
        logits = _score_tree(target, target_cache, sequence[-1], nodes, parents)
        clock("verify")
        laws: dict[int, np.ndarray] = {}

        def target_law(row: int, depth: int, node_of=node_of, laws=laws, logits=logits) -> np.ndarray:
            node = 0 if depth == 0 else node_of[row][depth - 1]
            if node not in laws:
                laws[node] = probabilities(logits[node], temperature, top_p)
            return laws[node]

        seen = Drafts(tokens, draft_law, target_law)
        emission = verifier(seen, chance)
        accepted = len(emission.tokens) - 1
        start = len(sequence) - 1  # the root node is the last token of the sequence
        target_cache.keep(start, [start, *(start + node for node in node_of[emission.row][:accepted])])
        kept = min(accepted, length - 1)  # the draft never read its own last token
        draft_cache.keep(start, list(range(start, start + 1 + kept)), emission.row)
        sequence += emission.tokens
        trace.tokens += emission.tokens
        trace.emitted.append(len(emission.tokens))
        clock("select")
        if callback is not None:
            callback(seen, emission)
            clock.last = time.perf_counter()
    del trace.tokens[new_tokens:]
    return trace


def _draft_rows(
    draft: Llama,
    cache: KVCache,
    sequence: list[int],
    rows: int,
    length: int,
    chance: Chance,
    temperature: float,
    top_p: float,
    propose: Proposal,
) -> tuple[np.ndarray, Callable[[int, int], np.ndarray]]:
    """Sample up to `rows` continuations of `length` tokens; returns (tokens, draft law by row and depth)."""
    pending = torch.tensor([sequence[cache.length :]]).expand(rows, -1)
    laws, tokens = [], np.empty((rows, length), dtype=np.int64)
    for depth in range(length):
        logits = draft(pending, cache, last=True)[:, 0]
        law = probabilities(
            logits[:1].cpu() if depth == 0 else logits.cpu(), temperature, top_p
        )  # the first law is common
        laws.append(law)
        if depth == 0:
            first = list(propose(law[0], rows, chance))
            tokens[:, 0] = first + first[-1:] * (rows - len(first))  # copies fill the batch, and are cut off below
        else:
            for row in range(rows):
                tokens[row, depth] = chance.draw(law[row])
        if draft.vocabulary is not None:
            tokens[:, depth] = draft.vocabulary[tokens[:, depth]]
        pending = torch.from_numpy(tokens[:, depth : depth + 1])

    def law_at(row: int, depth: int) -> np.ndarray:
        law = laws[depth][row if depth else 0]
        if draft.vocabulary is None:
            return law
        full = np.zeros(draft.size)
        full[draft.vocabulary] = law
        return full

    return tokens[: len(first)], law_at


def _prefix_tree(tokens: np.ndarray) -> tuple[list[int], list[int], list[list[int]]]:
    """Merge equal prefixes of the rows. Returns (token of each node, parent of each node, nodes along each row).

    Node 0 is the root, the last token of the sequence; it is not in the first list.
    """
    nodes: list[int] = []
    parents: list[int] = []
    children: dict[tuple[int, int], int] = {}
    along = []
    for row in tokens.tolist():
        parent, path = 0, []
        for token in row:
            key = (parent, token)
            if key not in children:
                nodes.append(token)
                parents.append(parent)
                children[key] = len(nodes)
            parent = children[key]
            path.append(parent)
        along.append(path)
    return nodes, parents, along


def _score_tree(target: Llama, cache: KVCache, root: int, nodes: list[int], parents: list[int]) -> np.ndarray:
    """One target pass over the root and the tree's nodes, each seeing its ancestors only: logits (1 + nodes, V)."""
    start, count = cache.length, 1 + len(nodes)
    depth = [0] * count
    sees = np.eye(count, dtype=bool)
    for node, parent in enumerate(parents, start=1):
        depth[node] = depth[parent] + 1
        sees[node] |= sees[parent]
    mask = torch.from_numpy(np.concatenate([np.ones((count, start), dtype=bool), sees], axis=1))
    positions = torch.tensor(depth) + start
    return target(torch.tensor([[root, *nodes]]), cache, positions=positions, mask=mask)[0].cpu().numpy()
