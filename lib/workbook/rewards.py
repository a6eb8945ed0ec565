"""Reward models: what scores an answer without knowing the right one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from workbook import answers
from workbook.models.lm import Llama


def self_reward(
    model: Llama,
    prefix: answers.Prefix,
    encode: Callable[[str], list[int]],
    questions: Sequence[Sequence[int]],
    texts: NDArray,
    *,
    asks: str = "\nCorrect:",
    replies: tuple[str, str] = (" yes", " no"),
) -> NDArray:
    """Log-odds with which the model, behind worked judgements, calls each answer correct: a reward for best-of-n.

    encode: text to token ids; texts: (questions, samples), equal answers are judged once; asks: what follows an answer;
    replies: how a judgement begins. Returns (questions, samples).
    """
    several = [list(dict.fromkeys(row)) for row in texts]
    shown = [[encode(f" {text}{asks}") for text in row] for row in several]
    yes, no = (encode(reply)[0] for reply in replies)
    logits = answers.next_logits(model, answers.read_answers(model, prefix, questions, shown))
    odds = iter((logits[:, yes] - logits[:, no]).tolist())
    known = [{text: next(odds) for text in row} for row in several]
    return np.array([[found[text] for text in row] for found, row in zip(known, texts, strict=True)])
