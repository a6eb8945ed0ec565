"""The method of test-time/multilingual-samples against enumeration and other libraries; the sampler, pools, rewards."""

import json
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import test_mutations
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper

from workbook import answers, multilingual, notebook, pools, rewards
from workbook.models.lm import Llama
from workbook.notebook import load_method

samples = load_method("test-time/multilingual-samples")


def reference_model():
    """A small random Llama of transformers, the same at every call."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48, intermediate_size=64, num_hidden_layers=2, vocab_size=211, num_attention_heads=6,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


REFERENCE = reference_model()
MODEL = Llama.from_transformers(REFERENCE)
SHARED = [5, 9, 77, 31, 200, 8, 4, 4, 9]
QUESTIONS = [[17, 3], [99, 98, 97, 96, 95], [1, 2, 3], [17, 3]]


def full_logits(tokens):
    """Logits after every token of one text, by transformers."""
    with torch.no_grad():
        return REFERENCE(torch.tensor([tokens])).logits[0]


# -- the law and the pools ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tau", "base"), [(0.7, 0.1), (1.5, 0.02), (1.0, 0.0), (0.3, 1.0)])
def test_law_is_that_of_transformers(tau, base):
    logits = torch.randn(6, 500, generator=torch.Generator().manual_seed(1)) * 3
    warped = TemperatureLogitsWarper(tau)(None, logits)
    expected = (MinPLogitsWarper(base)(None, warped) if base else warped).softmax(-1)
    torch.testing.assert_close(samples.pruned(logits, torch.full((6,), tau), base), expected, atol=1e-6, rtol=1e-5)


def test_law_prunes_after_the_temperature():
    """At a high temperature a token survives that is rare at temperature 1."""
    logits = torch.tensor([[0.0, -3.0]])  # ratio 0.05 at temperature 1, 0.22 at 2
    assert samples.pruned(logits, torch.tensor([1.0]), 0.1)[0, 1] == 0
    assert samples.pruned(logits, torch.tensor([2.0]), 0.1)[0, 1] > 0.1


def test_temperature_zero_is_greedy_beside_warm_rows():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    law = samples.pruned(logits, torch.tensor([0.0, 1.0, 0.0]), 0.0)
    assert law[0, logits[0].argmax()] == 1
    assert law[2].sum() == 1
    torch.testing.assert_close(law[1], logits[1].softmax(-1))


@pytest.mark.parametrize("hedged", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_pool_quality_is_the_mean_over_all_pools(n, hedged):
    rng = np.random.default_rng(n)
    values, greedy = np.round(rng.random(6), 1), 0.4
    drawn = [[*pool, *[greedy] * hedged] for pool in combinations(values, n - hedged)]
    expected = [np.mean([f(pool) for pool in drawn]) for f in (max, np.mean, min)]
    np.testing.assert_allclose(samples.pool_quality(values, greedy, n, hedged), expected, atol=1e-12)


def test_pool_quality_refuses_more_answers_than_samples():
    with pytest.raises(ValueError, match="n = 4 of a pool of 3: 1 to 3"):
        samples.pool_quality([0, 1, 1], 0.0, 4, False)


def test_hedging_replaces_one_sample_and_adds_none():
    groups = [np.arange(1, 9)]
    plain, hedged = (samples.draw_pools(groups, 5, flag, 500, 0) for flag in (False, True))
    assert plain.shape == hedged.shape == (500, 5)
    assert not (plain == 0).any()
    assert ((hedged == 0).sum(1) == 1).all()
    for pool in (*plain, *hedged):
        assert len(set(pool)) == 5


def test_every_sample_and_every_place_is_equally_likely():
    drawn = samples.draw_pools([np.arange(1, 7)], 4, True, 6000, 1)
    assert np.bincount(drawn.ravel(), minlength=7)[1:] == pytest.approx(3000, abs=200)
    assert (drawn == 0).mean(0) == pytest.approx(0.25, abs=0.03)


def test_mixed_pools_take_the_temperatures_in_turn():
    groups = np.arange(1, 13).reshape(3, 4)  # three temperatures, four samples each
    for pool in samples.draw_pools(groups, 5, True, 50, 0):
        temperatures = sorted((pool[pool > 0] - 1) // 4)
        assert temperatures == [0, 0, 1, 2]


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="6 answers of 5 samples: draw more"):
        samples.draw_pools([np.arange(5)], 6, False, 3, 0)
    assert samples.draw_pools([np.arange(1, 6)], 6, True, 3, 0).shape == (3, 6)


# -- the rules ---------------------------------------------------------------------------------------------------------


def random_pool(seed, n=5, m=3):
    rng = np.random.default_rng(seed)
    keys = rng.integers(3, size=n)
    alike = rng.random((n, n + m))
    return keys, samples.Pool(
        logprob=-10 * rng.random(n), tokens=rng.integers(1, 9, n), reward=rng.normal(size=n),
        same=keys[:, None] == keys, utility=alike[:, :n], cross=alike[:, n:],
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_rules_are_their_definitions(seed):
    keys, pool = random_pool(seed)
    n, m = pool.cross.shape
    votes = [sum(keys[i] == keys[j] for j in range(n)) for i in range(n)]
    own = [sum(pool.utility[i, j] for j in range(n)) / n for i in range(n)]
    both = [(n * own[i] + sum(pool.cross[i, j] for j in range(m))) / (n + m) for i in range(n)]
    assert samples.majority(pool) == votes.index(max(votes))
    assert samples.mbr(pool) == own.index(max(own))
    assert samples.x_mbr(pool) == both.index(max(both))
    assert samples.best_of_n(pool) == list(pool.reward).index(max(pool.reward))
    assert samples.likelihood(pool) == max(range(n), key=lambda i: pool.logprob[i] / pool.tokens[i])


def test_rules_take_many_pools_at_once():
    single = [random_pool(seed)[1] for seed in range(4)]
    stacked = samples.Pool(**{name: np.stack([getattr(p, name) for p in single]) for name in vars(single[0])})
    for rule in (samples.majority, samples.mbr, samples.x_mbr, samples.best_of_n, samples.likelihood):
        assert rule(stacked).tolist() == [int(rule(pool)) for pool in single]


def test_foreign_evidence_votes_and_is_never_chosen():
    """Three wrong against two right candidates; the voters, more than the candidates, side with the two."""
    said, heard = np.array([12, 12, 30, 30, 30]), np.full(9, 12)
    pool = samples.Pool(utility=said[:, None] == said, cross=said[:, None] == heard)
    assert said[samples.mbr(pool)] == 30
    assert said[samples.x_mbr(pool)] == 12
    assert samples.x_mbr(pool) < len(said)


def test_each_voter_weighs_the_same():
    """One candidate's friend at home against one abroad: many voters at home outweigh one abroad."""
    pool = samples.Pool(utility=np.array([[1, 1, 0.0], [1, 1, 0], [0, 0, 1]]), cross=np.array([[0.0], [0], [1]]))
    assert samples.x_mbr(pool) == 0  # 2 + 0 and 1 + 1 tie: the first wins; weighing kinds alike would give 2


class Judge:
    """Stands in for the model in CHOPS: an encoder that remembers, and votes that prefer a text or a place."""

    def __init__(self, monkeypatch, favourite=None, place=None):
        self.favourite, self.place, self.asked = favourite, place, []
        monkeypatch.setattr(samples.answers, "sample", self.sample)
        monkeypatch.setattr(samples.answers, "read_answers", self.read)
        monkeypatch.setattr(samples.answers, "next_logits", lambda model, states: states)

    def encode(self, text):
        return [ord(letter) for letter in text]

    def sample(self, model, prefix, tasks, temperatures, **options):
        assert list(temperatures) == [0.0]
        self.tasks = ["".join(map(chr, task)) for task in tasks]
        return answers.Answers(np.array([[[35, -1]]] * len(tasks)), None, None, 0, 0, 0, 0.0)

    def read(self, model, prefix, heads, shown):
        rows = []
        for head, orders in zip(heads, shown, strict=True):
            assert "".join(map(chr, head)).endswith("Checklist:#")  # the checklist, without what is behind its end
            for order in orders:
                *lines, best = "".join(map(chr, order)).strip("\n").split("\n")
                assert best == "Best:"
                logits = torch.zeros(200)
                for i, line in enumerate(lines):
                    letter, text = line.split(": ")
                    assert letter == chr(65 + i)
                    logits[65 + i] = 3.0 * (text == self.favourite) + 2.0 * (i == self.place)
                rows.append(logits)
        return torch.stack(rows)


POOLS = np.array([["a", "b", "c"], ["c", "a", "b"], ["b", "c", "a"]], dtype=object)


def run_chops(judge):
    letters = [65, 66, 67]
    return samples.chops(None, None, judge.encode, ["x", "y", "z"], POOLS, letters, new_tokens=2, stop=[])


def test_chops_finds_the_favourite_wherever_it_stands(monkeypatch):
    choice, votes, tokens = run_chops(Judge(monkeypatch, favourite="c"))
    assert [pool[i] for pool, i in zip(POOLS, choice, strict=True)] == ["c", "c", "c"]
    assert votes.shape == (3, 2, 3)
    assert tokens.tolist() == [len("Task: x\nChecklist:#") + 2 * len("\nA: a\nB: b\nC: c\nBest:")] * 3


def test_chops_cancels_a_preference_for_a_place(monkeypatch):
    """A judge that likes the first place and knows the answer: both orders together cancel the place."""
    choice, votes, _ = run_chops(Judge(monkeypatch, favourite="b", place=0))
    assert [pool[i] for pool, i in zip(POOLS, choice, strict=True)] == ["b", "b", "b"]
    assert (votes.argmax(-1) == 0).any()


# -- the sampler -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [SHARED, []])
@pytest.mark.parametrize("rows", [1, 3, 512])
def test_sampler_scores_as_plain_passes_do(shared, rows):
    run = answers.sample(
        MODEL, answers.read_prefix(MODEL, shared), QUESTIONS, [0.0, 1.0, 1.4, 1.4], new_tokens=5, seed=3, rows=rows
    )
    for question, tokens, logprob in zip(QUESTIONS, run.tokens, run.logprob, strict=True):
        start = len(shared) + len(question) - 1
        for new, score in zip(tokens, logprob, strict=True):
            law = full_logits([*shared, *question, *new])[start : start + 5].log_softmax(-1)
            assert law.gather(1, torch.from_numpy(new)[:, None]).sum().item() == pytest.approx(score, abs=1e-3)
        greedy = full_logits([*shared, *question, *tokens[0]])[start : start + 5].argmax(-1)
        assert greedy.tolist() == tokens[0].tolist()


def test_batching_and_merging_change_nothing():
    """The same random numbers, whatever the batches; two equal questions with other numbers get other answers."""
    prefix, options = answers.read_prefix(MODEL, SHARED), {"new_tokens": 6, "seed": 7}
    runs = [answers.sample(MODEL, prefix, QUESTIONS, [0.8] * 9, rows=rows, **options) for rows in (9, 20, 512)]
    for run in runs[1:]:
        np.testing.assert_array_equal(run.tokens, runs[0].tokens)
    assert (runs[0].tokens[0] != runs[0].tokens[3]).any()
    assert runs[0].passes > runs[2].passes


def test_answers_that_begin_alike_are_computed_once():
    prefix = answers.read_prefix(MODEL, SHARED)
    run = answers.sample(MODEL, prefix, QUESTIONS[:1], [0.0] * 50, new_tokens=6)
    assert run.computed == len(QUESTIONS[0]) + 5  # as many as for one answer; the last token is not read again
    assert run.written.sum() == 300


def test_sampler_draws_from_the_exact_law_of_two_tokens():
    """Counts of two-token answers against their exact probabilities, chi-square over the likelier ones."""
    prefix, n = answers.read_prefix(MODEL, SHARED), 4000
    run = answers.sample(MODEL, prefix, [QUESTIONS[0]], [0.7] * n, new_tokens=2, seed=1,
                         law=lambda logits, t: samples.pruned(logits * 12, t, 0.1), rows=n)  # fmt: skip
    first = samples.pruned(full_logits(SHARED + QUESTIONS[0])[-1:] * 12, torch.tensor([0.7]), 0.1)[0]
    pairs = [f"{a},{b}" for a, b in run.tokens[0]]
    exact = {}
    for a in torch.nonzero(first)[:, 0].tolist():
        second = samples.pruned(full_logits([*SHARED, *QUESTIONS[0], a])[-1:] * 12, torch.tensor([0.7]), 0.1)[0]
        exact |= {f"{a},{b}": float(first[a] * second[b]) for b in torch.nonzero(second)[:, 0].tolist()}
    assert set(pairs) <= set(exact)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    likely = [pair for pair, p in exact.items() if n * p >= 10]
    counts = pd.Series(pairs).value_counts().reindex(likely, fill_value=0).to_numpy()
    expected = n * np.array([exact[pair] for pair in likely])
    assert len(likely) > 5
    assert ((counts - expected) ** 2 / expected).sum() < len(likely) + 4 * (2 * len(likely)) ** 0.5


def test_an_answer_ends_before_a_stop_token():
    prefix = answers.read_prefix(MODEL, SHARED)
    free = answers.sample(MODEL, prefix, QUESTIONS, [0.0, 0.9], new_tokens=6, seed=2)
    stop = [int(free.tokens[0, 0, 2]), int(free.tokens[1, 1, 0])]
    run = answers.sample(MODEL, prefix, QUESTIONS, [0.0, 0.9], new_tokens=6, seed=2, stop=stop)
    for before, after, written in zip(
        free.tokens.reshape(-1, 6), run.tokens.reshape(-1, 6), run.written.ravel(), strict=True
    ):
        ends = [at for at, token in enumerate(before) if token in stop] or [6]
        assert after.tolist() == [*before[: ends[0]], *[-1] * (6 - ends[0])]
        assert written == min(ends[0] + 1, 6)


def test_empty_questions_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        answers.sample(MODEL, answers.read_prefix(MODEL, SHARED), [[1], []], [0.0], new_tokens=2)


def test_draw_is_inversion_and_never_gives_what_has_no_mass():
    law = torch.tensor([[0.0, 0.2, 0.0, 0.8, 0.0], [0.5, 0.0, 0.0, 0.0, 0.5]])
    uniform = torch.tensor([0.0, 0.1999, 0.2001, 1 - 2**-53, 0.4999, 0.5001], dtype=torch.float64)
    row = torch.tensor([0, 0, 0, 0, 1, 1])
    for block in (2, 3, 256):
        assert answers.draw(law, row, uniform, block=block).tolist() == [1, 1, 3, 3, 0, 4]


def test_answers_are_read_once_for_their_question():
    several = [[[3, 4], [9]], [], [[8, 8, 8, 2]], [[1]]]
    prefix = answers.read_prefix(MODEL, SHARED)
    for rows in (1, 2, 99):
        states = answers.read_answers(MODEL, prefix, QUESTIONS, several, rows=rows)
        logits = answers.next_logits(MODEL, states)
        texts = [[*SHARED, *question, *a] for question, many in zip(QUESTIONS, several, strict=True) for a in many]
        for text, found in zip(texts, logits, strict=True):
            torch.testing.assert_close(found, full_logits(text)[-1], atol=1e-4, rtol=1e-4)


def test_reward_is_the_log_odds_of_yes_and_equal_answers_share_it():
    def encode(text):
        return [ord(letter) % 211 for letter in text]

    texts = np.array([["ab", "c", "ab"], ["c", "c", "d"]], dtype=object)
    prefix = answers.read_prefix(MODEL, SHARED)
    found = rewards.self_reward(MODEL, prefix, encode, QUESTIONS[:2], texts, asks="?", replies=("y", "n"))
    for row, column in product(range(2), range(3)):
        logits = full_logits([*SHARED, *QUESTIONS[row], *encode(f" {texts[row, column]}?")])[-1]
        assert found[row, column] == pytest.approx(float(logits[ord("y")] - logits[ord("n")]), abs=1e-4)
    assert found[0, 0] == found[0, 2]


def test_peer_writes_what_the_sampler_writes():
    """transformers' generate behind a cached prefix, at a temperature near zero."""
    run = answers.sample(MODEL, answers.read_prefix(MODEL, SHARED), QUESTIONS, [0.0], new_tokens=5)
    peer = answers.generate(REFERENCE, SHARED, QUESTIONS, 2, temperature=1e-4, new_tokens=5, stop=[210])
    np.testing.assert_array_equal(peer.numpy().reshape(4, 2, 5), run.tokens.repeat(2, axis=1))


# -- what a pool is worth ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4, 6])
def test_expected_best_is_the_mean_over_subsets(n):
    rng = np.random.default_rng(n)
    values, scores = rng.random(6), np.array([0.3, 0.1, 0.3, 0.9, 0.9, 0.2])  # two ties
    means = []
    for subset in combinations(range(6), n):
        top = max(scores[list(subset)])
        means.append(np.mean([values[i] for i in subset if scores[i] == top]))
    tied = [np.mean(values[scores == score]) for score in scores]
    shared = [tied[max(subset, key=lambda i: scores[i])] for subset in combinations(range(6), n)]
    assert pools.expected_best(values, scores, n) == pytest.approx(np.mean(shared), abs=1e-12)
    assert np.mean(means) == pytest.approx(np.mean(shared), abs=1e-12)  # ties are shared fairly


@pytest.mark.parametrize(("right", "n"), [(0, 3), (1, 3), (4, 5), (6, 1)])
def test_maximum_of_right_and_wrong_is_the_coverage(right, n):
    values = np.arange(8) < right
    by_hand = np.mean([any(subset) for subset in combinations(values, n)])
    assert pools.expected_maximum(values, n) == pytest.approx(by_hand, abs=1e-12)
    assert pools.expected_minimum(values, n) == pytest.approx(np.mean([all(s) for s in combinations(values, n)]))


@pytest.mark.parametrize("n", [1, 3, 4, 7])
def test_majority_over_all_subsets(n):
    groups, values = np.array(list("aabbbcd")), np.array([1, 1, 0, 0, 0, 1, 0.5])
    rates = []
    for subset in combinations(range(7), n):
        counts = {g: sum(groups[i] == g for i in subset) for g in set(groups[list(subset)])}
        winners = [g for g, count in counts.items() if count == max(counts.values())]
        rates.append(np.mean([np.mean([values[i] for i in subset if groups[i] == g]) for g in winners]))
    assert pools.expected_majority(groups, values, n) == pytest.approx(np.mean(rates), abs=1e-12)
    assert pools.expected_majority(groups, values, n, most=20, seed=1) == pytest.approx(np.mean(rates), abs=0.2)


@pytest.mark.parametrize("n", [0, 4])
def test_pool_sizes_out_of_range_are_refused(n):
    for call in (pools.expected_majority, pools.expected_best):
        with pytest.raises(ValueError, match=f"n = {n} of a pool of 3: 1 to 3 allowed"):
            call([1, 2, 3], [0, 1, 1], n)


def test_a_question_counts_once_in_all_its_languages():
    rows = pd.DataFrame({"task": "t", "item": [0, 0, 1], "language": ["en", "de", "en"], "right": [1.0, 0.0, 1.0]})
    assert pools.by_question(rows).tolist() == [0.5, 1.0]
    found = pools.estimate(pools.by_question(rows), pools.by_question(rows[rows.language == "en"]))
    assert (found.value, found.n, found.unit) == (-25, 2, "points")
    table = pools.summary(rows, ["language"], also=["item"])
    assert table.set_index("language").loc["en", ["value", "item"]].tolist() == [100, 0.5]


# -- the questions -----------------------------------------------------------------------------------------------------


def test_questions_are_the_same_in_every_language():
    for task in multilingual.TASKS:
        sets = {language: multilingual.questions(task, language, 30, 4) for language in multilingual.LANGUAGES}
        assert len(sets["en"].question.unique()) >= 25
    numbers = [sets_.right.str.split("=").str[-1].tolist() for sets_ in (
        multilingual.questions("word problems", language, 30, 4) for language in multilingual.LANGUAGES)]  # fmt: skip
    assert all(row == numbers[0] for row in numbers)


def test_right_answers_are_right_and_wrong_ones_wrong():
    for language in multilingual.LANGUAGES:
        problems = multilingual.questions("word problems", language, 60, 0)
        for text in (*problems.right, *problems.wrong):
            left, value = text.split(" = ")
            assert eval(left) == int(value) > 0 or "-" in left
        assert (problems.right != problems.wrong).all()
        names = multilingual.questions("country names", language, 60, 0)
        _, right, _ = multilingual.grade("country names", names[["right", "wrong"]].to_numpy(), names.right)
        assert right.tolist() == [[True, False]] * 60
    german = multilingual.questions("country names", "de", 60, 0)
    assert german.question.str.startswith("Englisch: ").all()
    assert "Deutschland" in {*multilingual.questions("country names", "de", 100, 0).right}


@pytest.mark.parametrize(
    ("text", "expected"),
    [("7 + 5 = 12", "12"), ("7+5=12", "12"), ("12", "12"), ("3 - 5 = -2", "-2"), ("no", ""), ("", "")],
)
def test_the_number_behind_the_last_equals_sign_counts(text, expected):
    assert multilingual.key("word problems", text) == expected


def test_grades_forgive_case_and_accents_only():
    texts = np.array([["peru", "Perú", "PERU ", "Per"]], dtype=object)
    keys, right, quality = multilingual.grade("country names", texts, ["Perú"])
    assert right.tolist() == [[True, True, True, False]]
    assert quality[0, 0] == 1
    assert 0 < quality[0, 3] < 1
    assert keys[0, 1] == "peru"


@pytest.mark.parametrize(
    ("task", "language", "count"), [("sums", "en", 3), ("country names", "xx", 3), ("country names", "en", 999)]
)
def test_unknown_tasks_languages_and_too_many_countries_are_refused(task, language, count):
    with pytest.raises(ValueError, match=r"languages en, es|there are"):
        multilingual.questions(task, language, count, 0)


def test_prompts_end_where_the_question_begins():
    for task in multilingual.TASKS:
        items = multilingual.questions(task, "de", 6, 0)
        answering, judging, choosing = multilingual.prompts(items, 5)
        assert (answering.count("\n\n"), judging.count("\n\n")) == (6, 12)
        assert judging.count("Correct: yes") == judging.count("Correct: no") == 6
        for n, block in enumerate(choosing.strip().split("\n\n")):
            lines = dict(line.split(": ", 1) for line in block.split("\n")[-6:])
            assert lines[lines["Best"]] == items.right[n]
            assert len({lines[letter] for letter in "ABCDE"}) == 5
        assert sorted(line[-1] for line in choosing.split("\n") if line.startswith("Best: ")) == list("ABCDE")


# -- the notebook ------------------------------------------------------------------------------------------------------


def test_exercises():
    many = np.r_[np.ones(300), np.zeros(700)]
    hope, _, risk = samples.pool_quality(many, 0.0, 5, False)
    assert hope == pytest.approx(0.832, abs=2e-3)
    assert risk == pytest.approx(0.0024, abs=2e-4)
    assert samples.pool_quality(many, 0.0, 5, True)[0] == pytest.approx(0.760, abs=2e-3)
    assert pools.expected_maximum(np.arange(8) < 3, 5) == pytest.approx(55 / 56)


def test_a_wrong_parameter_is_refused():
    declared = notebook.read_parameters(notebook.path_of("test-time/multilingual-samples"))
    with pytest.raises(notebook.ParameterError, match=r'languages\[0\] = "ru" is not allowed'):
        notebook.check_parameters("test-time/multilingual-samples", declared, {"languages": ["ru"]})


MUTATIONS = [
    ("law >= base * law.amax", "law <= base * law.amax"),
    ("answers.tempered(logits, temperature)", "answers.tempered(logits, temperature * 0 + 1)"),
    ("law / law.sum(-1, keepdim=True)", "law"),
    ("expected_maximum(high, n - 1)", "expected_maximum(high, n)"),
    ("expected_minimum(low, n - 1)", "expected_minimum(high, n - 1)"),
    ("np.minimum(values, greedy)", "np.minimum(values, -greedy)"),
    ("(greedy + (n - 1) * values.mean()) / n", "(greedy + n * values.mean()) / n"),
    ("turn = np.arange(n - hedged)", "turn = np.arange(n)"),
    ("turn % len(groups), turn // len(groups)", "turn // len(groups), turn % len(groups)"),
    ("groups.shape)), axis=2)", "groups.shape)), axis=0)"),
    ("pool.logprob / pool.tokens", "pool.logprob * pool.tokens"),
    ("pool.same.sum(-1).argmax(-1)", "pool.same.sum(-1).argmin(-1)"),
    ("pool.utility.mean(-1).argmax(-1)", "pool.utility.mean(-2).argmax(-1)"),
    ("pool.utility.sum(-1) + pool.cross.sum(-1)", "pool.utility.mean(-1) + pool.cross.mean(-1)"),
    ("pool.utility.sum(-1) + pool.cross", "pool.utility.sum(-1) - pool.cross"),
    ("votes[:, 0] + votes[:, 1, ::-1]", "votes[:, 0] + votes[:, 1]"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    """As in test_mutations, over the tests of the method alone, which are fast."""
    mutated = test_mutations.mutate("test-time/multilingual-samples", old, new, tmp_path, monkeypatch)
    monkeypatch.setitem(globals(), "samples", mutated)
    checks = [
        test_law_prunes_after_the_temperature, test_hedging_replaces_one_sample_and_adds_none,
        test_mixed_pools_take_the_temperatures_in_turn, test_every_sample_and_every_place_is_equally_likely,
        test_each_voter_weighs_the_same, lambda: test_law_is_that_of_transformers(0.7, 0.1),
        *(lambda n=n, h=h: test_pool_quality_is_the_mean_over_all_pools(n, h) for n in (2, 3) for h in (False, True)),
        *(lambda seed=seed: test_rules_are_their_definitions(seed) for seed in range(12)),
        lambda: test_chops_finds_the_favourite_wherever_it_stands(monkeypatch),
    ]  # fmt: skip
    assert any(map(test_mutations.fails, checks)), f"nothing noticed that {old!r} became {new!r}"


def test_stored_oracles_are_all_green():
    document = json.loads(notebook.path_of("test-time/multilingual-samples").read_text(encoding="utf-8"))
    kept = [cell for cell in document["cells"] if cell["metadata"].get("tags", []) == ["oracle", "keep_output"]]
    text = "".join("".join(output["text"]) for cell in kept for output in cell["outputs"])
    assert text.count(" ok") >= 14
    assert "FAILED" not in text
