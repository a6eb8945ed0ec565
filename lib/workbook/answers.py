"""Many answers to many questions from one batched decode over a shared prefix.

A few-shot prompt is one long prefix that all questions share and a short question. The prefix is read once and kept
once: every row looks at the same keys, so a batch of hundreds of answers stores only its own few tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from workbook.models.lm import Attention, KVCache, Llama, load_lm
from workbook.study import cpu_flags

Law = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (logits (rows, V), temperatures (rows,)) -> (rows, V)


def load_model(*, device: str = "cpu") -> Llama:
    """SmolLM2 for batches: 16-bit blocks where the processor multiplies them faster, an output head in float32 always.

    16-bit logits would tie: near 20 their steps are 1/8, which is 13 % of a probability.
    """
    narrow = device != "cpu" or "amx_bf16" in cpu_flags()
    model = load_lm(dtype=torch.bfloat16 if narrow else torch.float32, device=device)
    return Llama.from_transformers(model, head=model.lm_head.weight.detach().float())


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prefix:
    """What all rows have read: keys and values, (layers, kv_heads, length, head_dim); `length` may be 0."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def length(self) -> int:
        """Tokens of the prefix."""
        return self.keys.shape[2]


def read_prefix(model: Llama, tokens: Sequence[int]) -> Prefix:
    """Read the shared tokens once."""
    cache = model.cache(1, max(1, len(tokens)))
    if len(tokens):
        model.hidden(torch.tensor([list(tokens)]), cache)
    return Prefix(cache.keys[:, 0, :, : len(tokens)], cache.values[:, 0, :, : len(tokens)])


def _attention(prefix: Prefix, cache: KVCache, seen: torch.Tensor) -> Attention:
    """Attention of every row to the shared prefix and to its own cache, as Llama's `attend`.

    seen: (rows, new, own) bool, which of its own slots each new token sees. Against the prefix all rows are one matrix
    product; one softmax covers both parts.
    """
    bias = torch.zeros(seen.shape, dtype=cache.keys.dtype, device=seen.device).masked_fill_(~seen, -torch.inf)[:, None]

    def attend(number: int, q: torch.Tensor, length: int) -> torch.Tensor:
        rows, heads, queries, width = q.shape
        own_keys, own_values = cache.keys[number, :, :, :length], cache.values[number, :, :, :length]
        q = q * width**-0.5
        flat = q.transpose(0, 1).reshape(heads, rows * queries, width)
        shared = (flat @ prefix.keys[number].mT).view(heads, rows, queries, -1).transpose(0, 1)
        own = q @ own_keys.mT + bias.repeat(1, 1, queries // bias.shape[2], 1)
        weights = torch.cat([shared, own], -1).float().softmax(-1).to(q.dtype)
        shared, own = weights.split([prefix.length, length], -1)
        flat = shared.transpose(0, 1).reshape(heads, rows * queries, -1) @ prefix.values[number]
        return flat.view(heads, rows, queries, width).transpose(0, 1) + own @ own_values

    return attend


class _Rows:
    """Sequences that go on behind a prefix, one a row, each with its own length: the cache and what it has read."""

    def __init__(self, model: Llama, prefix: Prefix, questions: Sequence[Sequence[int]], room: int):
        self.model, self.prefix = model, prefix
        self.lengths = torch.tensor([len(question) for question in questions], device=model.embedding.device)
        self.longest = int(self.lengths.max())
        self.cache = model.cache(len(questions), self.longest + room)
        if prefix.length + self.cache.capacity > len(model.cosine):  # the cache does not count the shared prefix
            model._rotary(2 * (prefix.length + self.cache.capacity))
        states = self._forward(_padded(questions), torch.zeros_like(self.lengths))
        self.states = states[torch.arange(len(questions)), self.lengths - 1]  # of the last token of each question

    def keep(self, rows: torch.Tensor) -> None:
        """Go on with these rows; a row may go on more than once."""
        if len(rows) != len(self.lengths) or (rows != torch.arange(len(rows), device=rows.device)).any():
            self.cache.keys, self.cache.values = self.cache.keys[:, rows], self.cache.values[:, rows]
            self.lengths = self.lengths[rows]

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read further tokens, (rows, new), behind what each row has read: final states (rows, new, hidden)."""
        return self._forward(tokens, self.lengths + self.cache.length - self.longest)

    def _forward(self, tokens: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """first: (rows,), the place of each row's first new token behind the prefix."""
        before, new = self.cache.length, torch.arange(tokens.shape[1], device=first.device)
        slots = torch.arange(before + len(new), device=first.device)
        # padding between a question's end and the longest question's is never seen
        seen = ((slots < self.lengths[:, None]) | (slots >= self.longest))[:, None] & (slots <= before + new[:, None])
        positions = (self.prefix.length + first[:, None] + new)[:, None]  # (rows, 1, new): rotations differ by row
        attend = _attention(self.prefix, self.cache, seen)
        return self.model.hidden(tokens, self.cache, positions=positions, attend=attend)


def _padded(sequences: Sequence[Sequence[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(list(s)) for s in sequences], batch_first=True)


def next_logits(model: Llama, states: torch.Tensor) -> torch.Tensor:
    """Logits of the next token, (..., V) float32, from final states (..., hidden)."""
    return model.head(states.to(model.head.dtype)).float()


@torch.inference_mode()
def read_answers(
    model: Llama,
    prefix: Prefix,
    questions: Sequence[Sequence[int]],
    answers: Sequence[Sequence[Sequence[int]]],
    *,
    rows: int = 256,
) -> torch.Tensor:
    """Read several answers to each question, the question once: the final state of each answer's last token.

    answers: for each question its answers in token ids, none empty. Returns (answers, hidden), one row an answer in
    order; `next_logits` of it is what comes next.
    """
    states, start = [], 0
    while start < len(questions):
        stop, flat = start, []
        while stop < len(questions) and (not flat or len(flat) + len(answers[stop]) <= rows):
            flat, stop = [*flat, *answers[stop]], stop + 1
        if flat:
            batch = _Rows(model, prefix, questions[start:stop], max(map(len, flat)))
            parents = [row for row, several in enumerate(answers[start:stop]) for _ in several]
            batch.keep(torch.tensor(parents, device=batch.lengths.device))
            ends = [len(answer) - 1 for answer in flat]
            states.append(batch.read(_padded(flat))[torch.arange(len(flat)), ends])
        start = stop
    return torch.cat(states)


# -- answering --------------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """tokens: (questions, samples, new), -1 behind the end; logprob: the model's own log-probability of each answer.

    written: tokens of each answer, (questions, samples), with the stop token, which counts in `logprob` too but is no
    part of the answer. read: question tokens; computed: tokens that really went through the model, where answers that
    begin alike are one; passes, seconds.
    """

    tokens: NDArray
    logprob: NDArray
    written: NDArray
    read: int
    computed: int
    passes: int
    seconds: float

    def texts(self, tokenizer) -> NDArray:
        """The answers as stripped strings, (questions, samples)."""
        rows = self.tokens.reshape(-1, self.tokens.shape[-1]).tolist()
        texts = tokenizer.batch_decode([[token for token in row if token >= 0] for row in rows])
        return np.array([text.strip() for text in texts], dtype=object).reshape(self.tokens.shape[:2])


def tempered(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    """softmax(logits / temperature) for each row; at temperature 0 all mass on the most likely token."""
    law = (logits / temperature.where(temperature > 0, torch.ones_like(temperature))[:, None]).softmax(-1)
    cold = torch.nonzero(temperature == 0)[:, 0]
    law[cold] = 0.0
    law[cold, logits[cold].argmax(-1)] = 1.0
    return law


def draw(law: torch.Tensor, row: torch.Tensor, uniform: torch.Tensor, *, block: int = 256) -> torch.Tensor:
    """Tokens by inversion: entry i is the first token of law[row[i]] whose cumulated mass exceeds uniform[i] * total.

    law: (rows, V), need not be normalised; row, uniform: (n,). Sums of blocks come first, so that the vocabulary is
    read once and cumulated in the one block that decides.
    """
    gap = -law.shape[1] % block
    law = (F.pad(law, (0, gap)) if gap else law).unflatten(1, (-1, block))

    def invert(weights: torch.Tensor, point: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Index with cumulated weight above `point`, never one without mass; and what is left of `point` there."""
        cumulative = weights.double().cumsum(-1)
        last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
        index = torch.minimum(torch.searchsorted(cumulative, point[:, None], right=True), last)[:, 0]
        before = F.pad(cumulative, (1, 0)).gather(1, index[:, None])[:, 0]
        return index, (point - before).clamp(min=0)

    sums = law.sum(-1, dtype=torch.float64)[row]
    chosen, rest = invert(sums, uniform.double() * sums.sum(-1))
    return chosen * block + invert(law[row, chosen], rest)[0]


@torch.inference_mode()
def sample(
    model: Llama,
    prefix: Prefix,
    questions: Sequence[Sequence[int]],
    temperatures: Sequence[float],
    *,
    new_tokens: int,
    stop: Sequence[int] = (),
    law: Law = tempered,
    seed: int | Sequence[int] = 0,
    rows: int = 512,
) -> Answers:
    """One answer to each question at each entry of `temperatures` (0 is greedy), about `rows` answers a batch.

    questions: token ids behind the prefix, at least one each. An answer ends before one of the `stop` tokens or after
    `new_tokens`. law(logits, temperatures) turns logits into probabilities. Answers to a question that begin alike are
    computed once: their states are the same. Sample j of question i has its own random numbers, fixed by `seed`, i and
    j: two calls with the same seed are coupled whatever their laws, and no batching changes what is drawn. ValueError
    for an empty question.
    """
    if not questions or min(map(len, questions)) < 1:
        raise ValueError("each question needs at least one token behind the prefix.")
    started, shape = time.perf_counter(), (len(questions), len(temperatures), new_tokens)
    uniform = np.random.default_rng(seed).random(shape)
    tokens, logprob, written = np.full(shape, -1), np.zeros(shape[:2]), np.zeros(shape[:2], dtype=int)
    computed, passes, step = 0, 0, max(1, rows // len(temperatures))
    for first in range(0, len(questions), step):
        part = slice(first, first + step)
        run = _sample(model, prefix, questions[part], temperatures, stop, law, uniform[part])
        tokens[part], logprob[part], written[part] = run[:3]
        computed, passes = computed + run[3], passes + run[4]
    seconds = time.perf_counter() - started
    return Answers(tokens, logprob, written, sum(map(len, questions)), computed, passes, seconds)


def _sample(model, prefix, questions, temperatures, stop, law, uniform):
    """One batch of `sample`: tokens, log-probabilities, tokens written, tokens computed, passes."""
    count, samples, new_tokens = uniform.shape
    batch = _Rows(model, prefix, questions, new_tokens)
    device, logits = batch.lengths.device, next_logits(model, batch.states)
    levels, level = torch.tensor(temperatures, dtype=torch.float32, device=device).unique(return_inverse=True)
    level, uniform = level.repeat(count), torch.from_numpy(uniform).to(device).flatten(0, 1)
    out = torch.full((count * samples, new_tokens), -1, device=device)
    logprob = torch.zeros(count * samples, dtype=torch.float64, device=device)
    written = torch.zeros(count * samples, dtype=torch.long, device=device)
    stops = torch.tensor(list(stop), dtype=torch.long, device=device)
    alive = torch.arange(count * samples, device=device)
    node = alive // samples  # the row of the batch that each answer has arrived at
    computed, passes = int(batch.lengths.sum()), 1
    for at in range(new_tokens):
        laws, which = (node * len(levels) + level[alive]).unique(return_inverse=True)  # one law a row and temperature
        chosen = draw(law(logits[laws // len(levels)], levels[laws % len(levels)]), which, uniform[alive, at])
        logprob[alive] += (logits[node, chosen] - logits.logsumexp(-1)[node]).double()
        written[alive] += 1
        going = ~torch.isin(chosen, stops)
        alive, node, chosen = alive[going], node[going], chosen[going]
        out[alive, at] = chosen
        if at + 1 == new_tokens or not len(alive):
            break
        size = logits.shape[1]
        children, node = (node * size + chosen).unique(return_inverse=True)  # answers that have been alike so far
        batch.keep(children // size)
        logits = next_logits(model, batch.read((children % size)[:, None])[:, 0])
        computed, passes = computed + len(children), passes + 1
    tables = (t.view(count, samples, *t.shape[1:]).cpu().numpy() for t in (out, logprob, written))
    return *tables, computed, passes


def generate(
    peer, prefix: Sequence[int], questions: Sequence[Sequence[int]], samples: int, *, new_tokens: int, stop, **law
) -> torch.Tensor:
    """The same work by transformers' `generate`: `samples` answers a question, behind a prefix that it too reads once.

    peer: a transformers model; law: temperature and min_p. Questions are padded on the left. Returns (answers, new).
    """
    longest = max(map(len, questions))
    pads = [longest - len(question) for question in questions]
    ids = [[*prefix, *[0] * pad, *question] for pad, question in zip(pads, questions, strict=True)]
    ids, mask = torch.tensor(ids, device=peer.device), torch.ones(len(pads), len(prefix) + longest, dtype=torch.long)
    for row, pad in enumerate(pads):
        mask[row, len(prefix) : len(prefix) + pad] = 0
    law = {"do_sample": True, "top_k": 0, "top_p": 1.0} | law
    ends = {"max_new_tokens": new_tokens, "eos_token_id": list(stop), "pad_token_id": 0}
    with torch.inference_mode():
        past = peer(ids[:1, : len(prefix)], use_cache=True).past_key_values
        past.batch_repeat_interleave(len(ids) * samples)
        options = {"past_key_values": past, "num_return_sequences": samples} | law | ends
        return peer.generate(ids, attention_mask=mask.to(peer.device), **options)[:, ids.shape[1] :]
