"""A fictional knowledge base: short documents, and questions whose answers take one, two or three of them.

The names are borrowed, the facts are drawn at random: no language model can know them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from workbook import data, paths

FILE = "iterdrag_corpus.json"
PERSONS, TRAIN, TEST = 68, 12, 32  # persons; questions of each set for worked examples, and to be graded


def _names(text: str) -> list[str]:
    return text.split()


FIRST = _names(
    "Anna Clara Emma Laura Maria Julia Sarah Alice Helen Ruth Martha Rachel Tom Peter Simon David Henry Victor "
    "Oscar Felix Martin Daniel Hugo Arthur"
)
LAST = _names(
    "Reed Holt Brooks Fox Grant Hunt Lane Marsh Page Price Shaw Wells Young Bell Cole Cross Dale Ford Hart Knight "
    "Lamb Moore Nash Ross"
)
COMPANIES = _names(
    "Falcon Summit Comet Orbit Vector Nova Atlas Delta Phoenix Titan Cedar Maple Willow Raven Eagle Tiger Coral "
    "Pearl Ruby Crystal Diamond Copper Silver Carbon"
)
TOWNS = _names(
    "Milton Dover Lincoln Salem Boston Kingston Hamilton Bristol Durham Winchester Lancaster Richmond Windsor "
    "Preston Norfolk Chester Sheffield Bedford Oxford Hartford"
)
RIVERS = _names("Rhine Danube Hudson Thames Nile Avon Trent Volga Seine Tiber")
GOODS = _names("lamps clocks boots paper glass chairs ropes tiles pianos bells soap maps")
HOBBIES = _names("chess tennis cards golf drums piano guitar hockey")
MONTHS = _names("January February March April May June July August September October November December")

# Each fact is told in a short or a long way: BM25 prefers short documents, so the wanted one may rank low.
TELLS = {
    "employer": ("{s} works for {o}.", "For a good many years now {s} has been working for {o}."),
    "seat": ("{s} is based in {o}.", "Since the great fire of the old mill {s} is based in {o}."),
    "goods": ("{s} makes {o}.", "In three large halls {s} makes {o} of all kinds."),
    "river": ("{s} lies on the {o}.", "With old walls and many gardens {s} lies on the {o}."),
    "birth": ("{s} was born in {o}.", "{s} was born in {o} on a cold winter night, they say."),
    "parent": ("{s} is a child of {o}.", "As all the neighbours know, {s} is the second child of {o}."),
    "hobby": ("{s} plays {o}.", "On Sunday evenings {s} plays {o} with some friends."),
    "fair": ("{s} holds a fair in {o}.", "For hundreds of years {s} holds a fair every {o}."),
}
# One document may tell a whole chain; such news exist for the persons of a slice only.
NEWS = {
    ("employer", "seat"): ("{} takes the tram to the {} offices in {}.", slice(0, None, 3)),
    ("employer", "goods"): ("{} shows visitors how {} makes {}.", slice(1, None, 3)),
    ("birth", "fair"): ("{} grew up in {} and never misses its fair in {}.", slice(2, None, 3)),
}

# A set: its question, and the chain of relations that leads from the person to the answer.
SETS = {
    "employer": ("Which company employs {s}?", ("employer",)),
    "goods": ("Which product comes from the employer of {s}?", ("employer", "goods")),
    "seat": ("Which city hosts the employer of {s}?", ("employer", "seat")),
    "month": ("In which month does the birthplace of {s} celebrate?", ("birth", "fair")),
    "river": ("Which river crosses the city of the employer of {s}?", ("employer", "seat", "river")),
}
ASKS = {  # the sub-query for one step of a chain
    "employer": "Which company employs {s}?",
    "goods": "What does {s} make?",
    "seat": "Where is {s} located?",
    "river": "Which river crosses {s}?",
    "birth": "Where was {s} born?",
    "fair": "When does {s} hold a fair?",
}


@dataclass(frozen=True)
class Document:
    """One sentence, and the facts (subject, relation, object) that it tells."""

    text: str
    facts: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True)
class Question:
    """A question of a set, the person it starts from, and its only right answer."""

    text: str
    person: str
    answer: str


def build(seed: int = 0) -> dict:
    """The corpus as it is stored: {"documents": [[text, facts], ...], "questions": {set: [[text, person, answer]]}}.

    Documents stand in random order. The first TRAIN questions of each set are for worked examples; their persons start
    no other question of any set.
    """
    rng = np.random.default_rng(seed)
    pairs = rng.permutation(len(FIRST) * len(LAST))[:PERSONS]
    persons = [f"{FIRST[i // len(LAST)]} {LAST[i % len(LAST)]}" for i in pairs]
    draw = {name: dict(zip(persons, rng.choice(values, PERSONS), strict=True))
            for name, values in (("employer", COMPANIES), ("birth", TOWNS), ("hobby", HOBBIES))}  # fmt: skip
    draw["parent"] = dict(zip(persons, map(str, np.roll(persons, 1)), strict=True))  # nobody is their own parent
    for name, subjects, objects in (("seat", COMPANIES, TOWNS), ("goods", COMPANIES, GOODS),
                                    ("river", TOWNS, RIVERS), ("fair", TOWNS, MONTHS)):  # fmt: skip
        draw[name] = dict(zip(subjects, rng.choice(objects, len(subjects)), strict=True))
    told = [[TELLS[relation][rng.integers(2)].format(s=s, o=o), [[s, relation, str(o)]]]
            for relation, table in draw.items() for s, o in table.items()]  # fmt: skip
    for chain, (text, part) in NEWS.items():
        for person in persons[part]:
            names = [person, *(follow(draw, person, chain[: i + 1]) for i in range(len(chain)))]
            facts = [list(fact) for fact in zip(names, chain, names[1:], strict=False)]
            told.append([text.format(*names), facts])
    questions = {}
    for name, (text, chain) in SETS.items():
        order = [*rng.permutation(persons[:TRAIN]), *rng.permutation(persons[TRAIN:])[:TEST]]
        questions[name] = [[text.format(s=s), str(s), follow(draw, str(s), chain)] for s in order]
    return {"documents": [told[i] for i in rng.permutation(len(told))], "questions": questions}


def follow(tables: dict[str, dict[str, str]], start: str, chain: tuple[str, ...]) -> str:
    """Where a chain of relations leads from `start`; tables: the object of each subject, by relation."""
    for relation in chain:
        start = tables[relation][start]
    return str(start)


def write(seed: int = 0) -> None:
    """Make data/iterdrag_corpus.json again and enter it in the manifest."""
    (paths.DATA / FILE).write_text(stored(build(seed)), encoding="utf-8")
    data.register(FILE, origin=f"generated by lib/workbook/knowledge.py, seed {seed}", licence="MIT",
                  made_by="workbook.knowledge.write()")  # fmt: skip


def stored(corpus: dict) -> str:
    """The corpus as JSON, one document or question a line."""
    lines = [",\n".join(json.dumps(row, separators=(",", ":")) for row in corpus["documents"])]
    sets = ",\n".join(f"{json.dumps(name)}: [\n" + ",\n".join(map(json.dumps, rows)) + "]"
                      for name, rows in corpus["questions"].items())  # fmt: skip
    return '{"documents": [\n' + lines[0] + '],\n"questions": {\n' + sets + "}}\n"


def load() -> tuple[list[Document], dict[str, list[Question]], dict[str, list[Question]]]:
    """Documents, training questions and test questions by set, from the file that ships."""
    corpus = json.loads(data.checked(FILE).read_text(encoding="utf-8"))
    documents = [Document(text, tuple(map(tuple, facts))) for text, facts in corpus["documents"]]
    questions = {name: [Question(*row) for row in rows] for name, rows in corpus["questions"].items()}
    train, test = ({name: rows[part] for name, rows in questions.items()}
                   for part in (slice(TRAIN), slice(TRAIN, None)))  # fmt: skip
    return documents, train, test


def supported(
    documents: Sequence[Document],
    find: Callable[[str], Sequence[int]],
    name: str,
    question: Question,
    *,
    iterative: bool,
) -> bool:
    """Whether retrieval alone allows an answer: each fact of the chain stands in a document that was found.

    find: places of documents for a query; it is asked the question and, if iterative, the sub-query of each step.
    """
    true = {(s, r): o for document in documents for s, r, o in document.facts}
    entity, facts = question.person, {fact for i in find(question.text) for fact in documents[i].facts}
    for relation in SETS[name][1]:
        if iterative:
            facts |= {fact for i in find(ASKS[relation].format(s=entity)) for fact in documents[i].facts}
        if (entity, relation, true[entity, relation]) not in facts:
            return False
        entity = true[entity, relation]
    return True


# -- a reader that makes no mistakes ----------------------------------------------------------------------------------


class Lookup:
    """Completes prompts by looking facts up in the documents that stand there: the perfect reader.

    questions: those that it can take apart; informed: it also knows what no document says, which makes it a teacher.
    Prompts and lines have the form of notebooks/test-time/iterdrag.ipynb; a missing fact is "unknown".
    """

    def __init__(self, documents: Sequence[Document], questions: dict[str, Iterable[Question]], *, informed=False):
        self.facts = {document.text: document.facts for document in documents}
        self.start = {q.text: (q.person, SETS[name][1]) for name, some in questions.items() for q in some}
        self.known = {(s, r): o for facts in self.facts.values() for s, r, o in facts} if informed else {}

    def __call__(self, rows: Sequence[int], prompts: Sequence[str], starts: Sequence[str]) -> list[str]:
        """The next line of each prompt: a sub-query if one is allowed and needed, else what the start asks for."""
        return [self._line(prompt.split("\n"), starts) for prompt in prompts]

    def _line(self, lines: list[str], starts: Sequence[str]) -> str:
        at = next(i for i, line in enumerate(lines) if line.startswith("Question: "))
        known = self.known | {(s, r): o for line in lines[:at] for s, r, o in self.facts.get(line, ())}
        entity, chain = self.start[lines[at].removeprefix("Question: ")]
        replies = [line.partition(": ")[2] for line in lines[at:] if line.startswith("Intermediate answer:")]
        entity, chain = [entity, *replies][-1], chain[len(replies) :]
        if starts[0].startswith("Follow") and chain:
            return f"{starts[0]} {ASKS[chain[0]].format(s=entity)}"
        for relation in chain[:1] if starts[0].startswith("Intermediate") else chain:
            entity = known.get((entity, relation), "unknown")
        return f"{starts[-1]} {entity}"
