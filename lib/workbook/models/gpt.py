"""A family of five tiny Llamas that evaluate chains of arithmetic, one step a line, and the problems they solve.

The family copies the proportions that matter in Qwen3: every size has the same head width and the same number of KV
heads, so that the KV cache grows with depth alone while the parameters grow with width squared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from workbook.models.lm import Attention, KVCache, Llama

MODULUS = 97
MAX_STEPS = 12
FACTORS = (2, 3, 4, 5)  # what a multiplication may multiply by; sums and differences take 1 to 9
OPERATIONS = "+-*"
VOCABULARY = "0123456789+-*=|\n>." + "abcdefghijkl"
_ID = {character: number for number, character in enumerate(VOCABULARY)}
STOP = _ID["."]


@dataclass(frozen=True)
class Size:
    """Shape of one member of the family."""

    name: str
    width: int
    layers: int
    heads: int
    kv_heads: int = 2
    head_dim: int = 16

    @property
    def parameters(self) -> int:
        """Weights, embedding and output head included."""
        attention = 2 * self.width * (self.heads + self.kv_heads) * self.head_dim
        block = attention + 3 * self.width * 2 * self.width + 2 * self.width
        return self.layers * block + 2 * len(VOCABULARY) * self.width + self.width

    @property
    def dimensions(self) -> tuple[int, int, int, int, int]:
        """Parameters, layers, query heads, KV heads, head width: what a cost model asks for."""
        return self.parameters, self.layers, self.heads, self.kv_heads, self.head_dim


SIZES = {
    1: Size("gpt_chain_1", 28, 3, 4),
    2: Size("gpt_chain_2", 32, 3, 4),
    3: Size("gpt_chain_3", 48, 4, 4),
    4: Size("gpt_chain_4", 64, 4, 4),
    5: Size("gpt_chain_5", 96, 5, 6),
}


def config(size: int):
    """The transformers LlamaConfig of member `size`, 1 (smallest) to 5."""
    from transformers import LlamaConfig

    shape = SIZES[size]
    return LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.width,
        intermediate_size=2 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=256,
        initializer_range=shape.width**-0.5,
        bos_token_id=None,
        eos_token_id=STOP,
        use_cache=False,
    )


def build(size: int, *, seed: int = 0):
    """A freshly initialised LlamaForCausalLM of the family, to be trained."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(config(size))


def load(size: int) -> Llama:
    """The trained member `size` as a lean forward pass; data.DataError if its checkpoint is missing or changed."""
    from workbook import checkpoints

    return Llama.from_transformers(checkpoints.restore(build(size), SIZES[size].name))


def encode(text: str) -> torch.Tensor:
    """Token ids of a text, shape (len(text),)."""
    return torch.tensor([_ID[character] for character in text])


def decode(tokens) -> str:
    """The text of token ids."""
    return "".join(VOCABULARY[int(token)] for token in tokens)


@dataclass(frozen=True)
class Problems:
    """Problems of one length: prompt (n, 3 k + 4), the one right solution (n, 7 k + 4), answer (n,)."""

    prompt: torch.Tensor
    solution: torch.Tensor
    answer: np.ndarray

    @property
    def steps(self) -> int:
        """Operations k in every chain."""
        return (self.prompt.shape[1] - 4) // 3


def problems(count: int, steps: int, rng: np.random.Generator) -> Problems:
    """`count` random chains of `steps` operations modulo 97.

    A prompt lists the steps, counting down, then the start: "b+5a*3|17\\n" (17 + 5, then times 3).
    Its solution writes one step a line and then the answer: "b+5=22\\na*3=66\\n>66.".
    """
    if not 1 <= steps <= MAX_STEPS:
        raise ValueError(f"steps = {steps}: a chain has 1 to {MAX_STEPS} operations.")
    digits = np.arange(10)
    value = rng.integers(MODULUS, size=count)
    operation = rng.integers(3, size=(count, steps))
    operand = np.where(
        operation == 2, rng.choice(FACTORS, size=(count, steps)), rng.integers(1, 10, size=(count, steps))
    )
    labels = np.broadcast_to([_ID["abcdefghijkl"[steps - 1 - i]] for i in range(steps)], (count, steps))
    signs = operation + _ID["+"]
    column = lambda character: np.full((count, 1), _ID[character])  # noqa: E731
    two = lambda number: np.stack([digits[number // 10], digits[number % 10]], axis=1)  # noqa: E731
    listed = np.stack([labels, signs, operand], axis=2).reshape(count, -1)
    prompt = np.concatenate([listed, column("|"), two(value), column("\n")], axis=1)
    lines = []
    for step in range(steps):
        b = operand[:, step]
        value = np.choose(operation[:, step], [value + b, value - b, value * b]) % MODULUS
        lines += [listed[:, 3 * step : 3 * step + 3], column("="), two(value), column("\n")]
    solution = np.concatenate([*lines, column(">"), two(value), column(".")], axis=1)
    return Problems(torch.from_numpy(prompt), torch.from_numpy(solution), value)


@torch.inference_mode()
def sample(
    model: Llama,
    prompt: torch.Tensor,
    seed: int,
    *,
    attention: Callable[[KVCache], Attention | None] | None = None,
    temperature: float = 1.0,
    most: int = 96,
) -> np.ndarray:
    """Continue prompts, shape (rows, length), until all rows have written "." or `most` tokens.

    attention: called once with the cache that holds the prompts, it gives the attention of every further step.
    Returns the generated ids, numpy (rows, written); what follows a row's first "." means nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    cache = model.cache(len(prompt), -(-(prompt.shape[1] + most) // 16) * 16)  # whole pages of 16 tokens
    logits = model(prompt, cache, last=True)[:, 0]
    attend = attention(cache) if attention else None
    written, done = [], torch.zeros(len(prompt), dtype=torch.bool)
    while len(written) < most:
        token = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        written.append(token)
        done |= token[:, 0] == STOP
        if done.all():
            break
        logits = model(token, cache, attend=attend)[:, 0]
    return torch.cat(written, dim=1).numpy()


def lengths(tokens: np.ndarray) -> np.ndarray:
    """Tokens that each text spends, its full stop included; all of them where there is no full stop."""
    stopped = np.asarray(tokens) == STOP
    return np.where(stopped.any(1), stopped.argmax(1) + 1, stopped.shape[1])


def answers(model: Llama, sets: list[Problems], samples: int, seed: int, **options) -> tuple[np.ndarray, np.ndarray]:
    """Answer every problem of every set `samples` times: (lengths, right), each (problems, samples).

    options: of `sample`. A text is right if the number between ">" and "." is.
    """
    spent, right = [], []
    for number, problems in enumerate(sets):
        written = sample(model, problems.prompt.repeat_interleave(samples, 0), seed + number, **options)
        stated = final_answers(written) == problems.answer.repeat(samples)
        spent.append(lengths(written).reshape(-1, samples))
        right.append(stated.reshape(-1, samples))
    return np.concatenate(spent), np.concatenate(right)


def final_answers(tokens: np.ndarray) -> np.ndarray:
    """The answers that generated texts state, shape (n,): the two digits in ">58."; -1 for a text that has no such end.

    tokens: (n, length) ids; what follows the first full stop of a text is not read.
    """
    tokens = np.asarray(tokens)
    stopped = tokens == STOP
    end = np.where(stopped.any(1), stopped.argmax(1), 0)
    mark, tens, ones = (tokens[np.arange(len(tokens)), np.maximum(end - back, 0)] for back in (3, 2, 1))
    stated = (end >= 3) & (mark == _ID[">"]) & (tens < 10) & (ones < 10)
    return np.where(stated, 10 * tens + ones, -1)
