"""A family of five tiny Llamas that evaluate chains of arithmetic, one step a line, and the problems they solve.

The family copies the proportions that matter in Qwen3: every size has the same head width and the same number of KV
heads, so that the KV cache grows with depth alone while the parameters grow with width squared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from workbook.models.lm import Llama

MODULUS = 97
MAX_STEPS = 12
FACTORS = (2, 3)  # what a multiplication may multiply by; sums and differences take 1 to 9
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


SIZES = {
    1: Size("gpt_chain_1", 32, 2, 2),
    2: Size("gpt_chain_2", 48, 3, 4),
    3: Size("gpt_chain_3", 64, 4, 4),
    4: Size("gpt_chain_4", 96, 5, 6),
    5: Size("gpt_chain_5", 128, 6, 8),
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
    """The trained member `size` as a lean forward pass. Raises data.DataError when its checkpoint is missing or changed."""
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


def final_answers(tokens: np.ndarray) -> np.ndarray:
    """The answers that generated texts state, shape (n,): the two digits between ">" and "."; -1 where there is none.

    tokens: (n, length) ids, padded behind the full stop with anything.
    """
    tokens = np.asarray(tokens)
    stated = np.full(len(tokens), -1)
    for row, line in enumerate(tokens):
        marks = np.flatnonzero(line == _ID[">"])
        if len(marks) and marks[0] + 3 < len(line):
            tens, ones, stop = line[marks[0] + 1 : marks[0] + 4]
            if tens < 10 and ones < 10 and stop == STOP:
                stated[row] = 10 * tens + ones
    return stated
