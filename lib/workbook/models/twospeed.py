"""Chains of sums and products, a text for each role in solving them, and one tiny Llama that was trained on all roles.

A problem is a start of three digits and three to five operations, done from left to right; only the last three digits
of a result are kept: "037*24+5" is 893. An outline lists steps of one digit each: "*3*8+5", or "*4*6+5".
One language model plays every part; the first letter of a text says which:

    D037*24+5|            *3*8+5;              an outline
    Q037*24+5|a*3*8+5;b*4*6+5;|   b;           the outline that promises most
    A037*24+5|037*3;*8|   0.7;                 how hard the last step is; with solutions: A037*24+5|037*3=111;*8|
    R037*24+5|037*3=111;*8=   888;             System 1: the step's result at once
    R037*24+5|037*3=111;*8<   1080810808...>888;    System 2: first a scratchpad, digit by digit
    C037*24+5|            037*3<...>111;*8<...>888;+5<...>893;!    everything in one monologue
    C037*24+5|037*3<...>111;*8<108S    111*8+5;     what is left to do, when the monologue is cut
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import torch

VOCABULARY = "0123456789+-*|;=<>.!DQARCSabcdefgh"
STOP, END = VOCABULARY.index(";"), VOCABULARY.index("!")
MODULUS, VERSIONS = 1000, "abcdefgh"
_ID = {character: number for number, character in enumerate(VOCABULARY)}

Step = tuple[str, int]  # a sign and a digit, or (in problems) a product of digits


def encode(text: str) -> list[int]:
    """Token ids of a text, one a character."""
    return [_ID[character] for character in text]


def decode(tokens) -> str:
    """The text of token ids; negative ids (behind an end) are left out."""
    return "".join(VOCABULARY[token] for token in np.asarray(tokens).tolist() if token >= 0)


def written(steps) -> str:
    """Operations as text: "*24+5"."""
    return "".join(f"{sign}{number}" for sign, number in steps)


def apply(value: int, step: Step) -> int:
    """The last three digits of `value` after one operation."""
    sign, number = step
    return {"+": value + number, "-": value - number, "*": value * number}[sign] % MODULUS


@dataclass(frozen=True)
class Problem:
    """A start, 0 to 999, and the operations on it."""

    start: int
    steps: tuple[Step, ...]

    @property
    def text(self) -> str:
        """What the model reads."""
        return f"{self.start:03}{written(self.steps)}"

    @property
    def answer(self) -> int:
        """What a program finds; the start if there is nothing to do."""
        return [self.start, *values(self.start, self.steps)][-1]


def values(start: int, steps) -> list[int]:
    """The result after each step."""
    found = []
    for step in steps:
        found.append(start := apply(start, step))
    return found


def leads(problem: Problem, outline) -> bool:
    """Whether an outline, done without error, leads to the answer."""
    return bool(outline) and values(problem.start, outline)[-1] == problem.answer


@cache
def factorings(number: int) -> tuple[tuple[int, ...], ...]:
    """All ways to write `number` as one digit or a product of two, in order, 2 to 9 each: 12 is 2*6, 6*2, 3*4, 4*3."""
    return tuple(way for length in (1, 2) for way in product(range(2, 10), repeat=length) if np.prod(way) == number)


FACTORS = (12, 16, 18, 24, 28, 36, 42, 54, 56, 63, 72)  # two-digit multipliers, each with several outlines


def problems(count: int, rng: np.random.Generator, *, products: float = 0.45, lengths=(3, 4, 5)) -> list[Problem]:
    """`count` random problems; `products` is the share of multiplications, half of them by two digits."""
    made = []
    for _ in range(count):
        steps = []
        for _ in range(rng.choice(lengths)):
            if rng.random() < products:
                number = rng.choice(FACTORS) if rng.random() < 0.5 else rng.integers(2, 10)
                steps.append(("*", int(number)))
            else:
                steps.append(("+-"[rng.integers(2)], int(rng.integers(1, 10))))
        made.append(Problem(int(rng.integers(MODULUS)), tuple(steps)))
    return made


def random_outline(problem: Problem, rng: np.random.Generator) -> list[Step]:
    """One of a problem's outlines: a multiplication stays one step if it can (half of the time), or is factored."""
    steps = []
    for sign, number in problem.steps:
        ways = factorings(number) if sign == "*" else ()
        if len(ways) > 1 and not (number < 10 and rng.random() < 0.5):
            steps += [("*", factor) for factor in ways[rng.integers(number < 10, len(ways))]]
        else:
            steps.append((sign, number))
    return steps


def parse(outline: str) -> list[Step] | None:
    """The steps of an outline's text; None if it is not a list of signs and single digits."""
    pairs = [(outline[i], outline[i + 1 : i + 2]) for i in range(0, len(outline), 2)]
    if not pairs or any(sign not in "+-*" or not digit.isdigit() for sign, digit in pairs):
        return None
    return [(sign, int(digit)) for sign, digit in pairs]


def scratchpad(value: int, step: Step) -> str:
    """Digit by digit from the right. A product writes digit, product, product and carry: "5 35 35"; a sum or difference
    writes digit and result with its carry or borrow, "5 12", and stops where nothing is carried on.
    """
    sign, number = step
    pad, carry = "", 0
    for place in range(3):
        digit = value // 10**place % 10
        if sign == "*":
            total = digit * number + carry
            pad += f"{digit}{digit * number:02}{total:02}"
            carry = total // 10
            continue
        total = digit + (1 if sign == "+" else -1) * (carry if place else number)
        carry = int(not 0 <= total < 10)
        pad += f"{digit}{carry}{total % 10}"
        if not carry:
            break
    return pad


# -- the texts of the roles -------------------------------------------------------------------------------------------


def context(problem: Problem, steps, results=None) -> str:
    """What has been done, as a solver sees it (with results) or as a planner does (without): "037*24+5|037*3=111;"."""
    texts = (written([step]) for step in steps)
    done = (text + ";" for text in texts) if results is None else (
        f"{text}={result:03};" for text, result in zip(texts, results, strict=False)
    )  # fmt: skip
    return f"{problem.text}|{problem.start:03}{''.join(done)}"


def monologue(problem: Problem, outline) -> str:
    """The chain of thought behind "C037*24+5|": each step with its scratchpad and its result, then "!"."""
    text, value = f"{problem.start:03}", problem.start
    for step in outline:
        pad, value = scratchpad(value, step), apply(value, step)
        text += f"{written([step])}<{pad}>{value:03};"
    return text + "!"


def remaining(problem: Problem, outline, done: int) -> Problem:
    """The problem left when `done` steps of an outline are done; a half-done product keeps its other factors."""
    left, taken = [], 0
    for sign, number in problem.steps:
        rest, used = number, 1
        while sign == "*" and used < number:  # the factors of the outline that make up this operation
            factor = outline[taken][1]
            used, rest = used * factor, rest // factor if taken < done else rest
            taken += 1
        if sign != "*":
            taken, rest = taken + 1, number if taken >= done else 0
        if rest > (sign == "*"):
            left.append((sign, rest))
    value = [problem.start, *values(problem.start, outline)][done]
    return Problem(value, tuple(left))


# -- what a pipeline says to the model, and how it reads the replies ---------------------------------------------------

MOST = {"plan": 24, "choose": 3, "judge": 5, "solve": 32, "talk": 256, "sum up": 24}  # tokens a reply may have


def plan(problem: Problem) -> str:
    """Ask for an outline, which `parse` reads."""
    return f"D{problem.text}|"


def choose(problem: Problem, versions) -> str:
    """Ask which of several outlines promises most; `version` reads the reply."""
    shown = "".join(f"{VERSIONS[i]}{written(outline)};" for i, outline in enumerate(versions))
    return f"Q{problem.text}|{shown}|"


def version(reply: str) -> int | None:
    """The place that a letter names, None if it is no letter of a version."""
    return VERSIONS.index(reply) if len(reply) == 1 and reply in VERSIONS else None


def judge(problem: Problem, before, step: Step, results=None) -> str:
    """Ask how hard a step is, after steps whose results are shown or not; `score` reads the reply."""
    return f"A{context(problem, before, results)}{written([step])}|"


def score(reply: str) -> float | None:
    """A number from 0 to 1, None for anything else."""
    try:
        value = float(reply)
    except ValueError:
        return None
    return value if 0 <= value <= 1 else None


def solve(problem: Problem, before, step: Step, results, hard: bool) -> str:
    """Ask for the result of a step: at once, or after a scratchpad; `result` reads the reply."""
    return f"R{context(problem, before, results)}{written([step])}{'<' if hard else '='}"


def result(reply: str) -> int | None:
    """The three digits behind the scratchpad, if there is one; None if there are no three digits."""
    digits = reply.rpartition(">")[2]
    return int(digits) if len(digits) == 3 and digits.isdigit() else None


def talk(problem: Problem) -> str:
    """Ask for the monologue; `final` reads its answer, None where it has none."""
    return f"C{problem.text}|"


def final(reply: str) -> int | None:
    """The last result of a whole monologue."""
    return result(reply[:-1].rpartition(";")[2]) if reply.endswith(";") else None


def sum_up(said: str) -> str:
    """Ask what is left to do, behind a monologue that was cut; `read_problem` reads the reply."""
    return f"{said}S"


def read_problem(text: str) -> Problem | None:
    """A problem from its text, None if it is none: what is left to do, as the model sums it up."""
    match = re.fullmatch(r"(\d{3})((?:[-+*]\d{1,2})*)", text)
    if match is None:
        return None
    return Problem(int(match[1]), tuple((sign, int(n)) for sign, n in re.findall(r"([-+*])(\d+)", match[2])))


# -- the model --------------------------------------------------------------------------------------------------------


def build(*, seed: int = 0):
    """A freshly initialised LlamaForCausalLM of 340,000 parameters, to be trained."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, max_position_embeddings=320, initializer_range=96**-0.5,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def load(device: str = "cpu"):
    """The trained model as a lean forward pass; data.DataError if its checkpoint is missing or changed."""
    from workbook import checkpoints
    from workbook.models.lm import Llama

    return Llama.from_transformers(checkpoints.restore(build(), "scale_lm").to(device))
