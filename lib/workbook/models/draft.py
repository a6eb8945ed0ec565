"""The draft of SmolLM2: two narrow layers under the target's own embedding, a head over part of its vocabulary."""

from __future__ import annotations

import copy

import torch
from torch import nn

from workbook import checkpoints
from workbook.models.lm import Llama


class RestrictedHead(nn.Module):
    """The rows `vocabulary` of a tied output head, with minus infinity for every other token.

    It gives transformers a model over the whole vocabulary at the cost of the part.
    """

    def __init__(self, weight: torch.Tensor, vocabulary: torch.Tensor):
        super().__init__()
        self.register_buffer("rows", weight[vocabulary].clone())
        self.register_buffer("vocabulary", vocabulary)
        self.size = len(weight)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., hidden) -> (..., V)."""
        logits = hidden.new_full((*hidden.shape[:-1], self.size), float("-inf"))
        logits[..., self.vocabulary] = nn.functional.linear(hidden, self.rows)
        return logits


def new_draft(target, *, layers: tuple[int, ...] = (0, 29), width: int = 1024):
    """A LlamaForCausalLM with copies of the target's `layers`, its feed-forward parts cut to `width` units.

    The kept units are those with the largest product of input and output norms. Embedding and head are the target's.
    """
    config = copy.deepcopy(target.config)
    config.num_hidden_layers, config.intermediate_size = len(layers), width
    draft = type(target)(config)
    draft.model.embed_tokens, draft.lm_head = target.model.embed_tokens, target.lm_head
    draft.model.norm.load_state_dict(target.model.norm.state_dict())
    for block, number in zip(draft.model.layers, layers, strict=True):
        source = target.model.layers[number]
        norms = (
            source.mlp.gate_proj.weight.norm(dim=1)
            * source.mlp.up_proj.weight.norm(dim=1)
            * source.mlp.down_proj.weight.norm(dim=0)
        )
        units = norms.topk(width).indices
        state = source.state_dict()
        for part in ("gate", "up"):
            state[f"mlp.{part}_proj.weight"] = state[f"mlp.{part}_proj.weight"][units]
        state["mlp.down_proj.weight"] = state["mlp.down_proj.weight"][:, units]
        block.load_state_dict(state)
    return draft


def own_weights(draft) -> dict[str, torch.Tensor]:
    """The weights that training changes: blocks and final norm, without the target's embedding."""
    return {name: weight for name, weight in draft.model.state_dict().items() if not name.startswith("embed_tokens")}


def load_draft(target, *, name: str = "draft_smollm2", vocabulary: int | None = None):
    """The shipped draft for `target` (a transformers model) as (LlamaForCausalLM, lean Llama).

    vocabulary: how many of the head's tokens to keep, most frequent first; default all that it was trained with.
    """
    weights = checkpoints.load(name)
    kept = weights.pop("vocabulary").long()[:vocabulary]
    width = weights["layers.0.mlp.down_proj.weight"].shape[1]
    layers = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("layers."))
    draft = new_draft(target, layers=(0,) * layers, width=width)
    draft.model.load_state_dict(weights, strict=False)
    rows = draft.lm_head.weight.detach()
    lean = Llama.from_transformers(draft, head=rows[kept], vocabulary=kept.numpy())
    draft.lm_head = RestrictedHead(rows, kept)
    return draft.eval().requires_grad_(False), lean
