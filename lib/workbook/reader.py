"""Rows of text that a language model reads, reads again where they changed, and completes line by line.

All rows stand behind one prefix, of which each sees its own first part: a prompt with four worked examples begins with
the prompt with one. A text that begins like the row's last one is read from where they part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F

from workbook.answers import Prefix, next_logits
from workbook.models.lm import Attention, Llama

NARROW = 4  # up to so many new tokens a row, copying the prefix for each row costs more than it saves


class Reader:
    """Greedy completion of lines, one text a row, with roll-back of keys and values.

    prefix: what all rows may see; visible: how many of its tokens each row sees; forget: read every text anew, for
    comparison. computed: tokens that went through
    the model; passes: forward passes.
    """

    def __init__(self, model: Llama, prefix: Prefix, visible: Sequence[int], *, forget: bool = False):
        self.model, self.prefix, self.forget = model, prefix, forget
        self.device = model.embedding.device
        self.visible = torch.tensor(list(visible), device=self.device)
        self.rows = list(range(len(visible)))  # names of the rows that are still read
        self.texts: list[list[int]] = [[] for _ in visible]  # what each row holds, and in which slots
        self.slots: list[list[int]] = [[] for _ in visible]
        self.cache = model.cache(len(visible), 64)
        self.valid = torch.zeros(len(visible), 64, dtype=torch.bool, device=self.device)
        self.computed = self.passes = 0

    @torch.inference_mode()
    def write(
        self, rows: Sequence[int], texts: Sequence[Sequence[int]], starts: Sequence[Sequence[int]], *,
        new_tokens: int, stop: Sequence[int],
    ) -> list[list[int]]:  # fmt: skip
        """The next line of each row's text: one of `starts`, whichever the model prefers, and what it writes then.

        rows: names of the rows to go on with; the others are dropped for good. The line ends before a `stop` token or
        after `new_tokens` behind its start, and is never empty. Starts must differ in their first token.
        """
        self._keep(rows)
        texts, chosen = [list(text) for text in texts], [0] * len(rows)
        if len(starts) > 1:
            first = torch.tensor([start[0] for start in starts], device=self.device)
            chosen = next_logits(self.model, self._read(texts))[:, first].argmax(-1).tolist()
        lines = [list(starts[i]) for i in chosen]
        logits = next_logits(self.model, self._read([text + line for text, line in zip(texts, lines, strict=True)]))
        stops, going = (
            torch.tensor(list(stop), dtype=torch.long, device=self.device),
            torch.ones(len(rows), dtype=torch.bool),
        )
        for at in range(new_tokens):
            if at == 0:  # a line says something
                logits[:, stops] = -torch.inf
            token = logits.argmax(-1)
            going &= ~torch.isin(token, stops).cpu()
            for row in torch.nonzero(going)[:, 0].tolist():
                lines[row].append(int(token[row]))
            if not going.any() or at + 1 == new_tokens:
                break
            logits = next_logits(self.model, self._forward([[t] for t in token.tolist()])[:, 0])
        return lines

    def writer(
        self, tokenizer, limits: Mapping[str, int], stop: Sequence[int]
    ) -> Callable[[Sequence[int], Sequence[str], Sequence[str]], list[str]]:
        """`write` for texts: a function of (rows, prompts, starts) that returns lines.

        limits: new tokens by the first of the starts.
        """
        encode = tokenizer.encode

        def write(rows: Sequence[int], prompts: Sequence[str], starts: Sequence[str]) -> list[str]:
            ids = [encode(text) for text in prompts], [encode(start) for start in starts]
            return tokenizer.batch_decode(self.write(rows, *ids, new_tokens=limits[starts[0]], stop=stop))

        return write

    def _keep(self, rows: Sequence[int]) -> None:
        if list(rows) == self.rows:
            return
        places = [self.rows.index(row) for row in rows]
        index = torch.tensor(places, device=self.device)
        self.cache.keys, self.cache.values = self.cache.keys[:, index], self.cache.values[:, index]
        self.valid, self.visible = self.valid[index], self.visible[index]
        self.rows, self.texts, self.slots = list(rows), *([t[i] for i in places] for t in (self.texts, self.slots))

    def _read(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """Make each row hold its text: final states of the last tokens, (rows, hidden)."""
        new = []
        for row, text in enumerate(texts):
            old, keep = self.texts[row], 0
            while not self.forget and keep < min(len(old), len(text) - 1) and old[keep] == text[keep]:
                keep += 1
            self.valid[row, self.slots[row][keep:]] = False
            del self.texts[row][keep:], self.slots[row][keep:]
            new.append(text[keep:])
        self.cache.length = max((slots[-1] + 1 for slots in self.slots if slots), default=0)
        states = self._forward(new)
        return states[torch.arange(len(new)), [len(tokens) - 1 for tokens in new]]

    def _forward(self, new: Sequence[list[int]]) -> torch.Tensor:
        """Read further tokens in each row, at least one: final states (rows, longest, hidden)."""
        start, width = self.cache.length, max(map(len, new))
        end = start + width
        if end > self.cache.capacity:
            self._grow(2 * end)
        places = torch.tensor([len(text) for text in self.texts], device=self.device)
        for row, tokens in enumerate(new):
            self.valid[row, start : start + len(tokens)] = True
            self.texts[row] += tokens
            self.slots[row] += range(start, start + len(tokens))
        ids = torch.zeros(len(new), width, dtype=torch.long)
        for row, tokens in enumerate(new):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        step = torch.arange(width, device=self.device)
        positions = (self.visible + places)[:, None, None] + step
        if int(positions.max()) >= len(self.model.cosine):
            self.model._rotary(2 * int(positions.max()) + 2)
        # a padding token sees itself, so that no row of the softmax is empty; nothing sees it later
        slots = torch.arange(end, device=self.device)
        seen = (self.valid[:, None, :end] & (slots <= start + step[:, None])) | (slots == start + step[:, None])
        self.computed, self.passes = self.computed + sum(map(len, new)), self.passes + 1
        return self.model.hidden(ids, self.cache, positions=positions, attend=self._attention(seen))

    def _grow(self, capacity: int) -> None:
        old, self.cache = self.cache, self.model.cache(len(self.rows), capacity)
        for new, was in ((self.cache.keys, old.keys), (self.cache.values, old.values)):
            new[:, :, :, : old.length] = was[:, :, :, : old.length]
        self.cache.length = old.length
        valid, self.valid = self.valid, torch.zeros(len(self.rows), capacity, dtype=torch.bool, device=self.device)
        self.valid[:, : valid.shape[1]] = valid

    def _attention(self, seen: torch.Tensor) -> Attention:
        """Attention to the prefix and to the row's own slots, of which `seen`, (rows, new, own), are visible."""
        rows, new, _ = seen.shape
        wide = new > NARROW
        if wide:  # many queries: torch's blocked kernel over prefix and own slots, put together once a layer
            prefix = torch.arange(self.prefix.length, device=self.device) < self.visible[:, None]
            seen = torch.cat([prefix[:, None].expand(-1, new, -1), seen], -1)
        bias = torch.zeros(seen.shape, dtype=self.cache.keys.dtype, device=self.device)
        bias = bias.masked_fill_(~seen, -torch.inf)[:, None].repeat(1, 1, self.model.heads // self.model.kv_heads, 1)
        hidden = torch.arange(self.prefix.length, device=self.device) >= self.visible[:, None]
        hidden = hidden[:, None, None] if hidden.any() else None

        def whole(number: int, q: torch.Tensor, length: int) -> torch.Tensor:
            pairs = ((self.prefix.keys, self.cache.keys), (self.prefix.values, self.cache.values))
            keys, values = (torch.cat([shared[number].expand(rows, -1, -1, -1), own[number, :, :, :length]], 2)
                            for shared, own in pairs)  # fmt: skip
            return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)

        def split(number: int, q: torch.Tensor, length: int) -> torch.Tensor:
            """Few queries: the prefix is not copied, against it all rows are one matrix product."""
            rows, heads, queries, width = q.shape
            keys, values = self.cache.keys[number, :, :, :length], self.cache.values[number, :, :, :length]
            q = q * width**-0.5
            flat = q.transpose(0, 1).reshape(heads, rows * queries, width)
            shared = (flat @ self.prefix.keys[number].mT).view(heads, rows, queries, -1).transpose(0, 1)
            shared = shared if hidden is None else shared.masked_fill(hidden, -torch.inf)
            weights = torch.cat([shared, q @ keys.mT + bias], -1).float().softmax(-1).to(q.dtype)
            shared, own = weights.split([self.prefix.length, length], -1)
            flat = shared.transpose(0, 1).reshape(heads, rows * queries, -1) @ self.prefix.values[number]
            return flat.view(heads, rows, queries, width).transpose(0, 1) + own @ values

        return whole if wide else split
