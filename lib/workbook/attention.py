"""Attention control: the branches of one batch look at one another inside a U-Net of diffusers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional


class AttentionControl:
    """Lets the branches of a batch share attention: an attention processor of diffusers, in force inside a `with`.

    unet: a UNet2DConditionModel; count: canvases of each branch; branches: names of the parts of the batch, in order;
    parts that follow them are "null".
    A subclass says what is shared: `share_self` and `share_cross` get the names of all parts of the batch, `rows`.
    """

    def __init__(self, unet: torch.nn.Module, count: int, branches: Sequence[str]):
        self.unet, self.count, self.branches, self.share = unet, count, list(branches), 0.0
        self.maps: list[torch.Tensor] = []  # of this step: cross-attention (rows, n, places, tokens), over heads

    def __enter__(self) -> AttentionControl:
        self._saved = self.unet.attn_processors
        self.unet.set_attn_processor(self)
        return self

    def __exit__(self, *_) -> None:
        self.unet.set_attn_processor(self._saved)

    def begin(self, share: float) -> None:
        """A step begins; with it the first `share` of all steps will be done."""
        self.share, self.maps = share, []

    def share_self(self, q, k, v, rows):
        """Queries, keys and values of self-attention, each (rows, n, heads, places, width), as they shall be used."""
        return q, k, v

    def share_cross(self, maps, rows):
        """Cross-attention maps, (rows, n, heads, places, tokens), as they shall be used."""
        return maps

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """One attention layer on hidden_states (batch, places, width); cross-attention with encoder_hidden_states."""
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        rows = [*self.branches, *["null"] * (len(hidden_states) // self.count - len(self.branches))]
        q, k, v = (
            part.unflatten(-1, (attn.heads, -1)).unflatten(0, (len(rows), self.count)).transpose(2, 3)
            for part in (attn.to_q(hidden_states), attn.to_k(context), attn.to_v(context))
        )
        if encoder_hidden_states is None:
            q, k, v = self.share_self(q, k, v, rows)
        maps = (attn.scale * q @ k.transpose(-1, -2)).softmax(-1)
        if encoder_hidden_states is not None:
            maps = self.share_cross(maps, rows)
            self.maps.append(maps.mean(2))
        return attn.to_out[0]((maps @ v).transpose(2, 3).flatten(0, 1).flatten(2))

    def highlight(self, row: int, words: torch.Tensor) -> torch.Tensor:
        """Where `words`, bool (n, tokens), draw attention in this step, at most 1, shape (n, 1, 32, 64)."""
        total = 0.0
        for maps in self.maps:
            places = (maps[row] * words[:, None]).sum(-1)
            part = places.unflatten(1, (-1, 2 * round((places.shape[1] / 2) ** 0.5)))[:, None]
            total = total + functional.interpolate(part, (32, 64), mode="bilinear")
        return total / total.amax((1, 2, 3), keepdim=True)
