"""Quantising a Llama: its blocks walked on real text, what each rounding costs, and its packed form decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from workbook import plotting
from workbook.models.lm import Llama
from workbook.study import Measured

Key = tuple[int, str]  # (number of a block, name of a matrix)

# the matrices of a block, projections of the same input as one, named as workbook.models.lm.Layer names them
MATRICES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "out": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


def fused_weight(block, matrix: str) -> torch.Tensor:
    """One weight (N, K) of all projections in MATRICES[matrix] of a transformers Llama block."""
    return torch.cat([block.get_submodule(name).weight.detach() for name in MATRICES[matrix]])


def install(block, matrix: str, weight: torch.Tensor) -> None:
    """Write a fused weight (N, K) back into its projections."""
    parts = [block.get_submodule(name).weight for name in MATRICES[matrix]]
    for part, new in zip(parts, weight.split([len(part) for part in parts]), strict=True):
        part.data.copy_(new)


@torch.inference_mode()
def through(model, block, states: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """Hidden states (1, tokens, width) of each text behind one block, from those in front of it."""
    after = []
    for state in states:
        rotary = model.model.rotary_emb(state, torch.arange(state.shape[1], device=state.device)[None])
        result = block(state, attention_mask=None, position_embeddings=rotary)  # no mask: causal
        after.append(result if torch.is_tensor(result) else result[0])
    return after


def hessians(model, block, states: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """H = 2/n sum x x^T, (K, K), of what enters each matrix of a block, over the n tokens of all texts."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []
    for matrix, (first, *_) in MATRICES.items():

        def collect(_module, arguments, matrix=matrix):
            x = arguments[0].flatten(0, -2)
            sums[matrix] = sums.get(matrix, 0) + x.T @ x

        hooks.append(block.get_submodule(first).register_forward_pre_hook(collect))
    try:
        through(model, block, states)
    finally:
        for hook in hooks:
            hook.remove()
    return {matrix: 2 * total / sum(state.shape[1] for state in states) for matrix, total in sums.items()}


def walk(
    model,
    texts: Iterable[torch.Tensor],
    round_matrix: Callable[[Key, torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    blocks: int,
) -> dict[Key, torch.Tensor]:
    """Round the first blocks of a transformers Llama in order, and return their weights as they were.

    texts: token ids, (length,) each. round_matrix(key, weight, hessian) gives the weight that takes its place,
    and the next block's Hessians are of inputs that come from it. The model keeps the rounded weights.
    """
    states, originals = [model.model.embed_tokens(text[None]).detach() for text in texts], {}
    for number in tqdm(range(blocks), desc="blocks", mininterval=2):
        block = model.model.layers[number]
        for matrix, hessian in hessians(model, block, states).items():
            weight = originals[number, matrix] = fused_weight(block, matrix)
            install(block, matrix, round_matrix((number, matrix), weight, hessian))
        states = through(model, block, states)
    return originals


def install_all(model, weights: Mapping[Key, torch.Tensor]) -> None:
    """Write fused weights into their blocks."""
    for (number, matrix), weight in weights.items():
        install(model.model.layers[number], matrix, weight)


@torch.inference_mode()
def surprise(
    model, texts: torch.Tensor, variants: Mapping[str, Callable[[Key], torch.Tensor]], keys: Iterable[Key]
) -> pd.DataFrame:
    """Mean negative log-likelihood a token, in nats: one row a text, one column a variant of the weights.

    texts: token ids (texts, length); variants: by name, what gives the weight of each key.
    """
    keys, columns = list(keys), {}
    for name, weight in variants.items():
        install_all(model, {key: weight(key) for key in keys})
        columns[name] = [model(input_ids=text[None], labels=text[None]).loss.item() for text in texts]
    return pd.DataFrame(columns)


def with_linears(llama: Llama, make: Callable[[Key], Callable[[torch.Tensor], torch.Tensor]]) -> Llama:
    """A copy of a Llama in which make((block, matrix)) stands in place of each Linear."""
    changed = copy.copy(llama)
    changed.layers = [
        replace(layer, **{matrix: make((number, matrix)) for matrix in MATRICES})
        for number, layer in enumerate(llama.layers)
    ]
    return changed


def greedy_steps(llama: Llama, tokens: torch.Tensor, steps: int) -> Callable[[], None]:
    """The call to time: greedy decoding of `steps` tokens behind a prompt (batch, n), which is read beforehand."""
    cache = llama.cache(len(tokens), tokens.shape[1] + steps)
    first = llama(tokens, cache, last=True).argmax(-1)

    def call():
        cache.crop(tokens.shape[1])
        token = first
        for _ in range(steps):
            token = llama(token, cache).argmax(-1)

    return call


def optimal_brain_quantiser(
    weight: torch.Tensor, hessian: torch.Tensor, group: int, *, scale: Callable, quantise: Callable
) -> torch.Tensor:
    """Codes (N, K) by GPTQ's definition, in cubic time for each input (Frantar and Alistarh 2022, in fixed order).

    Round input i, let all later inputs make up for its error, and remove i from the inverse Hessian. hessian: (K, K),
    already damped; scale(max|w|) and quantise(w, s): the grid, with codes 0 to 15 that stand for (q - 8) s.
    """
    w, inverse, codes = weight.clone(), torch.linalg.inv(hessian), torch.empty_like(weight)
    for i in range(w.shape[1]):
        if i % group == 0:
            s = scale(w[:, i : i + group].abs().amax(1))
        codes[:, i] = quantise(w[:, i], s)
        error = (w[:, i] - (codes[:, i] - 8) * s) / inverse[i, i]
        w -= torch.outer(error, inverse[i])
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return codes


def draw_quality(errors: pd.DataFrame, rises: Mapping[str, Measured], rates: pd.DataFrame, *, blocks: str):
    """Left: output error by group size. Middle: perplexity against the model before. Right: tokens a second.

    errors: columns group, rule, percent; rises: rise of perplexity in percent by rule; rates: tokens a second, one row
    a batch, one column a model; blocks: how many were rounded, in words.
    """
    fig, (left, middle, right) = plotting.panels(3, size=(12.6, 4.2), width_ratios=[1.2, 0.95, 1.3])
    for index, (rule, values) in enumerate(errors.groupby("rule", sort=False)):
        plotting.line_with_interval(left, values, x="group", y="percent", index=index, label=rule)
    plotting.label(left, "Inputs that share a scale", "Squared output error of gate and up, block 0 (%)", log="x")
    plotting.plain_ticks(left.xaxis, sorted(errors.group.unique()))
    left.set_ylim(0)
    plotting.label_ends(left, room=0.5)
    middle.axhline(0, color=plotting.GREY, linewidth=1)
    for index, (rule, rise) in enumerate(rises.items()):
        interval, look = (
            [[rise.value - rise.low], [rise.high - rise.value]],
            plotting.look(index) | {"linestyle": "none"},
        )
        middle.errorbar(rule.replace(" + ", " +\n"), rise.value, interval, capsize=4, markersize=8, **look)
        middle.annotate(
            f"{rise.value:.1f}", (index, rise.value), xytext=(9, -3), textcoords="offset points", fontsize=8.5
        )
    middle.set_xlim(-0.5, len(rises) - 0.3)
    plotting.label(middle, f"Rule ({blocks} blocks rounded)", "Rise of perplexity (%)")
    middle.grid(axis="x", visible=False)
    width = 0.84 / rates.shape[1]
    for index, name in enumerate(rates):
        places = np.arange(len(rates)) + width * (index - (rates.shape[1] - 1) / 2)
        hatch = ["", "///", "--", "xx"][index % 4]
        bars = right.bar(
            places, rates[name], width, color=plotting.COLOURS[index], hatch=hatch, edgecolor="white", label=name
        )
        right.bar_label(bars, fmt="%.0f", fontsize=7.5, padding=1)
    right.set_xticks(range(len(rates)), rates.index)
    right.set_ylim(0, 1.3 * rates.max().max())
    right.grid(axis="x", visible=False)
    right.legend(fontsize=8, loc="upper left", ncols=2)
    plotting.label(right, "Sequences decoded together", "Tokens a second, SmolLM2")
    return fig
