"""Prompts that are read with other attention than dense: peers, races on real inputs, and what a cache is worth.

A `mix` is the attention of `vlm.prefill`; a `select(layer, sample, q, k)` gives the positions of the tokens that one
layer keeps for one sequence, q (heads, n, d) and k (kv_heads, n, d).
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from workbook.kvcache import MixedCache, full_bytes
from workbook.models.lm import Llama
from workbook.models.vlm import Mix, MosaicVLM, Questions, prefill

Select = Callable[[int, int, torch.Tensor, torch.Tensor], torch.Tensor]


def dense(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """All pairs, by torch's fused causal attention: the baseline."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def everything(layer: int, sample: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """Select all tokens."""
    return torch.arange(q.shape[1], device=q.device)


def fastv(ratio: float, words: int) -> Select:
    """FastV (Chen et al. 2024), K = 2: all tokens in two layers, then those that the last token attends to most in the
    second one; the `words` last tokens always stay."""
    chosen = {}

    def select(layer, sample, q, k):
        n, group = q.shape[1], len(q) // len(k)
        if layer == 1:
            logits = (q[:, -1:] * k.repeat_interleave(group, dim=0)).sum(-1) * q.shape[-1] ** -0.5
            scores = logits.softmax(-1).mean(0)
            scores[n - words :] = torch.inf
            chosen[sample] = scores.topk(max(words, round(ratio * n))).indices.sort().values
        return chosen[sample] if layer > 1 else torch.arange(n, device=q.device)

    return select


def counting(select: Select, log: list[int]) -> Select:
    """The same select; how many tokens it keeps goes to `log`, layer after layer, sample after sample."""

    def noted(layer, sample, q, k):
        kept = select(layer, sample, q, k)
        log.append(len(kept))
        return kept

    return noted


def filling(kinds: Mapping[str, tuple[Select, list[MixedCache]]]) -> Mix:
    """Dense attention that fills several sets of caches, one cache a sequence, each with its own selection."""

    def mix(layer, q, k, v):
        for select, caches in kinds.values():
            for sample, cache in enumerate(caches):
                cache.append(layer, k[sample], v[sample])
                cache.compress(layer, select(layer, sample, q[sample], k[sample]))
        return dense(layer, q, k, v)

    return mix


def race(forms: Mapping[str, Mix], log: list[dict], *, every: int = 3) -> Mix:
    """Dense attention; in every third layer all `forms`, "dense" among them, run on the same inputs, timed in `log`."""

    def mix(layer, q, k, v):
        names, outs = list(forms) if layer % every == 0 else ["dense"], {}
        for name in names if layer % 2 else names[::-1]:
            start = time.perf_counter()
            outs[name] = forms[name](layer, q, k, v)
            log.append({"layer": layer, "form": name, "seconds": time.perf_counter() - start})
        return outs["dense"]

    return mix


def time_prefills(
    model: Llama,
    ids: torch.Tensor,
    lengths: list[int],
    forms: Mapping[str, Mix],
    whole: Callable[[list[int], list[MixedCache]], Mix],
    caches: Callable[[], list[MixedCache]],
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Read the first `lengths` tokens of ids (1, n) dense, with a `race` of `forms` on the way, and then by `whole`.

    whole(log, caches) gives the attention of the second reading, which fills fresh `caches()` and notes in log how many
    tokens each layer keeps. Returns four tables: the race (layer, form, seconds, length); seconds (form, length,
    seconds), where "attention, FORM" is for all layers at the mean of the raced ones and "everything, dense" is without
    the time that the race took; totals (length, dense, whole in seconds; ratio; compression); layers (length, layer,
    kept in %).
    """
    prefill(model, model.embedding[ids[:, :128]], race(forms, []))  # warm up
    raced, totals, layers = [], [], []
    for length in tqdm(lengths, desc="prefills"):
        x, log, kept, filled = model.embedding[ids[:, :length]], [], [], caches()
        start = time.perf_counter()
        prefill(model, x, race(forms, log))
        middle = time.perf_counter()
        prefill(model, x, whole(kept, filled))
        seconds = time.perf_counter() - middle
        aside = sum(entry["seconds"] for entry in log if entry["form"] != "dense")
        row = {"length": length, "dense": middle - start - aside, "whole": seconds, "ratio": np.mean(kept) / length}
        totals.append(row | {"compression": full_bytes(model, length) / filled[0].nbytes})
        raced.append(pd.DataFrame(log).assign(length=length))
        layers += [{"length": length, "layer": i + 1, "kept": 100 * p / length} for i, p in enumerate(kept)]
    raced, totals = pd.concat(raced, ignore_index=True), pd.DataFrame(totals)
    forms_of = raced.groupby(["form", "length"], as_index=False).seconds.mean()
    forms_of = forms_of.assign(form="attention, " + forms_of.form, seconds=len(model.layers) * forms_of.seconds)
    whole_of = totals.rename(columns={"dense": "everything, dense", "whole": "everything, ZipVL"})
    whole_of = whole_of.melt("length", ["everything, dense", "everything, ZipVL"], "form", "seconds")
    return raced, pd.concat([forms_of, whole_of], ignore_index=True), totals, pd.DataFrame(layers)


def answer(
    vision: MosaicVLM,
    lean: Llama,
    shown: torch.Tensor,
    questions: Questions,
    mix: Callable[[list[int]], Mix],
    *,
    batch: int = 32,
) -> tuple[np.ndarray, np.ndarray]:
    """Answer the first question of each mosaic: whether it is right, (n,), and the tokens kept, (n, layers).

    shown: image tokens (pictures, 16, 128); mix(log) gives an attention that notes in log the tokens that it keeps,
    layer after layer, sample after sample.
    """
    right, counts = [], []
    parts = [t.split(batch) for t in (questions.tiles, questions.words[:, 0], questions.answers[:, 0])]
    for tiles, words, answers in zip(*parts, strict=True):
        log = []
        states = prefill(lean, vision.prompts(shown[tiles], words), mix(log))
        right.append(lean.logits(states[:, -1]).argmax(-1) == answers)
        counts.append(np.reshape(log, (len(lean.layers), -1)).T)
    return torch.cat(right).numpy(), np.concatenate(counts)


def remember(
    vision: MosaicVLM,
    lean: Llama,
    shown: torch.Tensor,
    questions: Questions,
    stores: Callable[[int], Mapping[str, tuple[Select, list[MixedCache]]]],
    decode: Callable[[list[MixedCache], int], Mix],
    *,
    batch: int = 32,
) -> pd.DataFrame:
    """Answer the first question of each mosaic from a cache: columns cache, sample, compression over 16 bits, right.

    The prompt without its last word is read with dense attention and fills all caches of `stores(sequences)`; then the
    last word has only the cache to look at. decode(caches, 0) gives its attention.
    """
    tables = []
    parts = [t.split(batch) for t in (questions.tiles, questions.words[:, 0], questions.answers[:, 0])]
    for number, (tiles, words, answers) in enumerate(zip(*parts, strict=True)):
        x, kinds = vision.prompts(shown[tiles], words), stores(len(tiles))
        prefill(lean, x[:, :-1], filling(kinds))
        length, samples = x.shape[1] - 1, np.arange(len(x)) + number * batch
        for name, (_, caches) in kinds.items():
            smaller = [full_bytes(lean, length) / cache.nbytes for cache in caches]
            states = prefill(lean, x[:, -1:], decode(caches, 0), start=length)
            right = (lean.logits(states[:, -1]).argmax(-1) == answers).float()
            row = {"cache": name, "sample": samples, "compression": smaller, "right": right}
            tables.append(pd.DataFrame(row))
    return pd.concat(tables, ignore_index=True)


def attention_work(n: int, kept, rows=()):
    """FLOPs of one layer's attention among `kept` of n tokens over those of dense causal attention, probes included.

    rows: positions of the probes. A pair of tokens costs 4 d a head, a probe's look at a token 2 d. kept: int or array.
    """
    return (kept * (kept + 1) + sum(int(row) + 1 for row in rows)) / (n * (n + 1))


def planted(tokenizer, text: torch.Tensor, length: int, rng: np.random.Generator):
    """Hide a code of five digits in a text: (text with it, same size; question and code; digits of the code).

    text: (n,) token ids; the code stands between 10 and 90 % of the first `length` tokens, the rest moves back.
    """
    code, question = "".join(map(str, rng.integers(10, size=5))), "\n\nThe secret code of the lighthouse is"
    fact, asked, whole = (
        tokenizer(t, return_tensors="pt").input_ids[0]
        for t in (f"{question} {code}.\n\n", question, f"{question} {code}")
    )
    at = int(rng.uniform(0.1, 0.9) * (length - len(fact)))
    return torch.cat([text[:at], fact, text[at:]])[: len(text)], whole, len(whole) - len(asked) - 1


def judge(
    model: Llama,
    caches: list[MixedCache],
    decode: Callable[[list[MixedCache], int], Mix],
    following: torch.Tensor,
    whole: torch.Tensor,
    digits: int,
    *,
    start: int,
    run: int,
) -> dict[str, float]:
    """What a filled cache is worth: nats a token of the text that follows, and whether the planted code is told.

    decode(caches, run) gives the attention of new tokens, which come in runs of `run`; start: their first position.
    following: (n,) ids; whole: question and code, its last `digits` tokens are the code. Uses up `caches`.
    """
    spare, states, at = copy.deepcopy(caches), [], start
    for part in following[:-1].split(run):
        states.append(prefill(model, model.embedding[part][None], decode(caches, run), start=at))
        at += len(part)
    loss = F.cross_entropy(model.logits(torch.cat(states, 1)[0]), following[1:])
    asked = prefill(model, model.embedding[whole[:-1]][None], decode(spare, 0), start=start)
    guesses = model.logits(asked[0]).argmax(-1)
    return {"nats": loss.item(), "told": bool((guesses[-digits:] == whole[-digits:]).all())}
