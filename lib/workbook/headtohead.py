"""Decoders side by side: the workbook's own and transformers', on the same prompts, interleaved in one run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from workbook import decoding, measure
from workbook.chance import Chance
from workbook.models.lm import Llama
from workbook.verifiers import Verifier

PHASES = ("prefill", "draft", "verify", "select", "whole")  # whole: of a decoder that cannot be split
Decoder = Callable[[list[int], Sequence[int]], dict]  # (prompt, entropy of its random draws) -> counts and seconds


def speculative_decoder(
    target: Llama, draft: Llama, verifier: Verifier, drafts: int, length: int, **settings
) -> Decoder:
    """`decoding.decode` with a verifier as a decoder; settings: new_tokens, temperature, top_p, propose."""

    def run(prompt: list[int], entropy: Sequence[int]) -> dict:
        trace = decoding.decode(
            target, draft, prompt, verifier=verifier, drafts=drafts, length=length, chance=Chance(entropy), **settings
        )
        return {"tokens": sum(trace.emitted), "target_calls": trace.target_calls, **trace.seconds}

    return run


def plain_decoder(target: Llama, **settings) -> Decoder:
    """`decoding.decode_plain` as a decoder; settings: new_tokens, temperature, top_p."""

    def run(prompt: list[int], entropy: Sequence[int]) -> dict:
        trace = decoding.decode_plain(target, prompt, chance=Chance(entropy), **settings)
        return {"tokens": len(trace.tokens), "target_calls": trace.target_calls, **trace.seconds}

    return run


def transformers_decoder(
    model, *, new_tokens: int, temperature: float, top_p: float, pad_token_id: int, **options
) -> Decoder:
    """`model.generate` as a decoder; target calls are counted by a hook. options: assistant_model and the like.

    The end of a text is a token like any other here (`eos_token_id` None), as it is for the workbook's decoders.
    """
    for each in (model, options.get("assistant_model")):
        if each is not None:
            each.generation_config.eos_token_id = None

    def run(prompt: list[int], entropy: Sequence[int]) -> dict:
        calls = []
        hook = model.register_forward_hook(lambda *_: calls.append(1))
        torch.manual_seed(int(np.random.default_rng(entropy).integers(2**31)))
        ids = torch.tensor([prompt], device=model.device)
        start = time.perf_counter()
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=True,
            temperature=temperature,
            top_k=0,
            top_p=top_p,
            max_new_tokens=new_tokens,
            pad_token_id=pad_token_id,
            **options,
        )
        seconds = time.perf_counter() - start
        hook.remove()
        return {"tokens": output.shape[1] - ids.shape[1], "target_calls": len(calls), "whole": seconds}

    return run


def compare(decoders: Mapping[str, Decoder], prompts: Sequence[list[int]], *, repeats: int, seed: int) -> pd.DataFrame:
    """Run every decoder on every prompt, one after the other, every other time in reverse order.

    Returns one row a decoder, prompt and repeat: tokens, target_calls, seconds in all and by phase, seconds_a_token.
    """
    rows = []
    for run in decoders.values():
        run(list(prompts[0]), [seed, 999])  # warm-up
    with tqdm(total=repeats * len(prompts) * len(decoders), desc="decoding", mininterval=2) as progress:
        for repeat, (number, prompt) in product(range(repeats), enumerate(prompts)):
            order = list(decoders) if (repeat + number) % 2 == 0 else list(decoders)[::-1]
            for name in order:
                result = decoders[name](list(prompt), [seed, repeat, number])
                phases = {phase: result.get(phase, 0.0) for phase in PHASES}
                total = sum(phases.values())
                counts = {"tokens": result["tokens"], "target_calls": result["target_calls"]}
                names = {"decoder": name, "prompt": number, "repeat": repeat}
                progress.update()
                rows.append(names | counts | phases | {"seconds": total, "seconds_a_token": total / result["tokens"]})
    return pd.DataFrame(rows)


def pass_costs(
    model: Llama, shapes: Sequence[tuple[int, int]], *, context: Sequence[int], repeats: int
) -> dict[tuple[int, int], float]:
    """Median seconds of one forward pass for each (batch, new tokens) behind `context`, measured interleaved."""
    tasks = {}
    for batch, new in shapes:
        cache = model.cache(batch, len(context) + new)
        model.hidden(torch.tensor([list(context)]).expand(batch, -1), cache)

        def task(batch=batch, new=new, cache=cache):
            model(torch.ones((batch, new), dtype=torch.long), cache)
            cache.crop(len(context))

        tasks[batch, new] = task
    return measure.interleaved(tasks, repeats=repeats).groupby("name").seconds.median().to_dict()


@torch.inference_mode()
def real_pairs(
    target: Llama,
    draft: Llama,
    prompts: Sequence[list[int]],
    count: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`count` pairs of next-token laws (target, draft), each (V,), along texts that the target writes itself."""
    pairs, each = [], -(-count // len(prompts))
    for number, prompt in enumerate(prompts):
        chance = Chance([seed, number])
        written = decoding.decode_plain(
            target, prompt, new_tokens=each, chance=chance, temperature=temperature, top_p=top_p
        )
        tokens = torch.tensor([[*prompt, *written.tokens[:-1]]])
        laws = []
        for model in (target, draft):
            states = model.hidden(tokens, model.cache(1, tokens.shape[1]))[0, -each:]
            laws.append(decoding.probabilities(model.logits(states).cpu(), temperature, top_p))
        if draft.vocabulary is not None:
            restricted, laws[1] = laws[1], np.zeros_like(laws[0])
            laws[1][:, draft.vocabulary] = restricted
        pairs += zip(*laws, strict=True)
    return pairs[:count]
