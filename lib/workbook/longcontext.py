"""Long contexts of a real language model: real text, a filled KV cache, and decode steps timed on it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import pandas as pd
import torch

from workbook import measure
from workbook.models.lm import Attention, KVCache, Llama


def real_text(tokenizer, rows: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids, shape (rows, length), of consecutive stretches of the Python language reference.

    The text ships inside Python itself (module pydoc_data.topics, PSF licence), about 110,000 tokens; `seed` picks
    where to start. Raises ValueError if the text is too short.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    start = int(np.random.default_rng(seed).integers(100_000))
    ids = tokenizer(text[start : start + 8 * rows * length], return_tensors="pt").input_ids[0, : rows * length]
    if len(ids) < rows * length:
        raise ValueError(f"the text has {len(ids)} tokens from here on, {rows} x {length} are needed.")
    return ids.view(rows, length)


@torch.inference_mode()
def prefill(model: Llama, tokens: torch.Tensor, *, room: int = 16, chunk: int = 256) -> KVCache:
    """A cache that holds `tokens`, shape (rows, length), with space for at least `room` more, in whole pages of 16."""
    cache = model.cache(len(tokens), -(-(tokens.shape[1] + room) // 16) * 16)
    for part in tokens.split(chunk, dim=1):
        model.hidden(part, cache)
    return cache


def tile(cache: KVCache, batch: int, capacity: int, *, layers: int | None = None) -> KVCache:
    """A cache of `batch` equal rows filled to `capacity`: the rows of `cache` end to end, repeated as often as needed.

    layers: only the first so many. For timing: keys and values are real, their positions are not.
    """
    long = copy.copy(cache)
    for name in ("keys", "values"):
        valid = getattr(cache, name)[:layers, :, :, : cache.length]
        row = valid.transpose(1, 2).flatten(2, 3)  # (layers, kv_heads, rows * length, d)
        row = row.repeat(1, 1, -(-capacity // row.shape[2]), 1)[:, :, :capacity]
        setattr(long, name, row[:, None].expand(-1, batch, -1, -1, -1).contiguous())
    long.length = capacity
    return long


def rows_of(cache: KVCache, batch: int, length: int) -> KVCache:
    """The first `batch` rows and `length` positions of a cache, sharing its memory."""
    view = copy.copy(cache)
    view.keys, view.values, view.length = cache.keys[:, :batch], cache.values[:, :batch], length
    return view


def time_steps(
    model: Llama,
    cache: KVCache,
    kinds: Mapping[str, Callable[[KVCache], Attention | None]],
    *,
    batches: list[int],
    contexts: list[int],
    repeats: int,
) -> pd.DataFrame:
    """Seconds of decode steps, interleaved: columns name, repeat, seconds, batch, context.

    kinds: by name, what gives the attention for a cache (None for dense attention).
    """
    long, tables = tile(cache, max(batches), max(contexts) + 16), []
    for batch in batches:
        for context in contexts:
            view, token = rows_of(long, batch, context), torch.zeros(batch, 1, dtype=torch.long)

            attends = {name: kind(view) for name, kind in kinds.items()}

            def step(name, view=view, token=token, context=context, attends=attends):
                view.length = context
                return model(token, view, attend=attends[name])

            steps = {name: partial(step, name) for name in kinds}
            tables.append(measure.interleaved(steps, repeats=repeats).assign(batch=batch, context=context))
    return pd.concat(tables, ignore_index=True)


def time_peer(original, model: Llama, cache: KVCache, *, batch: int, context: int, repeats: int) -> pd.DataFrame:
    """Seconds of a dense step by transformers with its DynamicCache ("transformers") and by the lean model ("lean")."""
    from transformers import DynamicCache

    mine, past, token = tile(cache, batch, context + 16), DynamicCache(), torch.zeros(batch, 1, dtype=torch.long)
    for layer, (keys, values) in enumerate(zip(mine.keys, mine.values, strict=True)):
        past.update(keys[:, :, :context].clone(), values[:, :, :context].clone(), layer)

    @torch.inference_mode()
    def transformers():
        original(token, past_key_values=past, use_cache=True)
        past.crop(-1)  # forget the new token

    def lean():
        mine.length = context
        model(token, mine)

    return measure.interleaved({"transformers": transformers, "lean": lean}, repeats=repeats)


def time_attention(
    model: Llama, cache: KVCache, kind: Callable[[KVCache], Attention], *, length: int, batch: int, repeats: int
) -> pd.DataFrame:
    """Seconds of one layer's attention of one new token: three dense forms and `kind` ("sparse"), interleaved.

    kind: what gives the attention for a cache. The first six layers take turns, so that the processor's own cache does
    not hold the keys and values of the last call.
    """
    layers = 6
    long = tile(cache, batch, length, layers=layers)
    q = torch.randn(batch, model.kv_heads, model.heads // model.kv_heads, model.head_dim)
    heads, keys, values, sparse = q.flatten(1, 2)[:, :, None], long.keys, long.values, kind(long)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    forms = {
        "dense, query heads as rows": lambda i: sdpa(q, keys[i], values[i]),
        "dense, enable_gqa": lambda i: sdpa(heads, keys[i], values[i], enable_gqa=True),
        "dense, matrix products": lambda i: (q @ keys[i].mT / model.head_dim**0.5).softmax(-1) @ values[i],
        "sparse": lambda i: sparse(i, q, length),
    }
    turns = {name: lambda form=form: [form(i) for i in range(layers)] for name, form in forms.items()}
    table = measure.interleaved(turns, repeats=repeats)
    return table.assign(seconds=table.seconds / layers)
