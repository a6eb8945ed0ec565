"""A pipeline of questions to one language model: who is asked, what a run holds and costs, and its rivals."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from workbook import answers, measure
from workbook.models import twospeed


def nucleus(logits: torch.Tensor, temperature: torch.Tensor, *, top_k: int = 20, top_p: float = 0.95) -> torch.Tensor:
    """A law for `answers.sample`: after the temperature the `top_k` likeliest tokens, of those the fewest with `top_p`.

    logits: (rows, V); temperature: (rows,), 0 is greedy. Returns probabilities (rows, V).
    """
    law, order = answers.tempered(logits, temperature).sort(-1, descending=True)
    law[:, top_k:] = 0.0
    law = law / law.sum(-1, keepdim=True)
    law[law.cumsum(-1) - law >= top_p] = 0.0  # the mass before a token decides: the one that crosses top_p stays
    return torch.zeros_like(law).scatter(-1, order, law / law.sum(-1, keepdim=True))


class Said(NamedTuple):
    """A reply, the tokens it took (with its end), whether it came to an end, and the tokens read for it."""

    text: str
    tokens: int
    ended: bool
    read: int


class Speaker:
    """A language model that is asked in batches and remembers what it said.

    Reply j to a prompt is a sample of its own for each of `seeds` runs, and the same whoever asks again: methods that
    ask the same thing in the same run get the same reply, so that their differences are differences of the methods. No
    reply is computed twice, but each is counted by whoever asked for it.
    """

    def __init__(self, model, *, seeds: int = 1, temperature: float = 0.6, law=nucleus, seed: int = 0,
                 encode=twospeed.encode, decode=twospeed.decode, stop: int = twospeed.STOP):  # fmt: skip
        self.model, self.seeds, self.temperature, self.law, self.seed = model, seeds, temperature, law, seed
        self.encode, self.decode, self.stop, self.memory, self.calls = encode, decode, stop, {}, 0

    def __call__(self, prompts, runs, *, most: int, draw: int = 0, draws: int = 1, stop: int | None = None):
        """One reply of at most `most` tokens to each prompt, for run number runs[i]; number `draw` of `draws`."""
        stop = self.stop if stop is None else stop
        keys = [(prompt, most, draws, stop) for prompt in prompts]
        new = list(dict.fromkeys(key for key in keys if key not in self.memory))
        if new:
            asked, each = [self.encode(key[0]) for key in new], self.seeds * draws
            said = answers.sample(
                self.model, answers.read_prefix(self.model, []), asked, [self.temperature] * each, new_tokens=most,
                stop=[stop], law=self.law, seed=[self.seed, self.calls], rows=256 * each,
            )  # fmt: skip
            self.calls += 1
            for key, ids, texts, written in zip(new, asked, said.tokens, said.written, strict=True):
                self.memory[key] = texts, written, len(ids)
        replies = []
        for key, run in zip(keys, runs, strict=True):
            (texts, tokens, read), place = self.memory[key], run * draws + draw
            replies.append(Said(self.decode(texts[place]), int(tokens[place]), bool(texts[place, -1] < 0), read))
        return replies


class Scripted:
    """Stands in for a Speaker that knows `twospeed`: it errs with known probabilities, by one.

    chance: of the right result, for a sign and a mode, "*=" at once and "*<" on a scratchpad; scores: what it says of a
    sign's difficulty; outline: what it plans. At once takes 4 tokens, a scratchpad 20, a score 4, a choice 2.
    """

    def __init__(self, outline: str, chance: dict[str, float], scores: dict[str, str], seed: int = 0):
        self.outline, self.chance, self.scores, self.rng = outline, chance, scores, np.random.default_rng(seed)

    def __call__(self, prompts, runs, **options):
        """One reply to each prompt."""
        return [Said(*self.reply(prompt), True, len(prompt)) for prompt in prompts]

    def reply(self, prompt: str) -> tuple[str, int]:
        """Text and tokens."""
        if prompt[0] == "D":
            return self.outline, len(self.outline) + 1
        if prompt[0] == "Q":
            return "a", 2
        *before, last = prompt.partition("|")[2].split(";")
        sign, digit = last.strip("|=<")[-2:]
        if prompt[0] == "A":
            return self.scores[sign], 4
        value = int(before[-1][-3:] if before else last[:3])
        wrong = self.rng.random() >= self.chance[sign + prompt[-1]]
        return f"{(twospeed.apply(value, (sign, int(digit))) + wrong) % 1000:03}", 4 if prompt[-1] == "=" else 20


@dataclass
class Trace:
    """One run of the pipeline on one problem: what was said at each stage, and what it took.

    versions: valid outlines of `drawn`; steps: the outline in use; scores, hard, results: one entry a step; spent:
    tokens written, by stage, tokens "read", and "calls".
    """

    problem: Any
    run: int
    versions: list = field(default_factory=list)
    steps: list = field(default_factory=list)
    scores: list = field(default_factory=list)
    hard: list = field(default_factory=list)
    results: list = field(default_factory=list)
    spent: Counter = field(default_factory=Counter)
    drawn: int = 0

    @property
    def answer(self):
        """The result of the last step; None if a step failed."""
        return self.results[-1] if self.steps and len(self.results) == len(self.steps) else None

    def pay(self, stage: str, said: Said) -> None:
        """Count a reply."""
        self.spent.update({stage: said.tokens, "read": said.read, "calls": 1})

    def again(self, **changes) -> Trace:
        """The same run before any step is solved."""
        kept = {name: list(getattr(self, name)) for name in ("versions", "steps", "scores")}
        kept |= {"spent": Counter(self.spent), "drawn": self.drawn}
        return Trace(self.problem, self.run, **kept | changes)


def insist(ask, traces, lacks, prompt, take, *, stage: str, most: int, tries: int) -> None:
    """Ask every trace that lacks something until it has it, at most `tries` times; each reply is paid for.

    lacks(trace): whether to ask; prompt(trace): what; take(trace, said): keep what the reply is good for.
    """
    for draw in range(tries):
        open_ = [t for t in traces if lacks(t)]
        replies = ask([prompt(t) for t in open_], [t.run for t in open_], most=most, draw=draw, draws=tries)
        for trace, said in zip(open_, replies, strict=True):
            trace.pay(stage, said)
            take(trace, said)


def graded(traces, seeds: int, **facts) -> pd.DataFrame:
    """One row a run: right or not, tokens of solving, of planning and judging, of all; share of hard steps.

    traces: `seeds` runs of each problem, one behind the other; facts: further columns.
    """
    rows = [
        {"item": i // seeds, "right": t.answer == t.problem.answer, "solve": t.spent["solve"],
         "planning": t.spent["plan"] + t.spent["judge"], "read": t.spent["read"], "calls": t.spent["calls"],
         "steps": len(t.steps), "hard": np.mean(t.hard or [0])}
        for i, t in enumerate(traces)
    ]  # fmt: skip
    return pd.DataFrame(rows).eval("total = solve + planning").assign(**facts)


def thriftiest(table: pd.DataFrame, account: str, floor: float):
    """The setting with the fewest tokens among those whose accuracy reaches `floor`; the most accurate if none does.

    table: indexed by setting, columns "right" and the account of tokens.
    """
    good = table[table.right >= floor]
    return good[account].idxmin() if len(good) else table.right.idxmax()


def best_below(table: pd.DataFrame, account: str, budget: float):
    """The most accurate setting among those within a budget of tokens; the cheapest if none is."""
    cheap = table[table[account] <= budget]
    return cheap.right.idxmax() if len(cheap) else table[account].idxmin()


def per_problem(rows: pd.DataFrame, column: str) -> np.ndarray:
    """Mean of a column for each problem, over its runs."""
    return rows.groupby("item")[column].mean().to_numpy(float)


def interval(values: np.ndarray, *, seed: int = 0) -> tuple[float, float, float]:
    """Mean over problems, and its 95 % interval."""
    m = measure.bootstrap(values, seed=seed)
    return m.value, m.low, m.high


def both_ways(runs: pd.DataFrame, rivals, *, accounts=("solve", "total"), seed: int = 0) -> pd.DataFrame:
    """SCALE against each rival at equal accuracy and at equal tokens: thresholds chosen on "dev", measured on "test".

    runs: rows of `graded` with columns set, method and (for SCALE) tau. Equal accuracy: the thriftiest threshold
    at most a point below the rival; equal tokens: the most accurate one within the rival's tokens. Returns, for each
    rival, account and choice, the gain in points and the ratio of tokens, with intervals over problems.
    """
    dev, test = (runs[runs.set == name] for name in ("dev", "test"))
    sweep, found = dev[dev.method == "SCALE"].groupby("tau")[["right", *accounts]].mean(), []
    for rival, account in product(rivals, accounts):
        hit, spent = dev[dev.method == rival][["right", account]].mean()
        theirs = test[test.method == rival]
        picks = {"accuracy": thriftiest(sweep, account, hit - 0.01), "tokens": best_below(sweep, account, spent)}
        for equal, level in picks.items():
            ours = test[(test.method == "SCALE") & (test.tau == level)]
            gain = interval(100 * (per_problem(ours, "right") - per_problem(theirs, "right")), seed=seed)
            cost = measure.ratio(per_problem(ours, account), per_problem(theirs, account), seed=seed)
            found.append((rival, account, equal, level, *gain, cost.value, cost.low, cost.high))
    spans = [f"{name}{end}" for name in ("gain", "ratio") for end in ("", "_low", "_high")]
    return pd.DataFrame(found, columns=["rival", "account", "equal", "tau", *spans])


# -- rivals -----------------------------------------------------------------------------------------------------------


def always(traces, place):
    """An allocation that thinks about every step."""
    return [True] * len(traces)


def never(traces, place):
    """An allocation that answers every step at once."""
    return [False] * len(traces)


def hindsight(ask, roles):
    """An allocation that thinks where System 1 would be wrong: the reply that it would give is graded first."""

    def think(traces, place):
        prompts = [roles.solve(t.problem, t.steps[:place], t.steps[place], t.results, False) for t in traces]
        replies = ask(prompts, [t.run for t in traces], most=roles.MOST["solve"])
        before = [t.results[-1] if place else t.problem.start for t in traces]
        right = [roles.apply(value, t.steps[place]) for value, t in zip(before, traces, strict=True)]
        return [roles.result(said.text) != value for said, value in zip(replies, right, strict=True)]

    return think


def talk(ask, roles, traces, *, votes: int = 1, draws: int = 1) -> None:
    """Monologues: one for a chain of thought, several for majority voting (the first of equals wins).

    draws: how many are drawn in all, at least `votes`; who draws as many asks for the same ones.
    """
    prompts, runs, options = (
        [roles.talk(t.problem) for t in traces],
        [t.run for t in traces],
        {"most": roles.MOST["talk"]},
    )
    options |= {"draws": max(votes, draws), "stop": roles.END}
    said = [ask(prompts, runs, draw=draw, **options) for draw in range(votes)]
    for number, trace in enumerate(traces):
        for replies in said:
            trace.pay("solve", replies[number])
        found = [roles.final(replies[number].text) for replies in said if replies[number].ended]
        won = Counter(value for value in found if value is not None).most_common(1)
        trace.steps, trace.results = ["monologue"], [value for value, _ in won]


def iterate(ask, roles, traces, *, cut: int, rounds: int = 8) -> None:
    """InftyThink: reason for at most `cut` tokens, sum up what is left, go on from there, at most `rounds` times."""
    left = [t.problem for t in traces]
    for trace in traces:
        trace.steps = ["monologue"]
    for _ in range(rounds):
        going = [i for i, problem in enumerate(left) if problem is not None]
        prompts, runs = [roles.talk(left[i]) for i in going], [traces[i].run for i in going]
        parts = ask(prompts, runs, most=cut, stop=roles.END)
        open_ = [
            (i, prompt + said.text) for i, prompt, said in zip(going, prompts, parts, strict=True) if not said.ended
        ]
        sums = ask(
            [roles.sum_up(text) for _, text in open_], [traces[i].run for i, _ in open_], most=roles.MOST["sum up"]
        )
        for i, said in zip(going, parts, strict=True):
            traces[i].pay("solve", said)
            found = roles.final(said.text) if said.ended else None
            traces[i].results, left[i] = [] if found is None else [found], None
        for (i, _), said in zip(open_, sums, strict=True):
            traces[i].pay("solve", said)
            rest = roles.read_problem(said.text) if said.ended else None
            if rest is not None and not rest.steps:  # nothing is left: the start is the answer
                traces[i].results, rest = [rest.start], None
            left[i] = rest


# -- what the paper reports -------------------------------------------------------------------------------------------

TAUS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TABLE_2 = {  # Qwen3-32B at TAUS: accuracy (%), thousands of tokens, steps thought about (%)
    "AIME24": {
        "right": (78.75, 77.5, 73.33, 74.58, 70, 50, 46.25, 27.5),
        "solve": (22.5, 19.2, 19.5, 20.3, 17.8, 12.2, 11.4, 8.2),
        "hard": (75.6, 56.7, 55.7, 55.7, 47.7, 17.7, 14.1, 0),
    },
    "AIME25": {
        "right": (63.75, 61.67, 51.67, 56.25, 58.75, 39.17, 35.83, 25),
        "solve": (23.2, 20.6, 20.5, 21, 19, 11.7, 10.6, 6.8),
        "hard": (75.8, 57.5, 57.9, 58.5, 51, 19.6, 14, 0),
    },
}
TABLE_1 = {  # tokens a problem of InftyThink and of SCALE, on AIME24, AIME25, AMC23
    "Qwen3-32B": ((38451, 25581), (36640, 26643), (23117, 12556)),
    "QwQ": ((62557, 29812), (73473, 33965), (34725, 16259)),
    "R1-Distill-Llama-70B": ((42143, 30696), (38763, 35517), (24327, 16238)),
    "R1-Distill-Qwen-32B": ((37062, 30175), (35187, 29641), (23332, 16804)),
}
