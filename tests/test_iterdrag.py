"""The method of test-time/iterdrag against loops for one question; corpus, retrievers, reader, saturating laws."""

import re
import sys
from functools import partial
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import curve_fit
from sklearn.linear_model import LinearRegression
from test_mutations import fails, mutate
from transformers import LlamaConfig, LlamaForCausalLM

from workbook import answers, checkpoints, knowledge, measure, mixtures, notebook, paths, retrieval, saturation
from workbook.models.lm import Llama
from workbook.notebook import load_method
from workbook.reader import NARROW, Reader

NAME = "test-time/iterdrag"
rag = load_method(NAME)
DOCUMENTS, TRAIN, TEST = knowledge.load()
TEXTS = [document.text for document in DOCUMENTS]
SCORES = retrieval.bm25(TEXTS)
EVERYONE = {name: TRAIN[name] + TEST[name] for name in TEST}
PERFECT = knowledge.Lookup(DOCUMENTS, EVERYONE)


def words(text):
    return len(re.findall(r"\S+", text))


def find(k):
    """Retrieval as the notebook does it, written for the tests alone: sorted by score, then place; best last."""

    def places(query):
        scores = SCORES(query)
        return sorted(range(len(TEXTS)), key=lambda i: (-scores[i], i))[:k][::-1]

    return places


# -- the corpus --------------------------------------------------------------------------------------------------------


def test_corpus_is_made_again_byte_for_byte():
    stored = (paths.DATA / knowledge.FILE).read_bytes()
    assert knowledge.stored(knowledge.build(0)).encode() == stored
    assert len(stored) <= 60_000
    assert knowledge.build(1) != knowledge.build(0)


def test_answers_follow_from_the_documents():
    tables = {}
    for document in DOCUMENTS:
        for subject, relation, thing in document.facts:
            assert subject in document.text
            assert thing in document.text
            assert tables.setdefault(relation, {}).setdefault(subject, thing) == thing  # no two documents disagree
    for name, (text, chain) in knowledge.SETS.items():
        assert len(TRAIN[name]) == knowledge.TRAIN
        assert len({question.person for question in TEST[name]}) == knowledge.TEST
        for question in EVERYONE[name]:
            assert question.text == text.format(s=question.person)
            assert question.answer == knowledge.follow(tables, question.person, chain)


def test_persons_of_worked_examples_are_asked_about_nowhere_else():
    taught = {question.person for some in TRAIN.values() for question in some}
    assert not taught & {question.person for some in TEST.values() for question in some}


def test_second_hop_shares_no_word_with_the_question():
    """Not a single scored word: BM25 gives the later documents of a chain a score of 0."""
    alone = {document.facts[0]: i for i, document in enumerate(DOCUMENTS) if len(document.facts) == 1}
    true = {fact[:2]: fact[2] for document in DOCUMENTS for fact in document.facts}
    for name in ("goods", "seat", "month", "river"):
        for question in TEST[name]:
            entity, scores = question.person, SCORES(question.text)
            for step, relation in enumerate(knowledge.SETS[name][1]):
                fact = (entity, relation, true[entity, relation])
                assert (scores[alone[fact]] > 0) == (step == 0)
                entity = fact[2]


@pytest.mark.parametrize("name", knowledge.SETS)
def test_wanted_documents_are_not_always_found(name):
    """More documents help, one is not enough; a second retrieval helps where there is a second hop."""
    share = {(k, i): np.mean([knowledge.supported(DOCUMENTS, find(k), name, q, iterative=i) for q in TEST[name]])
             for k, i in product((1, 8, 30), (False, True))}  # fmt: skip
    assert share[1, False] < 0.5 < share[8, True]
    assert share[1, False] < share[8, False] + 1e-9
    if len(knowledge.SETS[name][1]) > 1:
        assert share[30, False] < 0.6
    assert share[30, True] == 1


# -- retrieval ---------------------------------------------------------------------------------------------------------


def test_bm25_is_its_formula():
    corpus = ["red fox", "The red red house by the lake", "a lake", "fox and fox and fox"]
    bags = [["red", "fox"], ["red", "red", "house", "lake"], ["lake"], ["fox", "fox", "fox"]]
    scores, mean = retrieval.bm25(corpus), np.mean([2, 4, 1, 3])
    for query in (["red"], ["fox", "lake"], ["house"]):
        for place, bag in enumerate(bags):
            total = 0
            for word in query:
                have, times = sum(word in other for other in bags), bag.count(word)
                rarity = np.log(1 + (4 - have + 0.5) / (have + 0.5))
                total += rarity * times / (times + 1.5 * (0.25 + 0.75 * len(bag) / mean))
            assert scores(" ".join(query))[place] == pytest.approx(total, abs=1e-5)


def test_a_query_of_unknown_words_scores_nothing():
    assert retrieval.bm25(["red fox", "blue lake"])("the zebra").tolist() == [0, 0]
    assert retrieval.tfidf(["red fox", "blue lake"])("zebra").tolist() == [0, 0]


def test_tfidf_is_a_cosine():
    scores = retrieval.tfidf(["red fox", "blue lake", "red lake"])("red fox")
    assert scores[0] == pytest.approx(1)
    assert scores[1] == 0
    assert 0 < scores[2] < 1


def test_best_document_stands_last_and_ties_keep_their_order():
    scores = np.array([1.0, 3.0, 1.0, 2.0, 1.0])
    assert rag.retrieve(lambda query: scores, "q", 4) == [2, 0, 3, 1]
    assert rag.retrieve(lambda query: scores, "q", 0) == []
    assert rag.retrieve(lambda query: scores, "q", 9) == [4, 2, 0, 3, 1]


# -- the loop ----------------------------------------------------------------------------------------------------------


def noisy(seed, chain=3):
    """A reader that misreads, repeats itself and stops when it likes, by the content of the prompt alone."""

    def line(text, starts):
        rng = np.random.default_rng([seed, len(text), sum(map(ord, text))])
        start = starts[rng.integers(len(starts))] if len(starts) > 1 and text.count("Follow up:") else starts[0]
        return f"{start} {['Falcon', 'Milton', 'Anna Reed', 'Who?'][rng.integers(4)]}"

    return lambda rows, prompts, starts: [line(text, starts) for text in prompts]


def one_by_one(question, places, write, n):
    """IterDRAG for one question and one n, request by request: (answer, tokens, requests, written, not read before)."""
    shown, lines, tokens, requests, written, new, old = list(places(question)), [], 0, 0, 0, 0, []

    def ask(*starts):
        nonlocal tokens, requests, written, new, old
        documents = "".join(TEXTS[i] + "\n" for i in shown)
        text = "\n" + ("Documents:\n" + documents if shown else "") + f"Question: {question}\n"
        text += "".join(line + "\n" for line in lines)
        tokens, requests = tokens + words(text), requests + 1
        line = write([0], [text], list(starts))[0]
        written += words(line[line.index(":") + 1 :])
        shown_now = text.split("\n")[:-1]
        same = next(
            (i for i, (a, b) in enumerate(zip(shown_now, old, strict=False)) if a != b), min(len(shown_now), len(old))
        )
        new, old = new + sum(map(words, shown_now[same:])), [*shown_now, line]
        return line

    for _ in range(n - 1):
        before = tokens, requests, written, new, old
        line = ask("Follow up:", "So the final answer is:")
        if not line.startswith("Follow up:") or line in lines:
            tokens, requests, written, new, old = before  # the final answer is this request
            break
        lines.append(line)
        shown += [i for i in places(line.removeprefix("Follow up:")) if i not in shown]
        lines.append(ask("Intermediate answer:"))
    answer = ask("So the final answer is:").removeprefix("So the final answer is:").strip()
    return answer, tokens, requests, written, new


@pytest.mark.parametrize(("seed", "k"), [(0, 2), (1, 3), (2, 0), (3, 5)])
def test_one_run_serves_all_numbers_of_rounds(seed, k):
    asked, write = [q.text for name in ("seat", "river") for q in TEST[name][:6]], noisy(seed)
    said, cost, _, _ = rag.iterdrag(asked, find(k), TEXTS, write, words, 4)
    for row, n in product(range(len(asked)), (1, 2, 3, 4)):
        alone = one_by_one(asked[row], find(k), write, n)
        assert (said[row, n - 1], *cost[row, n - 1]) == alone
    assert len(np.unique(cost[:, 3, 1])) > 1  # some went on, some stopped


@pytest.mark.parametrize("name", knowledge.SETS)
@pytest.mark.parametrize("k", [1, 4, 30])
def test_perfect_reader_is_right_where_retrieval_allows(name, k):
    asked, key = [q.text for q in TEST[name]], np.array([q.answer for q in TEST[name]])
    once = rag.drag(asked, partial(rag.retrieve, SCORES, k=k), TEXTS, PERFECT, words)[0]
    often = rag.iterdrag(asked, partial(rag.retrieve, SCORES, k=k), TEXTS, PERFECT, words, 4)[0]
    for said, iterative in ((once, False), (often, True)):
        allowed = [knowledge.supported(DOCUMENTS, find(k), name, q, iterative=iterative) for q in TEST[name]]
        assert (said[:, -1] == key).tolist() == allowed


def test_drag_reads_each_question_once():
    asked = [q.text for q in TEST["seat"][:5]]
    said, cost, lines, found = rag.drag(asked, find(3), TEXTS, noisy(0), words)
    texts = [f"Documents: {' '.join(TEXTS[i] for i in find(3)(q))} Question: {q}" for q in asked]
    assert cost[:, 0, 0].tolist() == cost[:, 0, 3].tolist() == [words(text) for text in texts]
    assert cost[:, 0, 2].tolist() == [words(answer) for answer in said[:, 0]]
    assert (*said.shape, 4) == cost.shape == (5, 1, 4)
    assert (cost[:, :, 1] == 1).all()
    assert lines == [[]] * 5
    assert found == [find(3)(q) for q in asked]


def test_prompt_leaves_out_what_is_not_there():
    assert rag.prompt([], "Who?") == "\nQuestion: Who?\n"
    assert rag.prompt(["A.", "B."], "Who?", ["Follow up: x"]) == "\nDocuments:\nA.\nB.\nQuestion: Who?\nFollow up: x\n"


def test_a_question_that_was_asked_before_ends_the_search():
    stubborn = lambda rows, prompts, starts: [f"{starts[0]} same"] * len(prompts)  # noqa: E731
    said, cost, lines, found = rag.iterdrag(["Anna Reed"], find(2), TEXTS, stubborn, words, 5)
    assert lines == [["Follow up: same", "Intermediate answer: same"]]
    assert cost[:, :, 1:3].tolist() == [[[1, 1], [3, 3], [3, 3], [3, 3], [3, 3]]]
    assert said.tolist() == [["same"] * 5]
    assert len(found[0]) == len(set(found[0]))


def test_rows_that_go_on_are_named():
    """Rows that have ended are not asked again."""
    seen = []

    def write(rows, prompts, starts):
        seen.append(list(rows))
        asks = starts[0] == "Follow up:"
        return [f"{starts[0] if not asks or row % 2 == 0 else starts[1]} {len(text)}" for row, text in
                zip(rows, prompts, strict=True)]  # fmt: skip

    rag.iterdrag(["a", "b", "c"], find(1), TEXTS, write, words, 2)
    assert seen == [[0, 1, 2], [0, 1, 2], [0, 2], [0, 2]]


@pytest.mark.parametrize(("name", "rounds"), [("seat", 1), ("seat", 3), ("employer", 2), ("employer", 1)])
def test_worked_examples_are_right_and_supported_ones_first(name, rounds):
    teacher = knowledge.Lookup(DOCUMENTS, EVERYONE, informed=True)
    blocks = rag.worked_examples(TRAIN[name], find(3), TEXTS, teacher, PERFECT, words, rounds)
    assert len(blocks) == knowledge.TRAIN
    by_text = {q.text: q for q in TRAIN[name]}
    flags = []
    for block in blocks:
        question = by_text[re.search(r"Question: (.*)\n", block)[1]]
        last = block.rstrip("\n").split("\n")[-1]
        assert last == f"{'Answer:' if rounds == 1 else 'So the final answer is:'} {question.answer}"
        assert block.startswith("\nDocuments:\n")
        assert block.endswith("\n")
        assert block.count("Follow up:") == block.count("Intermediate answer:") == rounds - 1
        flags.append(knowledge.supported(DOCUMENTS, find(3), name, question, iterative=rounds > 1))
    assert flags == sorted(flags, reverse=True)
    assert any(flags)


# -- the perfect reader ------------------------------------------------------------------------------------------------


def test_lookup_knows_what_it_is_shown_and_no_more():
    question = TEST["employer"][0]
    gold = next(d.text for d in DOCUMENTS if d.facts[0][:2] == (question.person, "employer") and len(d.facts) == 1)
    with_it, without = rag.prompt([gold], question.text), rag.prompt([TEXTS[0]], question.text)
    assert PERFECT([0, 1], [with_it, without], ["Answer:"]) == [f"Answer: {question.answer}", "Answer: unknown"]
    teacher = knowledge.Lookup(DOCUMENTS, EVERYONE, informed=True)
    assert teacher([0], [without], ["Answer:"]) == [f"Answer: {question.answer}"]


# -- budgets -----------------------------------------------------------------------------------------------------------


def test_budget_buys_the_best_setting_and_the_shortest_of_equals():
    score, longest = np.array([0.2, 0.5, 0.5, 0.9]), np.array([10, 40, 30, 100])
    assert rag.within_budget(score, longest, [5, 10, 30, 40, 99, 100]).tolist() == [-1, 0, 2, 2, 2, 3]


def test_optimal_performance_is_a_loop_over_settings():
    rng = np.random.default_rng(0)
    right, longest, half = rng.random((9, 10)) < 0.5, rng.permutation(9) * 10, rng.permutation(10) % 2
    budgets = [-5, 0, 25, 99]
    found = rag.optimal(right, longest, budgets, half)
    for question, column in np.ndindex(10, 4):
        able = [s for s in range(9) if longest[s] <= budgets[column]]
        others = [(right[s, half != half[question]].mean(), -longest[s], s) for s in able]
        assert found[question, column] == (right[max(others)[2], question] if others else 0)


def test_own_half_never_chooses():
    """If a half's questions change, its own settings stay."""
    rng = np.random.default_rng(1)
    right, half = rng.random((30, 12)) < 0.3, np.arange(12) % 2
    changed = right.copy()
    changed[:, half == 0] = rng.random((30, 6)) < 0.9
    longest = np.arange(30)
    first = rag.within_budget(right[:, half == 1].mean(1), longest, [29])[0]
    assert rag.optimal(changed, longest, [29], half)[half == 0, 0].tolist() == changed[first, half == 0].tolist()


# -- the allocation model ----------------------------------------------------------------------------------------------


def random_design(seed=0, n=60):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 9, size=(n, 3)), rng.random((n, 2)), rng


def test_design_is_the_formula():
    theta, gains, _ = random_design()
    a, b, c = np.array([0.3, 0.1, 0.2]), np.array([-0.07, -0.01, 0.0]), -0.7
    weights = np.r_[a, b[:2], c]
    found = rag.design(theta, gains, 0.01) @ weights
    for row, ((k, m, n), (doc, shot)) in enumerate(zip(theta, gains, strict=True)):
        i = np.array([doc, shot, 0])
        assert found[row] == pytest.approx((a + b * i) @ np.log(np.array([k, m, n]) + 0.01) + c)


def test_least_squares_is_that_of_scikit_learn():
    theta, gains, rng = random_design()
    columns, y = rag.design(theta, gains, 0.01), rng.normal(size=60)
    weights, shape = rag.fit_allocation(columns, y, ())
    assert shape == ()
    peer = LinearRegression().fit(columns[:, :5], y)
    np.testing.assert_allclose(weights, [*peer.coef_, peer.intercept_], atol=1e-9)
    np.testing.assert_allclose(rag.predict(columns, weights, ()), peer.predict(columns[:, :5]), atol=1e-9)


def test_planted_parameters_come_back():
    theta, gains, _ = random_design(1)
    columns, planted = rag.design(theta, gains, 0.01), np.array([0.3, 0.1, 0.2, -0.07, -0.01, 0.7])
    shape = (3.3, 1.81, 0.46, -2.18)
    y = saturation.sigmoid(columns @ planted, *shape)
    weights, _ = rag.fit_allocation(columns, y, shape)
    np.testing.assert_allclose(weights, planted, atol=1e-9)
    np.testing.assert_allclose(rag.predict(columns, weights, shape), y, atol=1e-9)


def test_fitted_sigmoid_predicts_saturated_scores():
    """Without knowing the sigmoid the model still predicts; a straight line does worse."""
    theta, gains, rng = random_design(2, 200)
    columns = rag.design(theta, gains, 0.01)
    y = saturation.sigmoid(columns @ [0.6, 0.4, 0.3, 0.0, 0.0, 0.2], 3.0, 2.0, 0.0, -1.6) + 0.02 * rng.normal(size=200)
    errors = [np.mean((rag.predict(columns, *rag.fit_allocation(columns, y, shape)) - y) ** 2) for shape in (None, ())]
    assert errors[0] < 0.5 * errors[1]


def test_one_task_cannot_tell_a_from_b():
    columns = rag.design(random_design()[0], np.tile([0.2, 0.1], (60, 1)), 0.01)
    assert np.linalg.matrix_rank(columns) == 4
    assert np.linalg.matrix_rank(rag.design(*random_design()[:2], 0.01)) == 6


def test_sigmoid_and_its_inverse():
    x, shape = np.linspace(-3, 3, 13), (3.3, 1.81, 0.46, -2.18)
    y = saturation.sigmoid(x, *shape)
    np.testing.assert_allclose(saturation.inverse_sigmoid(y, *shape), x, atol=1e-9)
    assert saturation.sigmoid(-0.46, *shape) == pytest.approx(3.3 / 2 - 2.18)
    for outside in (-2.18, 1.12, 5):
        with pytest.raises(ValueError, match=r"leaves the sigmoid's open range, -2.18 to 1.12"):
            saturation.inverse_sigmoid([0.0, outside], *shape)


def test_fitted_sigmoid_leaves_room_and_is_curve_fits():
    rng = np.random.default_rng(0)
    x = rng.normal(size=80)
    y = saturation.sigmoid(x, 3.0, 2.0, 0.3, -1.5) + 0.05 * rng.normal(size=80)
    height, slope, centre, floor = saturation.fit_sigmoid(x, y)
    assert floor <= y.min() - 0.25
    assert floor + height >= y.max() + 0.25
    free = curve_fit(saturation.sigmoid, x, y, p0=(3, 2, 0, -1.5))[0]
    apart = saturation.sigmoid(x, height, slope, centre, floor) - saturation.sigmoid(x, *free)
    assert np.abs(apart).max() < 0.2


def test_all_at_once_is_never_worse():
    theta, gains, rng = random_design(3)
    columns = rag.design(theta, gains, 0.01)
    y = rng.normal(size=60) + columns @ [0.3, 0.2, 0.1, 0, 0, 0]
    first = rag.fit_allocation(columns, y)
    fits = first, saturation.fit_at_once(columns, y, *first)
    apart, together = (np.mean((rag.predict(columns, *fit) - y) ** 2) for fit in fits)
    assert together <= apart + 1e-9


def test_held_out_rows_are_predicted_by_the_others():
    y, masks = np.array([1.0, 2, 3, 10]), [np.array([True, False, False, False]), np.array([False, False, False, True])]
    found = saturation.held_out(lambda f, y, x: np.full(len(x), y.mean()), np.ones((4, 1)), y, masks)
    assert found.tolist() == [5, 2, 3, 2]


# -- the reader --------------------------------------------------------------------------------------------------------


def reference_model():
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=300,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)  # fmt: skip
    return LlamaForCausalLM(config).eval()


REFERENCE = reference_model()
MODEL = Llama.from_transformers(REFERENCE)
SHARED = np.random.default_rng(0).integers(1, 300, size=12).tolist()


def generated(tokens, count):
    return REFERENCE.generate(torch.tensor([tokens]), max_new_tokens=count, do_sample=False)[0, -count:].tolist()


@pytest.mark.parametrize("visible", [[12, 12, 12], [12, 5, 0], [0, 0, 0]])
@pytest.mark.parametrize("forget", [False, True])
def test_lines_are_those_of_generate_whatever_was_read_before(visible, forget):
    """The same texts again, longer ones, ones that part early, fewer rows: always as if read for the first time."""
    rng = np.random.default_rng(1)
    reader = Reader(MODEL, answers.read_prefix(MODEL, SHARED), visible, forget=forget)
    rows = [rng.integers(1, 300, size=size).tolist() for size in (4, 9, 60)]
    for kept, same in (([0, 1, 2], 99), ([0, 1, 2], 99), ([0, 1, 2], 3), ([0, 2], 2), ([2], 99)):
        rows = [row[:same] + rng.integers(1, 300, size=rng.integers(1, 9)).tolist() for row in rows]
        lines = reader.write(kept, [rows[row] for row in kept], [[7, 8]], new_tokens=5, stop=[])
        for row, line in zip(kept, lines, strict=True):
            assert line[:2] == [7, 8]
            assert line[2:] == generated([*SHARED[: visible[row]], *rows[row], 7, 8], 5)


def test_what_was_read_is_not_read_again():
    reader = Reader(MODEL, answers.read_prefix(MODEL, SHARED), [12, 12])
    texts = [list(range(1, 40)), list(range(40, 90))]
    reader.write([0, 1], texts, [[7, 8]], new_tokens=1, stop=[])
    assert reader.computed == 39 + 50 + 4
    reader.write([0, 1], [[*text, 7, 8, 9] for text in texts], [[3]], new_tokens=1, stop=[])
    assert reader.computed == 39 + 50 + 4 + 4
    old = Reader(MODEL, answers.read_prefix(MODEL, SHARED), [12, 12], forget=True)
    for _ in range(2):
        old.write([0, 1], texts, [[7, 8]], new_tokens=1, stop=[])
    assert old.computed == 2 * (39 + 50 + 4)


def test_the_start_is_the_one_that_the_model_prefers():
    text = [4, 5, 6]
    with torch.no_grad():
        law = REFERENCE(torch.tensor([SHARED + text])).logits[0, -1]
    starts = [[10, 1], [20, 2], [30, 3]]
    expected = starts[int(law[[10, 20, 30]].argmax())]
    reader = Reader(MODEL, answers.read_prefix(MODEL, SHARED), [12])
    line = reader.write([0], [text], starts, new_tokens=3, stop=[])[0]
    assert line[:2] == expected
    assert line[2:] == generated([*SHARED, *text, *expected], 3)


def test_a_line_ends_before_a_stop_and_is_never_empty():
    text, free = [4, 5, 6], generated([*SHARED, 4, 5, 6, 7], 5)
    reader = Reader(MODEL, answers.read_prefix(MODEL, SHARED), [12, 12])
    stop = [free[2]]
    expected = free[: free.index(stop[0])] or None
    line = reader.write([0, 1], [text, text], [[7]], new_tokens=5, stop=stop)[0][1:]
    assert expected is None or line == expected
    first = reader.write([0, 1], [text, text], [[7]], new_tokens=5, stop=[free[0]])[0]
    assert len(first) > 1
    assert free[0] not in first[1:]


def test_many_and_few_new_tokens_meet_the_same_attention():
    """The blocked kernel and the split product give the same states."""
    texts = [list(range(1, NARROW + 30)), list(range(50, 90))]
    whole, steps = (Reader(MODEL, answers.read_prefix(MODEL, SHARED), [12, 4]) for _ in range(2))
    with torch.inference_mode():
        expected = whole._read([list(text) for text in texts])
        for size in range(1, max(map(len, texts)) + 1):
            found = steps._read([text[:size] for text in texts])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_writer_speaks_texts():
    class Letters:
        def encode(self, text):
            return [ord(letter) % 300 for letter in text]

        def batch_decode(self, rows):
            return ["".join(map(chr, row)) for row in rows]

    reader = Reader(MODEL, answers.read_prefix(MODEL, SHARED), [12])
    line = reader.writer(Letters(), {"A:": 3}, [])([0], ["ab"], ["A:"])[0]
    assert line.startswith("A:")
    assert len(line) == 5


# -- many settings -----------------------------------------------------------------------------------------------------


@pytest.fixture
def bench(monkeypatch):
    """A bench whose model writes at random, but alike each time."""
    torch.manual_seed(1)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, vocab_size=49_152,
                         num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None)  # fmt: skip
    model = Llama.from_transformers(LlamaForCausalLM(config).eval())
    monkeypatch.setattr(mixtures.Bench, "model", model)
    return mixtures.Bench(vars(rag), rounds=3)


def reader_behind(bench, parts):
    """A reader of one row behind all of `parts`, and its `write`."""
    prefix = [token for part in parts for token in part]
    reader = Reader(bench.model, answers.read_prefix(bench.model, prefix), [len(prefix)])
    return reader, reader.writer(bench.tokenizer, bench.limits, bench.stops)


def test_every_question_of_a_set_is_asked_by_equally_many_seeds():
    asked = [item for seed in range(4) for item in mixtures.items(seed, 16)]
    assert sorted(asked) == sorted(2 * list(range(knowledge.TEST)))
    assert mixtures.items(3, 16)[:8] == list(range(24, 32))
    assert mixtures.items(0, 12) == mixtures.items(0, 16)[:12]  # a short run asks the first of a long one


def test_a_seed_shuffles_worked_examples(bench):
    """Other examples or another order; the same ones again for the same seed; supported ones stay first."""
    text = lambda seed: bench.tokenizer.batch_decode(bench.examples("seat", "DRAG", 2, seed))  # noqa: E731
    assert text(1) != text(2)
    assert text(1) == text(1)
    assert sorted(text(1)) == sorted(text(2))
    assert text(1)[0] == text(2)[0] == mixtures.INTRO


@pytest.mark.parametrize("strategy", ["DRAG", "IterDRAG"])
def test_answers_are_counted_as_the_prompts_say(bench, strategy):
    """Lengths from all prompts of a question alone, tokenised with the examples before them."""
    table = bench.ask("seat", strategy, 2, [0, 2], [3, 5], seed=1)
    assert set(table.columns) == {*mixtures.UNIT, *mixtures.KEYS, *mixtures.FACTS}
    assert len(table) == 4 * (1 if strategy == "DRAG" else 2)  # one round is DRAG's
    assert (table.seed == 1).all()
    assert set(table.item) == {3, 5}
    last = table[table.n == table.n.max()]
    for _, row in last.iterrows():
        seen, parts = [], bench.examples("seat", strategy, 2, 1)[: row.m + 1]
        plain = reader_behind(bench, parts)[1]

        def write(rows, texts, starts, plain=plain, seen=seen):
            seen.append((texts[0], *plain(rows, texts, starts)))
            return [seen[-1][1]]

        run = rag.drag if strategy == "DRAG" else partial(rag.iterdrag, rounds=3)
        run([TEST["seat"][row["item"]].text], bench.find(2), bench.texts, write, bench.count)
        kept = {text: line for text, line in reversed(seen) if not line.startswith("Follow up:")}
        new = {line: text for text, line in reversed(seen) if line.startswith("Follow up:") and line in seen[-1][0]}
        kept |= {text: line for line, text in new.items()}  # a follow-up that was asked again is none
        head = sum(map(len, parts))
        assert row.requests == len(kept)
        assert row.length == sum(head + bench.count(text) for text in kept)
        assert row.written == sum(bench.count(line[line.index(":") + 1 :]) for line in kept.values())
        assert head < row.read <= row.length


def test_forward_passes_of_one_answer_are_those_of_the_reader(bench):
    """A reader that answers alone needs one pass a token and one a prompt, less one where the limit ends the line."""
    for item in range(4):
        row = bench.ask("seat", "DRAG", 2, [1], [item]).iloc[0]
        parts = bench.examples("seat", "DRAG", 2, 0)[:2]
        reader, write = reader_behind(bench, parts)
        rag.drag([TEST["seat"][item].text], bench.find(2), bench.texts, write, bench.count)
        counted = mixtures.passes(row.to_frame().T).iloc[0]
        assert counted - reader.passes == (row.written == bench.limits["Answer:"])


def test_a_run_alone_leaves_out_what_shorter_runs_answer(bench):
    calls = []
    write = mixtures.last_only(lambda *call: calls.append(call) or ["So the final answer is: x"], 3)
    for _ in range(3):
        line = write([0], ["text"], ["So the final answer is:"])
        write([0], ["text"], ["Follow up:", "So the final answer is:"])
    assert line == ["So the final answer is: x"]
    assert [call[2][0] for call in calls] == ["Follow up:", "Follow up:", "So the final answer is:", "Follow up:"]


def test_prices_of_tokens_and_passes_come_back():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"read": rng.integers(20, 2000, 6), "passes": rng.integers(2, 40, 6)})
    table["seconds"] = 0.002 * table["read"] + 0.05 * table.passes
    np.testing.assert_allclose(mixtures.prices(table), [0.002, 0.05])
    assert (mixtures.prices(table.assign(seconds=0.1 * table.passes - 1e-6 * table["read"])) >= 0).all()


def test_the_table_that_ships_comes_back(bench, tmp_path, monkeypatch):
    table = pd.concat([bench.ask("seat", way, 2, [0, 1], [0, 1], seed=seed) for way in ("DRAG", "IterDRAG")
                       for seed in (0, 1)], ignore_index=True)  # fmt: skip
    tensors, names = mixtures.packed(table)
    pd.testing.assert_frame_equal(mixtures.unpacked(tensors, names), table, check_dtype=False)
    with pytest.raises(ValueError, match="too large"):
        mixtures.packed(table.assign(length=40_000))
    monkeypatch.setattr(checkpoints, "load", lambda name: tensors)
    monkeypatch.setattr(checkpoints, "provenance", lambda name: names | {"retriever": "bm25"})
    live = table[table.seed == 0]
    assert len(mixtures.shipped(live, "bm25")) == len(table)  # all seeds
    assert len(mixtures.shipped(live[live.m == 1], "bm25")) == len(table[table.m == 1])
    for wanted, retriever in ((live, "tfidf"), (live.assign(k=3), "bm25"), (live.assign(task="goods"), "bm25"),
                              (pd.concat([live, live.assign(n=4)]), "bm25")):  # fmt: skip
        assert len(mixtures.shipped(wanted, retriever)) == 0


def test_what_ships_has_every_setting_for_every_question():
    facts = checkpoints.provenance("iterdrag_answers")
    table = mixtures.unpacked(checkpoints.load("iterdrag_answers"), facts)
    assert not table.duplicated([*mixtures.UNIT, *mixtures.KEYS]).any()
    sizes = table.groupby(["task", *mixtures.KEYS]).size()
    assert sizes.nunique() == 1
    assert len(table) == int(facts["answers"]) == sizes.iloc[0] * len(sizes)
    assert table.right.isin([0, 1]).all()
    assert (table.requests >= 1).all()
    assert (table.requests[table.n == 1] == 1).all()
    assert (table["read"] <= table.length).all()
    plain = table[table.m == 0].drop(columns="seed").drop_duplicates()
    assert not plain.duplicated(["task", "item", *mixtures.KEYS]).any()  # without examples a seed changes nothing
    assert (paths.DATA / "checkpoints" / "iterdrag_answers.safetensors").stat().st_size <= 150_000


# -- intervals ---------------------------------------------------------------------------------------------------------


def crossed_values(seeds, questions, seed_effect, question_effect, rng):
    index = pd.MultiIndex.from_product([["a"], range(seeds), range(questions)], names=mixtures.UNIT)
    effect = seed_effect * rng.normal(size=seeds)[:, None] + question_effect * rng.normal(size=questions)
    return pd.Series((effect + 0.01 * rng.normal(size=(seeds, questions))).ravel(), index)


def test_an_interval_is_wide_where_either_seeds_or_questions_differ():
    rng = np.random.default_rng(0)
    widths = []
    for effects in ((0, 0), (1, 0), (0, 1)):
        found = mixtures.crossed(crossed_values(12, 12, *effects, rng), draws=500)
        widths.append(found.high - found.low)
    assert min(widths[1:]) > 10 * widths[0]


def test_an_interval_covers_the_truth_where_a_bootstrap_over_answers_does_not():
    hits = np.zeros(2)
    for trial in range(60):
        values = crossed_values(8, 20, 1.0, 1.0, np.random.default_rng(trial))
        plain = values.set_axis(pd.MultiIndex.from_arrays([["a"] * 160, [0] * 160, range(160)], names=mixtures.UNIT))
        found = [mixtures.crossed(some, draws=300) for some in (values, plain)]
        hits += [m.low <= 0 <= m.high for m in found]
    assert hits[0] >= 0.85 * 60
    assert hits[1] < 0.7 * 60


def test_with_one_seed_an_interval_is_the_bootstrap_over_questions():
    values = crossed_values(1, 30, 0, 1, np.random.default_rng(0))
    found, plain = (way(values, draws=20_000, unit="points") for way in (mixtures.crossed, measure.bootstrap))
    assert (found.value, found.low, found.high) == pytest.approx((plain.value, plain.low, plain.high), abs=0.02)
    assert (found.n, found.unit) == (plain.n, plain.unit)
    assert mixtures.crossed(crossed_values(4, 30, 0, 1, np.random.default_rng(0))).n == 30


def test_rows_of_a_statistic_are_drawn_together():
    values = crossed_values(3, 9, 1, 1, np.random.default_rng(0)).to_frame("x").assign(y=lambda t: 2 * t.x)
    found = mixtures.crossed(values, lambda rows: rows[:, 1].mean() / rows[:, 0].mean(), draws=100)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))


def test_the_short_way_to_a_mean_is_the_long_one():
    values = crossed_values(4, 9, 1, 1, np.random.default_rng(0))
    long, short = (mixtures.crossed(values, way, draws=200) for way in (lambda rows: rows.mean(), np.mean))
    assert (short.low, short.high) == pytest.approx((long.low, long.high))


def test_bands_leave_out_what_is_not_everywhere():
    values = crossed_values(2, 4, 1, 1, np.random.default_rng(0))
    table = pd.DataFrame({8: values, 16: values.where(values > 0), 32: 2 * values}).rename_axis(columns="budget")
    found = mixtures.bands(table, draws=50)
    assert found.index.tolist() == [8, 32]
    assert found.index.name == "budget"
    assert found.value.tolist() == pytest.approx([values.mean(), 2 * values.mean()])
    single = mixtures.crossed(2 * values, draws=50)
    assert found.loc[32].tolist() == pytest.approx([single.value, single.low, single.high])


# -- the notebook ------------------------------------------------------------------------------------------------------


def test_exercises():
    places, write = lambda query: list(range(10)), lambda *call: ["Answer: a"]
    block = rag.drag(["q"], places, ["word"] * 10, write, lambda text: 100 * text.count("word") + 20)[1][0, 0, 0]
    assert 5 * block == 5100
    cost = rag.iterdrag([TEST["seat"][0].text], find(30), TEXTS, PERFECT, words, 5)[1]
    assert cost[0, -1, 1] == 5
    fit = np.array([0.325, 0.101, 0.177, -0.067, -0.008, -0.730])
    gain = np.diff(rag.design([[1, 0, 1], [10, 0, 1]], [[0.25, 0]] * 2, 0.01) @ fit)[0]
    assert gain == pytest.approx(0.707, abs=5e-4)


@pytest.mark.parametrize(("key", "value"), [("datasets", ["cities"]), ("k_grid", [0]), ("retriever", "dense")])
def test_a_wrong_parameter_is_refused(key, value):
    declared = notebook.read_parameters(notebook.path_of(NAME))
    with pytest.raises(notebook.ParameterError, match=key):
        notebook.check_parameters(NAME, declared, {key: value})


# -- one wrong sign is noticed -----------------------------------------------------------------------------------------

MUTATIONS = [
    ("np.argsort(-scores(query)", "np.argsort(scores(query)"),
    ("[:k][::-1].tolist()", "[:k].tolist()"),
    ("said[row, n:], cost[row, n:] = ", "said[row, n:], cost[row, n] = "),
    ("spent[row] + price(text", "price(text"),
    ("tokens - count(known)", "tokens"),
    ("pair[0] == pair[1]", "True"),
    ("line.removeprefix(start)", "line"),
    ("price(text, line, seen[row], count)", 'price(text, line, "", count)'),
    ("if n + 1 == rounds:", "if n == rounds:"),
    ("step[1].startswith(FOLLOW) and step[1] not in lines[step[0]]", "step[1].startswith(FOLLOW)"),
    ("if i not in found[row]]", "]"),
    ("found[row] = found[row] + [", "found[row] = ["),
    ("np.argsort(missing, kind", "np.argsort(np.logical_not(missing), kind"),
    ("np.lexsort((longest, -np.asarray(score)))", "np.lexsort((longest, np.asarray(score)))"),
    ("<= np.asarray(budgets)", "< np.asarray(budgets)"),
    ("half != side", "half == side"),
    ("np.asarray(theta, float) + epsilon", "np.asarray(theta, float) + 1"),
    ("np.asarray(gains) * logs[:, :2]", "np.asarray(gains) * logs[:, 1:]"),
    ("inverse_sigmoid(y, *shape) if shape else y", "y"),
    ("return sigmoid(columns @ weights, *shape) if shape", "return columns @ weights if shape"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    """The fast tests of the method alone must notice."""
    monkeypatch.setattr(sys.modules[__name__], "rag", mutate(NAME, old, new, tmp_path, monkeypatch))
    fast = [
        test_best_document_stands_last_and_ties_keep_their_order, test_design_is_the_formula,
        test_budget_buys_the_best_setting_and_the_shortest_of_equals, test_own_half_never_chooses,
        test_optimal_performance_is_a_loop_over_settings, test_planted_parameters_come_back,
        test_fitted_sigmoid_predicts_saturated_scores, test_a_question_that_was_asked_before_ends_the_search,
        test_rows_that_go_on_are_named, partial(test_one_run_serves_all_numbers_of_rounds, 0, 2),
        partial(test_one_run_serves_all_numbers_of_rounds, 3, 5),
        partial(test_worked_examples_are_right_and_supported_ones_first, "seat", 3), test_drag_reads_each_question_once,
    ]  # fmt: skip
    assert any(map(fails, fast)), f"nothing noticed that {old!r} became {new!r}"
