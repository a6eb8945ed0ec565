"""Questions asked under many mixtures of documents, examples and rounds: graded answers, their table, their intervals.

The strategies themselves stand in notebooks/test-time/iterdrag.ipynb. Here they meet a model and a corpus.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch

from workbook import answers, checkpoints, knowledge, measure
from workbook.models import lm
from workbook.reader import Reader
from workbook.retrieval import RETRIEVERS
from workbook.study import Measured

KEYS = ["strategy", "k", "m", "n"]  # a setting
UNIT = ["task", "seed", "item"]  # what is asked under every setting: a question of a set, with the examples of a seed
FACTS = ["right", "words", "length", "requests", "written", "read"]  # of one answer, see `Bench.ask`
INTRO = "Answer the question from the documents.\n"
STEP = 8  # questions between the first ones of two seeds


def items(seed: int, count: int) -> list[int]:
    """The questions that run number `seed` asks: `count` in a row, beginning STEP further on for each seed."""
    return [(STEP * seed + i) % knowledge.TEST for i in range(count)]


class Bench:
    """A corpus, a retriever and a small language model, to which the strategies are put.

    method: the notebook's functions by name: drag, iterdrag, retrieve and worked_examples; rounds: of iterdrag.
    """

    def __init__(self, method: Mapping, *, retriever: str = "bm25", rounds: int = 3, device: str = "cpu"):
        self.method, self.rounds, self.device = SimpleNamespace(**method), rounds, device
        self.documents, self.train, self.test = knowledge.load()
        self.texts = [document.text for document in self.documents]
        self.scores, self.tokenizer = RETRIEVERS[retriever](self.texts), lm.load_tokenizer()
        everyone = {name: self.train[name] + self.test[name] for name in self.test}
        self.teacher = knowledge.Lookup(self.documents, everyone, informed=True)
        self.witness = knowledge.Lookup(self.documents, everyone)
        vocabulary = self.tokenizer.get_vocab().items()
        self.stops = [token for piece, token in vocabulary if "Ċ" in piece] + self.tokenizer.all_special_ids
        self.limits = {"Follow up:": 10, "Answer:": 6, "Intermediate answer:": 6, "So the final answer is:": 6}
        self._taught: dict = {}

    @cached_property
    def model(self):
        """The reader's model, loaded at the first question."""
        return answers.load_model(device=self.device)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.tokenizer.encode(text))

    def examples(self, name: str, strategy: str, k: int, seed: int, find: Callable | None = None) -> list[list[int]]:
        """The instruction and all worked examples, as tokens. The seed shuffles the questions that they are made of.

        So it decides which examples a prompt shows and in which order, but that examples with a supported answer come
        first.
        """
        key = name, strategy, k, seed
        if find is None and key in self._taught:
            return self._taught[key]
        order = np.random.default_rng([seed, 1]).permutation(len(self.train[name]))
        rounds = 1 if strategy == "DRAG" else len(knowledge.SETS[name][1]) + 1
        blocks = self.method.worked_examples([self.train[name][i] for i in order], find or self.find(k), self.texts,
                                             self.teacher, self.witness, self.count, rounds)  # fmt: skip
        parts = self.tokenizer([INTRO, *blocks])["input_ids"]
        if find is None:
            self._taught[key] = parts
        return parts

    def find(self, k: int) -> Callable[[str], list[int]]:
        """Retrieval of k documents."""
        return partial(self.method.retrieve, self.scores, k=k)

    def ceiling(self, names: Sequence[str], ks: Sequence[int]) -> pd.DataFrame:
        """Share of all questions that retrieval alone allows to answer, by set and strategy; a column a k."""
        walk = partial(knowledge.supported, self.documents)
        found = {(name, way): [np.mean([walk(self.find(k), name, question, iterative=way == "IterDRAG")
                                        for question in self.test[name]]) for k in ks]
                 for name in names for way in ("DRAG", "IterDRAG")}  # fmt: skip
        return pd.DataFrame(found, index=pd.Index(ks, name="k")).T

    def ask(
        self, name: str, strategy: str, k: int, shots: Sequence[int], asked: Sequence[int], *,
        seed: int = 0, find: Callable | None = None, alone: bool = False, forget: bool = False,
    ) -> pd.DataFrame:  # fmt: skip
        """Questions `asked` of a set at each number of worked examples in `shots`: a table, one row an answer.

        Columns: UNIT, KEYS; right; words, a 16-bit sum of the answer's words; length,
        the effective context length; requests; written, the tokens behind the prefixes of lines; read, the input tokens
        that were not read before, worked examples included. alone: leave out the answers that shorter runs would give,
        and which only one pass for all rounds needs; forget: let the reader read all anew but the examples.
        """
        parts, drag = self.examples(name, strategy, k, seed, find), strategy == "DRAG"
        find, questions = find or self.find(k), [self.test[name][i] for i in asked]
        ends = [sum(map(len, parts[: m + 1])) for m in shots for _ in questions]
        prefix = np.concatenate(parts[: max(shots) + 1]).tolist()
        reader = Reader(self.model, answers.read_prefix(self.model, prefix), ends, forget=forget)
        write, many = reader.writer(self.tokenizer, self.limits, self.stops), questions * len(shots)
        if alone and not drag:
            write = last_only(write, self.rounds)
        run = self.method.drag if drag else partial(self.method.iterdrag, rounds=self.rounds)
        said, cost, _, _ = run([question.text for question in many], find, self.texts, write, self.count)
        rows = []
        for (row, column), text in np.ndenumerate(said):
            if not (drag or column):  # one round is DRAG's
                continue
            place, (tokens, requests, written, read) = divmod(row, len(questions)), cost[row, column].tolist()
            right, words = many[row].answer.lower() in text.lower(), zlib.crc32(text.encode()) & 0x7FFF
            facts = right, words, tokens + requests * ends[row], requests, written, read + ends[row]
            rows.append((name, seed, asked[place[1]], strategy, k, shots[place[0]], column + 1, *facts))
        return pd.DataFrame(rows, columns=[*UNIT, *KEYS, *FACTS]).astype({"right": int})


def last_only(write: Callable, rounds: int) -> Callable:
    """`write` that gives an empty line for each final answer before the last round: a run of its own asks for one."""
    left = rounds - 1

    def lazy(rows: Sequence[int], prompts: Sequence[str], starts: Sequence[str]) -> list[str]:
        nonlocal left
        if list(starts) == ["So the final answer is:"] and left:
            left -= 1
            return [starts[0]] * len(rows)
        return write(rows, prompts, starts)

    return lazy


def passes(table: pd.DataFrame) -> pd.Series:
    """Forward passes of an answer: one reads the prompt of each request, and each token written takes one more."""
    return table.requests + table.written


# -- the clock ---------------------------------------------------------------------------------------------------------


def clocked(
    bench: Bench, table: pd.DataFrame, settings: Sequence[tuple[str, int, int]], *, repeats: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Seconds of one question, asked alone and read from the start, at settings (strategy, k, m).

    table: what `ask` found, of which the counts are taken; the question is the first one of its last set. Returns the
    timings of `measure.interleaved`, and a table, one row a setting: KEYS, counts, median seconds, and the seconds that
    `prices` of the other settings predict. Timings have the names of its index; the last setting is timed once more, as
    "no reuse", by a reader that forgets all but the worked examples between requests.
    """
    table = table[table.task == table.task.iloc[-1]]
    name, seed, item = table[UNIT].iloc[0]
    table = (
        table[table["item"] == item].sort_values("n").groupby(["strategy", "k", "m"], as_index=False).last()
    )  # all rounds
    table = table.set_index(table.apply(lambda row: f"{row.strategy} k={row.k} m={row.m}", axis=1))
    labels = {f"{way} k={k} m={m}": (way, k, m) for way, k, m in settings}
    ways = {label: partial(bench.ask, name, way, k, [m], [item], seed=seed, alone=True)
            for label, (way, k, m) in labels.items()}  # fmt: skip
    ways["no reuse"] = partial(ways[list(labels)[-1]], forget=True)
    for way, k, _ in settings:
        bench.examples(name, way, k, seed)  # made once, like the corpus: no part of an answer
    clock = measure.interleaved(ways, repeats=repeats, warmup=0)
    table = table.loc[list(labels), [*KEYS, "length", "read", "requests", "written"]]
    table["passes"], table["seconds"] = passes(table), clock.groupby("name").seconds.median()
    without = [prices(table.drop(index=label)) for label in table.index]
    table["predicted"] = (table[["read", "passes"]].to_numpy() * without).sum(1)
    return clock, table


def prices(table: pd.DataFrame) -> np.ndarray:
    """Seconds of a token that was not read before and of a forward pass, none negative: least relative squares."""
    from scipy.optimize import nnls

    return nnls(table[["read", "passes"]].div(table.seconds, axis=0).to_numpy(float), np.ones(len(table)))[0]


# -- the table that ships ---------------------------------------------------------------------------------------------


def packed(table: pd.DataFrame) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """A table of `Bench.ask` as one tensor of whole numbers a column, and the names behind the numbers."""
    table, names = table.copy(), {}
    for column in ("task", "strategy"):
        table[column], known = table[column].factorize()
        names[column] = " ".join(known)
    wide = ("length", "read", "words")
    tensors = {c: torch.tensor(table[c].to_numpy(), dtype=torch.int16 if c in wide else torch.uint8) for c in table}
    if any((tensors[column].numpy() != table[column]).any() for column in table):
        raise ValueError("a number of the table is too large for its tensor: 32767 is the longest length, 255 the rest")
    return tensors, names


def unpacked(tensors: dict[str, torch.Tensor], names: dict[str, str]) -> pd.DataFrame:
    """The table that `packed` took apart."""
    table = pd.DataFrame({column: tensors[column].numpy().astype(int) for column in [*UNIT, *KEYS, *FACTS]})
    for column in ("task", "strategy"):
        table[column] = np.array(names[column].split())[table[column]]
    return table


def shipped(wanted: pd.DataFrame, retriever: str, name: str = "iterdrag_answers") -> pd.DataFrame:
    """Answers of data/checkpoints/NAME to the sets and settings of the table `wanted`, all seeds and questions.

    An empty table if it was made by another retriever, or if it lacks one of the settings.
    """
    facts = checkpoints.provenance(name)
    table = unpacked(checkpoints.load(name), facts)
    settings = wanted[["task", *KEYS]].drop_duplicates()
    found = settings.merge(table, on=["task", *KEYS])
    fits = facts["retriever"] == retriever and len(found[["task", *KEYS]].drop_duplicates()) == len(settings)
    return found[table.columns] if fits else table[:0]


# -- intervals --------------------------------------------------------------------------------------------------------


def redrawn(index: pd.MultiIndex, draws: int, seed: int) -> np.ndarray:
    """How often each row with this index (UNIT) counts when seeds and questions are drawn anew, (draws, rows).

    As often as its seed times as often as its question was drawn, as in the pigeonhole bootstrap (Owen, Ann. Appl.
    Stat. 2007). Draws without any row are left out: few seeds may have no question in common with the ones drawn.
    """
    rng, weight = np.random.default_rng(seed), np.ones((draws, len(index)), int)
    for names in (index.get_level_values("seed"), index.droplevel("seed")):
        codes, known = pd.factorize(names)
        weight *= rng.multinomial(len(known), np.full(len(known), 1 / len(known)), size=draws)[:, codes]
    return weight[weight.any(1)]


def crossed(
    values: pd.Series | pd.DataFrame, statistic: Callable[[np.ndarray], float] = np.mean, *,
    level: float = 0.95, draws: int = 2000, seed: int = 0, **measured,
) -> Measured:  # fmt: skip
    """`statistic` of the rows and its percentile interval over seeds and questions, both drawn anew (`redrawn`).

    values: indexed by UNIT; a statistic of several columns gets the drawn rows together. With one seed it is the
    bootstrap over questions. measured: fields of Measured.
    """
    rows, weight = values.to_numpy(float), redrawn(values.index, draws, seed)
    if statistic is np.mean and rows.ndim == 1:
        samples = weight @ rows / weight.sum(1)
    else:
        samples = [statistic(np.repeat(rows, times, axis=0)) for times in weight]
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    questions = values.index.droplevel("seed").nunique()
    return Measured(float(statistic(rows)), float(low), float(high), n=questions, **measured)


def bands(values: pd.DataFrame, *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> pd.DataFrame:
    """Mean of each column and its interval as in `crossed`, one row a column; those that lack a value are left out."""
    values = values.dropna(axis=1)
    weight = redrawn(values.index, draws, seed).astype(float)
    samples = weight @ values.to_numpy(float) / weight.sum(1, keepdims=True)
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return pd.DataFrame({"value": values.mean(), "low": low, "high": high})
