"""Two tasks in six languages that a program can grade: word problems, and names of countries.

The same questions in every language, so that a question can be asked again in another one. Names and spellings are
those of the Unicode CLDR, which the package babel carries.
"""

from __future__ import annotations

import operator
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from workbook.pools import by_question
from workbook.study import Measured

LANGUAGES = ("en", "es", "de", "fr", "pt", "nl")
TASKS = ("word problems", "country names")

# the words "question" and "answer", and three stories: a + b, a - b, a * b
STORIES = {
    "en": ["Question", "Answer", "{n} has {a} apples and buys {b} more. How many apples does {n} have now?",
           "{n} has {a} apples and eats {b}. How many apples are left?",
           "There are {a} boxes with {b} apples each. How many apples are there?"],
    "es": ["Pregunta", "Respuesta", "{n} tiene {a} manzanas y compra {b} más. ¿Cuántas manzanas tiene {n} ahora?",
           "{n} tiene {a} manzanas y come {b}. ¿Cuántas manzanas quedan?",
           "Hay {a} cajas con {b} manzanas cada una. ¿Cuántas manzanas hay?"],
    "de": ["Frage", "Antwort", "{n} hat {a} Äpfel und kauft {b} weitere. Wie viele Äpfel hat {n} jetzt?",
           "{n} hat {a} Äpfel und isst {b}. Wie viele Äpfel bleiben übrig?",
           "Es gibt {a} Kisten mit je {b} Äpfeln. Wie viele Äpfel gibt es?"],
    "fr": ["Question", "Réponse", "{n} a {a} pommes et en achète {b} de plus. Combien de pommes a {n} maintenant ?",
           "{n} a {a} pommes et en mange {b}. Combien de pommes reste-t-il ?",
           "Il y a {a} boîtes avec {b} pommes chacune. Combien de pommes y a-t-il ?"],
    "pt": ["Pergunta", "Resposta", "{n} tem {a} maçãs e compra mais {b}. Quantas maçãs {n} tem agora?",
           "{n} tem {a} maçãs e come {b}. Quantas maçãs sobram?",
           "Há {a} caixas com {b} maçãs cada. Quantas maçãs há?"],
    "nl": ["Vraag", "Antwoord", "{n} heeft {a} appels en koopt er {b} bij. Hoeveel appels heeft {n} nu?",
           "{n} heeft {a} appels en eet er {b} op. Hoeveel appels blijven er over?",
           "Er zijn {a} dozen met elk {b} appels. Hoeveel appels zijn er?"],
}  # fmt: skip
SIGNS = {"+": operator.add, "-": operator.sub, "*": operator.mul}
NAMES = ("Anna", "Tom", "Maria", "Leo", "Eva", "Max")
COUNTRIES = re.findall(
    r"\w\w",
    "AF AL AM AO AR AT AU AZ BA BD BE BG BO BR BY CA CH CL CM CN CO CR CU CY CZ DE DK DZ EC EE EG ES ET FI FR "
    "GB GE GH GR GT HR HT HU ID IE IL IN IQ IR IS IT JM JO JP KE KR KZ LA LB LK LT LV LY MA MD MG ML MX MY MZ "
    "NA NE NG NL NO NP NZ PA PE PH PK PL PT PY RO RS RU RW SA SD SE SI SK SN SO SV SY TD TH TN TR TZ UA UG US UY "
    "UZ VE VN YE ZA ZM ZW ",
)


def questions(task: str, language: str, count: int, seed: int) -> pd.DataFrame:
    """`count` questions of a task, number for number the same in every language; columns question, right, wrong.

    A word problem is answered by its operation and result, "7 + 5 = 12"; `wrong` uses another operation. A country's
    name is translated from English, or from Spanish into English; `wrong` is the untranslated name, or that of the
    country before where the two are alike. More questions begin with the same ones; of the first 108 word problems no
    two have the same operation and numbers, nor are any two countries alike. ValueError for an unknown task or
    language, or too many countries.
    """
    if task not in TASKS or language not in LANGUAGES:
        raise ValueError(
            f"no {task!r} in {language!r}: tasks are {', '.join(TASKS)}, languages {', '.join(LANGUAGES)}."
        )
    rng = np.random.default_rng([seed, TASKS.index(task)])
    rows = (_problems if task == TASKS[0] else _countries)(language, count, rng)
    return pd.DataFrame(rows, columns=["question", "right", "wrong"])


def _problems(language: str, count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    ask, reply, *stories = STORIES[language]
    pairs, rows = [(a, b) for b in range(2, 10) for a in range(b, 10)], []
    for number in range(count):
        turn, kind = divmod(number % (3 * len(pairs)), 3)
        if turn == kind == 0:
            orders = [rng.permutation(pairs) for _ in SIGNS]
        (a, b), name = orders[kind][turn], rng.choice(NAMES)
        a += kind == 1  # so that something is left
        sums = [f"{a} {sign} {b} = {function(a, b)}" for sign, function in SIGNS.items()]
        story = stories[kind].format(n=name, a=a, b=b)
        rows.append((f"{ask}: {story}\n{reply}:", sums[kind], sums[(kind + 1) % 3]))
    return rows


def _countries(language: str, count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    from babel import Locale

    if count > len(COUNTRIES):
        raise ValueError(f"{count} countries asked for, there are {len(COUNTRIES)}.")
    local, foreign = Locale(language), Locale("es" if language == "en" else "en")
    ask, reply = (local.languages[name.language].capitalize() for name in (foreign, local))
    chosen = rng.permutation(COUNTRIES)[:count]
    pairs = [tuple(where.territories[code].replace("\xad", "") for where in (foreign, local)) for code in chosen]
    other = [pairs[i - 1 if i else min(1, count - 1)][1] for i in range(count)]
    wrong = [source if fold(source) != fold(right) else bad for (source, right), bad in zip(pairs, other, strict=True)]
    return [(f"{ask}: {source}\n{reply}:", right, bad) for (source, right), bad in zip(pairs, wrong, strict=True)]


def split(
    task: str, language: str, seed: int, *, demonstrations: int, dev: int, test: int, run: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(worked examples, further questions) of one run of several, which report different questions.

    All runs share one order of the `questions`. Its head are the examples of run 0 and `dev` questions that tune; then
    come blocks of `test`, one a run: no question is reported twice, and none that tuned. Run 0 gets the dev questions
    before its block; a later run takes its examples from the head, in an order of its own, the three stories in turn.
    """
    head = demonstrations + dev
    rows = questions(task, language, head + (run + 1) * test, seed)
    if not run:
        examples, rest = rows[:demonstrations], rows[demonstrations:]
    else:
        order = np.random.default_rng([seed, run]).permuted(np.tile(np.arange(head // 3), (3, 1)), axis=1)
        picks = (3 * order.T + np.arange(3)).ravel()[:demonstrations]
        examples, rest = rows.iloc[picks], rows[-test:]
    return examples.reset_index(drop=True), rest.reset_index(drop=True)


def over_runs(
    values: pd.Series | pd.DataFrame,
    statistic: Callable[[NDArray], float] = np.mean,
    *,
    runs: pd.Series,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    **measured,
) -> Measured:
    """`statistic` of the rows of `values` with its bootstrap interval over runs and over questions in each: two stages.

    values: index with a level "item"; runs: the run of each item. Runs are drawn with replacement, then as many rows of
    each as it has, with replacement: wider than needed unless runs differ far more than rows do. With one run it is the
    plain bootstrap over rows. measured: fields of Measured (unit, tolerance). ValueError if there are no rows.
    """
    table = values.to_numpy(float)
    if not len(table):
        raise ValueError("over_runs needs at least one row.")
    run = np.unique(runs[values.index.get_level_values("item")], return_inverse=True)[1]
    order, size, rng = np.argsort(run, kind="stable"), np.bincount(run), np.random.default_rng(seed)
    start, longest = size.cumsum() - size, size.max()
    drawn = rng.integers(len(size), size=(draws, len(size)))
    place = (rng.random((*drawn.shape, longest)) * size[drawn][..., None]).astype(int)
    rows = order[start[drawn][..., None] + place]
    known = np.arange(longest) < size[drawn][..., None]  # a short run gives as many rows as it has
    found = [statistic(table[row[kept]]) for row, kept in zip(rows, known, strict=True)]
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return Measured(float(statistic(table)), float(low), float(high), n=len(table), **({"tolerance": 0.5} | measured))


def estimate(values: pd.Series, other: pd.Series | float = 0.0, *, runs: pd.Series, **measured) -> Measured:
    """Mean over questions in percent, of `values` less `other` question by question, with its interval `over_runs`.

    values, other: results of `pools.by_question`; questions that only one of them has are left out.
    """
    return over_runs(100 * (values - other).dropna(), runs=runs, **({"unit": "points"} | measured))


def accuracy(rows: pd.DataFrame, *, runs: pd.Series) -> Measured:
    """Share of right answers over questions, in percent, of rows of `answer_tables.evaluate`."""
    return estimate(by_question(rows), runs=runs)


# -- grading ----------------------------------------------------------------------------------------------------------


def fold(text: str) -> str:
    """Text without case, accents and doubled spaces."""
    letters = unicodedata.normalize("NFKD", text.casefold())
    return " ".join("".join(letter for letter in letters if not unicodedata.combining(letter)).split())


def key(task: str, text: str) -> str:
    """What decides whether two answers agree: the last number after the last "=" ("" if none), or the folded text."""
    return (re.findall(r"-?\d+", text.split("=")[-1]) or [""])[-1] if task == TASKS[0] else fold(text)


@cache
def _grams(text: str) -> tuple[Counter, list[int]]:
    """Sequences of 1 to 6 characters in the folded text without spaces, and how many there are of each length."""
    from sacrebleu.metrics.helpers import extract_all_char_ngrams

    orders = extract_all_char_ngrams(fold(text), 6)
    return sum(orders, Counter()), [counts.total() for counts in orders]


@cache
def chrf(text: str, reference: str) -> float:
    """chrF2 of two texts after folding, 0 to 1, as sacrebleu does, but each text is cut up once."""
    (found, sizes), (wanted, goals), match = _grams(text), _grams(reference), [0] * 6
    for gram in found.keys() & wanted.keys():
        match[len(gram) - 1] += min(found[gram], wanted[gram])
    orders = [(m / n, m / goal) for m, n, goal in zip(match, sizes, goals, strict=True) if n and goal]
    precision, recall = (sum(values) / len(orders) for values in zip(*orders, strict=True)) if orders else (0.0, 0.0)
    return 5 * precision * recall / (4 * precision + recall) if precision + recall else 0.0


def grade(task: str, texts: NDArray, right: Sequence[str]) -> tuple[NDArray, NDArray, NDArray]:
    """(keys, whether right, quality in [0, 1]) of answers (questions, samples); right: the reference of each question.

    An answer is right if its key is the reference's. The quality of a translation is its chrF, that of a number 0 or 1.
    """
    keys = np.array([[key(task, text) for text in row] for row in texts], dtype=object)
    good = keys == np.array([[key(task, text)] for text in right], dtype=object)
    if task == TASKS[0]:
        return keys, good, good.astype(float)
    return keys, good, np.array([[chrf(text, best) for text in row] for row, best in zip(texts, right, strict=True)])


# -- prompts ----------------------------------------------------------------------------------------------------------


def prompts(items: pd.DataFrame, size: int) -> tuple[str, str, str]:
    """Three prefixes of worked examples from `questions`: to answer, to judge one answer, to choose among `size`.

    The judge sees the right and the wrong answer to each question. Up to `size` choices are shown, each after a
    checklist; the right answer stands at every place once, or at as many as there are examples.
    """
    rows = list(items.itertuples())
    answering = "".join(f"{item.question} {item.right}\n\n" for item in rows)
    judging, choosing = "", ""
    for n, item in enumerate(rows):
        verdicts = [(item.right, "yes"), (item.wrong, "no")]
        for answer, verdict in verdicts if n % 2 else verdicts[::-1]:
            judging += f"{item.question} {answer}\nCorrect: {verdict}\n\n"
    for item, place in zip(rows, np.random.default_rng(size).permutation(size), strict=False):
        wrong = [text for text in dict.fromkeys([item.wrong, *(other.right for other in rows)]) if text != item.right]
        listed = (wrong * size)[: size - 1]
        listed.insert(place, item.right)
        hints = "the numbers of the story; its operation" if "=" in item.right else "the same country; the language"
        lines = "".join(f"\n{chr(65 + i)}: {text}" for i, text in enumerate(listed))
        choosing += f"Task: {item.question}\nChecklist: {hints}{lines}\nBest: {chr(65 + place)}\n\n"
    return answering, judging, choosing
