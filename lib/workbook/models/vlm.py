"""A small vision-language model that answers questions about mosaics of Fashion-MNIST pictures.

A frozen convolutional stem (the shipped classifier's) turns each picture into 16 image tokens; a six-layer Llama reads
them, tile by tile, and then a question of four words. Three tasks: which class is at a place, how many pictures there
are of a class, and which row shows a class first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from workbook.data import FASHION_MNIST_CLASSES
from workbook.models.lm import Llama

TILE = 16  # image tokens a picture
CHANNELS = 128  # width of the stem's features
LARGEST = 4  # largest number of pictures a side
QUESTION = 4  # words in a question, the mark before the answer included
TASKS = ("what", "count", "where")
WORDS = (
    *TASKS,
    "answer:",
    *(f"row {i}" for i in range(LARGEST)),
    *(f"column {i}" for i in range(LARGEST)),
    *FASHION_MNIST_CLASSES,
    *(str(i) for i in range(LARGEST**2 + 1)),
    "-",
)
ANSWER, ROW, COLUMN, CLASS, NUMBER, BLANK = 3, 4, 8, 12, 22, 39


def build_stem() -> nn.Module:
    """The convolutional stages of the shipped classifier, frozen: pictures (n, 1, 32, 32) to maps (n, 128, 4, 4)."""
    from workbook import checkpoints
    from workbook.models.classifier import Classifier

    return checkpoints.restore(Classifier(), "clf_fmnist").stages


@torch.inference_mode()
def features(stem: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    """Image tokens of pictures (n, 1, 32, 32) in [-1, 1] before projection: float16, (n, 16, 128)."""
    parts = [stem(part).flatten(2).mT.half() for part in pictures.split(500)]
    return torch.cat(parts)


@dataclass(frozen=True)
class Questions:
    """Questions about mosaics.

    tiles: (n, g, g), numbers of the pictures; words: (n, questions, 4), ids; answers: (n, questions), ids of words;
    kinds: (n, questions), numbers of the tasks; targets: (n, questions), the tile asked for (task "what"), else -1.
    """

    tiles: torch.Tensor
    words: torch.Tensor
    answers: torch.Tensor
    kinds: torch.Tensor
    targets: torch.Tensor


def ask(
    labels: np.ndarray, count: int, grid: int, questions: int, rng: np.random.Generator, *, task: str | None = None
) -> Questions:
    """`count` random mosaics of grid x grid pictures and `questions` about each, all of one task or mixed.

    labels: classes of the pictures to draw from. Half of the classes that "count" asks for are in the mosaic for sure.
    Raises ValueError for an unknown task or a grid out of 2 to 4.
    """
    if not 2 <= grid <= LARGEST:
        raise ValueError(f"grid = {grid}: a mosaic has 2 to {LARGEST} pictures a side.")
    if task is not None and task not in TASKS:
        raise ValueError(f"task = {task!r} is none of {', '.join(TASKS)}.")
    tiles = rng.integers(len(labels), size=(count, grid, grid))
    classes = labels[tiles].reshape(count, 1, grid**2)
    shape = (count, questions)
    kind = rng.integers(3, size=shape) if task is None else np.full(shape, TASKS.index(task))
    place = rng.integers(grid**2, size=shape)
    shown = np.take_along_axis(classes[:, 0], place, axis=1)
    wanted = np.where((kind == 1) & (rng.random(shape) < 0.5), rng.integers(10, size=shape), shown)
    hits = classes == wanted[..., None]
    words = np.stack(
        [
            kind,
            np.where(kind == 0, ROW + place // grid, CLASS + wanted),
            np.where(kind == 0, COLUMN + place % grid, BLANK),
            np.full(shape, ANSWER),
        ],
        axis=2,
    )
    answers = np.choose(kind, [CLASS + shown, NUMBER + hits.sum(2), ROW + hits.argmax(2) // grid])
    targets = np.where(kind == 0, place, -1)
    return Questions(*map(torch.from_numpy, (tiles, words, answers, kind, targets)))


class MosaicVLM(nn.Module):
    """Projection of image tokens and a Llama. An image token carries the very words "row i" and "column j" that a
    question uses, and a learned place inside its picture."""

    def __init__(self, width: int = 128, layers: int = 6, heads: int = 4):
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=1024,
            initializer_range=width**-0.5,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.norm = nn.LayerNorm(CHANNELS)
        self.project = nn.Linear(CHANNELS, width)
        self.place = nn.Parameter(torch.randn(TILE, width) * width**-0.5)
        self.llama = LlamaForCausalLM(config)

    def image_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Embeddings (n, g * g * 16, width) of the stem's features (n, g, g, 16, 128), tile after tile."""
        grid, words = tokens.shape[1], self.llama.model.embed_tokens.weight
        rows, columns = words[ROW : ROW + grid], words[COLUMN : COLUMN + grid]
        where = (rows[:, None] + columns)[:, :, None] + self.place
        return (self.project(self.norm(tokens.float())) + where).flatten(1, 3)

    def prompts(self, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Embeddings of image and one question each: (n, g, g, 16, 128) and (n, 4) to (n, g * g * 16 + 4, width)."""
        return torch.cat([self.image_tokens(tokens), self.llama.model.embed_tokens(words)], dim=1)

    def forward(self, tokens: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Logits (n, questions, words) of all answers at once; a question sees the image and itself alone.

        tokens: (n, g, g, 16, 128); words: (n, questions, 4). Every question stands right behind the image.
        """
        image = self.image_tokens(tokens)
        n, seen = image.shape[:2]
        asked = words.shape[1] * QUESTION
        x = torch.cat([image, self.llama.model.embed_tokens(words.flatten(1))], dim=1)
        number = torch.cat([torch.full((seen,), -1), torch.arange(words.shape[1]).repeat_interleave(QUESTION)])
        mask = torch.ones(seen + asked, seen + asked, dtype=torch.bool).tril()
        mask &= (number == -1) | (number[:, None] == number)
        positions = torch.cat([torch.arange(seen), seen + torch.arange(QUESTION).repeat(words.shape[1])])
        states = self.llama.model(
            inputs_embeds=x,
            attention_mask=mask[None, None].to(x.device).expand(n, 1, -1, -1),
            position_ids=positions[None].to(x.device).expand(n, -1),
            use_cache=False,
        ).last_hidden_state
        return self.llama.lm_head(states[:, seen + QUESTION - 1 :: QUESTION])


def load() -> tuple[MosaicVLM, Llama]:
    """The trained model and its lean forward pass; data.DataError if the checkpoint is missing or changed."""
    from workbook import checkpoints

    model = checkpoints.restore(MosaicVLM(), "mosaic_vlm")
    return model, Llama.from_transformers(model.llama)


Mix = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@torch.inference_mode()
def prefill(model: Llama, x: torch.Tensor, mix: Mix, *, start: int = 0) -> torch.Tensor:
    """Run embeddings x (batch, new, hidden), at positions `start` on, through a Llama whose attention is `mix`.

    mix(layer, queries, keys, values) with queries (batch, heads, new, head_dim) and keys, values (batch, kv_heads, new,
    head_dim) of these tokens, rotary positions applied, returns the mixed values, shaped like the queries; what it
    remembers of the keys and values is its own business. Returns the normalised final states, shaped like x.
    """
    batch, new, _ = x.shape
    end = start + new
    if end > len(model.cosine):
        model._rotary(2 * end)
    cosine, sine = model.cosine[start:end], model.sine[start:end]
    half, turned = model.head_dim // 2, model.heads + model.kv_heads
    for number, layer in enumerate(model.layers):
        h = layer.qkv(F.rms_norm(x, x.shape[-1:], layer.input_norm, model.epsilon))
        h = h.view(batch, new, -1, model.head_dim).transpose(1, 2)
        qk = h[:, :turned] * cosine + torch.cat([h[:, :turned, :, half:], h[:, :turned, :, :half]], -1) * sine
        y = mix(number, qk[:, : model.heads], qk[:, model.heads :], h[:, turned:])
        x = x + layer.out(y.transpose(1, 2).reshape(batch, new, -1))
        gate, up = layer.gate_up(F.rms_norm(x, x.shape[-1:], layer.mlp_norm, model.epsilon)).chunk(2, -1)
        x = x + layer.down(F.silu(gate) * up)
    return F.rms_norm(x, x.shape[-1:], model.norm, model.epsilon)
