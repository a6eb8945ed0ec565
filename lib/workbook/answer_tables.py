"""Tables of answers: drawn from a model, judged by it, looked at as pools, and packed into a few bytes.

A table is a dict of arrays over (questions, columns), column 0 greedy. notebooks/checkpoints/multilingual_answers ships
those of many questions, test-time/multilingual-samples draws a part of them again, both by these functions.
"""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray

from workbook import answers, checkpoints, measure, multilingual, rewards
from workbook.models.lm import Llama
from workbook.pools import Pool

NEW_TOKENS, CHECKLIST = 14, 16  # tokens of an answer and of a checklist, at most
Table = dict  # str to array; what the keys mean stands in `ask` and `judge`


def ends(tokenizer) -> list[int]:
    """Tokens that end an answer: all with a line break, and the special ones."""
    return [token for piece, token in tokenizer.get_vocab().items() if "Ċ" in piece] + tokenizer.all_special_ids


# -- asking -----------------------------------------------------------------------------------------------------------


def ask(
    model: Llama,
    tokenizer,
    task: str,
    examples: pd.DataFrame,
    items: pd.DataFrame,
    *,
    temperatures: Sequence[float],
    samples: int,
    laws: Sequence[answers.Law],
    size: int,
    seed: int,
    run: int = 0,
) -> Table:
    """Answers to all questions at all temperatures, one batched decode a law; the laws share their random numbers.

    examples, items: from `multilingual.split`; size: of the pools that a judge will see. Columns of text, logprob,
    tokens, key, right, value: greedy, then `samples` at each temperature under the first law, then under the next.
    Also task, items, asked (question tokens), prefixes (to answer, to judge, to choose) and read (the same, as states),
    work (tokens as if each answer stood alone, and tokens computed), and empty places for `judge`.
    """
    prefixes = [tokenizer.encode(text) for text in multilingual.prompts(examples, size)]
    table = read_again(tokenizer, task, items) | {"prefixes": prefixes}
    table["read"] = [answers.read_prefix(model, prefix) for prefix in prefixes]
    levels, plan = [0.0, *np.repeat(temperatures, samples)], {"new_tokens": NEW_TOKENS, "stop": ends(tokenizer)}
    plan["seed"] = [seed, multilingual.TASKS.index(task), run]
    runs = [answers.sample(model, table["read"][0], table["asked"], levels, law=law, **plan) for law in laws]
    found = zip(*((run.texts(tokenizer), run.logprob, run.written) for run in runs), strict=True)
    found = [np.concatenate([parts[0], *(part[:, 1:] for part in parts[1:])], axis=1) for parts in found]
    work = np.sum([(run.written.sum() + run.read * len(levels), run.computed) for run in runs], axis=0)
    return graded(table | dict(zip(("text", "logprob", "tokens"), found, strict=True)) | {"work": work})


def read_again(tokenizer, task: str, items: pd.DataFrame) -> Table:
    """A table before it has answers: task, items, asked."""
    return {"task": task, "items": items, "asked": [tokenizer.encode(question) for question in items.question]}


def graded(table: Table) -> Table:
    """The table with key, right and value of each answer, and with empty places for `judge` where there are none."""
    grades = multilingual.grade(table["task"], table["text"], table["items"].right)
    empty = {"reward": np.full(table["text"].shape, -np.inf), "chops": np.full((len(table["text"]), 5), -1)}
    return empty | table | dict(zip(("key", "right", "value"), grades, strict=True))


def judge(model: Llama, tokenizer, table: Table, rows: slice, columns: NDArray, picks: NDArray, chops: Callable):
    """Write into a table of `ask` what the model says of its answers to the questions `rows`.

    columns: those of one setting, greedy first; picks: (rows, N) one pool a question, as places in `columns`.
    reward: of each different answer; chops: (questions, 5) the place in the pool that `chops` chose, its favourite
    places in the two orders, and the tokens and passes that took.
    """
    text, plan = table["text"][rows][:, columns], {"new_tokens": CHECKLIST, "stop": ends(tokenizer)}
    letters = [tokenizer.encode(f" {chr(65 + place)}")[-1] for place in range(picks.shape[1])]
    found = rewards.self_reward(model, table["read"][1], tokenizer.encode, table["asked"][rows], text)
    table["reward"][np.arange(len(table["asked"]))[rows][:, None], columns] = found
    questions, pools = list(table["items"].question[rows]), np.take_along_axis(text, picks, 1)
    chosen, votes, spent = chops(model, table["read"][2], tokenizer.encode, questions, pools, letters, **plan)
    table["chops"][rows] = np.c_[chosen, votes.argmax(-1), spent]


# -- looking ----------------------------------------------------------------------------------------------------------


def pools_of(table: Table, item: int, columns: NDArray, picks: NDArray, foreign: Table | None = None, heard=None):
    """Random pools of one question as a `Pool`; `foreign`: the table that holds the evidence in another language.

    columns: those that pools use; picks: (pools, N) places in `columns`; heard: (pools, M) columns of `foreign`.
    Returns (pool, keys, right), the last two (pools, N).
    """
    own, used = table["text"][item, columns], [] if foreign is None else np.unique(heard)
    others = [*own, *(foreign["text"][item, used] if foreign else [])]
    alike = np.array([[multilingual.chrf(a, b) for b in others] for a in own])
    names = ("logprob", "tokens", "reward", "key", "right")
    logprob, tokens, reward, keys, right = (table[name][item, columns][picks] for name in names)
    cross = None if foreign is None else alike[picks[:, :, None], len(own) + np.searchsorted(used, heard)[:, None]]
    square, same = alike[picks[:, :, None], picks[:, None]], keys[:, :, None] == keys[:, None]
    return Pool(logprob, tokens, reward, same, square, cross), keys, right


def evaluate(
    table: Table,
    items: Sequence[int],
    columns: NDArray,
    rules: Mapping[str, Callable[[Pool], NDArray]],
    picks: Callable[[int], NDArray],
    foreign: Table | None = None,
    heard: Callable[[int], NDArray] | None = None,
    asks: int = 0,
) -> pd.DataFrame:
    """One row an item and rule, the means over its pools: right, greedy (it says what greedy says), tokens, passes.

    picks, heard: of an item, as in `pools_of`; asks: tokens by which a judge asks about an answer. Rules that need
    evidence ("X-MBR") are left out where there is no `foreign`. "one sample" takes the first candidate, "perfect" a
    right one. Tokens: all that the question sends through the model, the examples left out. Passes: those that wait for
    each other, where all answers are written side by side and the evidence is another question.
    """
    rows = []
    for item in items:
        voters = heard(item) if foreign else None
        pool, keys, right = pools_of(table, item, columns, picks(item), foreign, voters)
        asked, longest = len(table["asked"][item]), pool.tokens.max(1).mean()  # the last token of each is not read
        cost = dict.fromkeys(rules, np.array([asked + pool.tokens.sum(1).mean(), longest]))
        verdicts = asked + (pool.tokens - 1 + asks).sum(1).mean()  # the question is read again, then all answers
        extra = {"best-of-N": [verdicts, 2]}
        if foreign:
            spoken = foreign["tokens"][item][voters]
            extra["X-MBR"] = [len(foreign["asked"][item]) + spoken.sum(1).mean(), spoken.max(1).mean()]
        found = {rule: choose(pool) for rule, choose in rules.items() if foreign or rule != "X-MBR"}
        for rule, place in (found | {"one sample": np.zeros(len(keys), int), "perfect": right.argmax(1)}).items():
            hit, took = (np.take_along_axis(t, place[:, None], 1) for t in (right, keys == table["key"][item, 0]))
            spent = cost[rule] + extra.get(rule, 0) if rule in rules else (np.nan, np.nan)
            rows.append((rule, item, hit.mean(), took.mean(), *spent))
    return pd.DataFrame(rows, columns=["rule", "item", "right", "greedy", "tokens", "passes"])


def judged(table: Table, items: Sequence[int], columns: NDArray, picks: NDArray) -> pd.DataFrame:
    """As `evaluate`, of CHOPS, which `judge` let choose from one pool of each item. picks: (items, N)."""
    tokens, right, keys = (table[name][items][:, columns] for name in ("tokens", "right", "key"))
    place, _, _, spent, passes = table["chops"][items].T
    took, cost = np.take_along_axis(picks, place[:, None], 1), np.take_along_axis(tokens, picks, 1)
    hit, same = (np.take_along_axis(values, took, 1)[:, 0] for values in (right, keys == keys[:, :1]))
    asked = np.array([len(table["asked"][item]) for item in items])
    facts = {"right": hit * 1.0, "greedy": same * 1.0, "tokens": asked + cost.sum(1) + spent}
    return pd.DataFrame({"rule": "CHOPS", "item": items} | facts | {"passes": cost.max(1) + passes})


def seconds(clock: pd.DataFrame, questions: int) -> pd.DataFrame:
    """Seconds a question of ways "RULE, N" in a table of `measure.interleaved`: rule, n, median s, s_low, s_high."""
    rows = []
    for way, part in clock.groupby("name", sort=False):
        rule, n = way.split(", ")
        middle = measure.bootstrap(part.seconds / questions, np.median)
        rows.append((rule, int(n), middle.value, middle.low, middle.high))
    return pd.DataFrame(rows, columns=["rule", "n", "s", "s_low", "s_high"])


# -- packing ----------------------------------------------------------------------------------------------------------


def packed(table: Table) -> dict[str, list]:
    """A table as lists that JSON can hold: of each question its different answers, and which of them each column is.

    An answer is a dozen letters, shorter than the likenesses to all the others that could be stored in its place.
    Log-probabilities and rewards keep two decimals.
    """
    rows = {name: [] for name in ("text", "tokens", "logprob", "reward", "drawn")}
    for text, tokens, logprob, reward in zip(*(table[k] for k in ("text", "tokens", "logprob", "reward")), strict=True):
        seen: dict[tuple[str, int], int] = {}
        drawn = np.array([seen.setdefault(pair, len(seen)) for pair in zip(text, tokens.tolist(), strict=True)])
        first = np.unique(drawn, return_index=True)[1]
        judged = [reward[drawn == answer].max() for answer in range(len(seen))]
        for name, values in (
            ("text", text[first].tolist()),
            ("tokens", tokens[first].tolist()),
            ("logprob", logprob[first].round(2).tolist()),
            ("reward", [round(float(value), 2) if np.isfinite(value) else None for value in judged]),
            ("drawn", drawn.tolist()),
        ):
            rows[name].append(values)
    return rows | {"chops": table["chops"].tolist()}


def unpacked(rows: Mapping[str, list], table: Table) -> Table:
    """What `packed` made of a table, in the table of `read_again`."""
    found = {}
    for name in ("text", "tokens", "logprob", "reward"):
        values = [
            [-np.inf if several[answer] is None else several[answer] for answer in drawn]
            for several, drawn in zip(rows[name], rows["drawn"], strict=True)
        ]
        found[name] = np.array(values, dtype=object if name == "text" else int if name == "tokens" else float)
    return graded(table | found | {"chops": np.array(rows["chops"])})


def joined(parts: Sequence[Mapping[str, list]]) -> dict[str, list]:
    """Packed tables of several runs, one below the other."""
    return {name: [row for part in parts for row in part[name]] for name in parts[0]}


def as_tensor(content: object) -> torch.Tensor:
    """Anything that JSON can hold, compressed, as uint8."""
    return torch.frombuffer(bytearray(lzma.compress(json.dumps(content).encode(), preset=9)), dtype=torch.uint8)


def shipped(name: str, tokenizer) -> tuple[dict, dict[tuple[str, str], Table]]:
    """(settings, tables by task and language) of a checkpoint of notebooks/checkpoints/multilingual_answers.

    The questions of run 0 come first, those that tune before the others, then the blocks of the further runs.
    """
    settings = json.loads(checkpoints.provenance(name)["settings"])
    content = json.loads(lzma.decompress(bytes(checkpoints.load(name)["answers"].numpy())))
    sizes = {key: settings[f"{key}_items"] for key in ("dev", "test")} | {"demonstrations": settings["demonstrations"]}
    tables = {}
    for key, rows in content.items():
        task, language = key.split("|")
        blocks = [
            multilingual.split(task, language, settings["seed"], **sizes, run=run)[1] for run in range(settings["runs"])
        ]
        items = pd.concat(blocks, ignore_index=True)
        tables[task, language] = unpacked(rows, read_again(tokenizer, task, items))
    return settings, tables


def departing(found: Table, stored: Table) -> NDArray:
    """Whether each drawn answer differs from the stored one to the same question, (questions of `found`, columns)."""
    return found["text"] != stored["text"][: len(found["text"])]
