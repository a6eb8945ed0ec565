"""The method of test-time/multilingual-samples against enumeration and other libraries; the sampler, pools, rewards."""

import json
from itertools import combinations, product

import numpy as np
import pandas as pd
import pytest
import test_mutations
import torch
from sacrebleu.metrics import CHRF
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import MinPLogitsWarper, TemperatureLogitsWarper

from workbook import answer_tables, answers, checkpoints, measure, multilingual, notebook, pools, rewards
from workbook.models.lm import Llama
from workbook.notebook import load_method
from workbook.plan import plan

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


def test_pools_of_a_question_are_fixed_by_seed_and_item():
    draw = lambda *seed: samples.draw_pools([np.arange(1, 9)], 5, True, 30, *seed).tolist()  # noqa: E731
    assert draw([3, 2], 7) == draw([3, 2, 7])
    assert len({str(draw([3, 2], item)) for item in range(5)}) == 5


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
        count = len(tasks)
        return answers.Answers(np.array([[[35, -1]]] * count), None, np.full((count, 1), 2), 0, 0, 0, 0.0)

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
    choice, votes, cost = run_chops(Judge(monkeypatch, favourite="c"))
    assert [pool[i] for pool, i in zip(POOLS, choice, strict=True)] == ["c", "c", "c"]
    assert votes.shape == (3, 2, 3)
    read = len("Task: x\nChecklist:#") + 2 * len("\nA: a\nB: b\nC: c\nBest:")
    assert (
        cost.tolist() == [[read, 2 + 2]] * 3
    )  # two passes for the checklist and its end, one to read it, one to judge


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


# -- tables of answers -------------------------------------------------------------------------------------------------


def table_of(seed, language="en", questions=5, drawn=6):
    """A table as `answer_tables.ask` returns it, of made-up answers to word problems: greedy and two settings."""
    rng, items = np.random.default_rng(seed), multilingual.questions(multilingual.TASKS[0], language, questions, 0)
    shape = (questions, 1 + 2 * drawn)
    text = rng.choice(["7 + 5 = 12", "7 - 5 = 2", "12", "", "NA", "sí, 8 + 6 = 14"], shape).astype(object)
    text[:, ::3] = items.right.to_numpy(object)[:, None]
    facts = {"task": multilingual.TASKS[0], "items": items, "asked": [[1] * (3 + i) for i in range(questions)]}
    length = np.array([[len(t) + 1 for t in row] for row in text])
    return answer_tables.graded(facts | {"text": text, "tokens": length, "logprob": -length * 0.25})


def by_hand(table, item, columns, pick, foreign, heard):
    """What X-MBR chooses from one pool, and its cost, in plain loops."""
    pool = [columns[place] for place in pick]
    voters = [foreign["text"][item][c] for c in heard]
    likes = [
        sum(multilingual.chrf(table["text"][item][a], t) for t in [*(table["text"][item][c] for c in pool), *voters])
        for a in pool
    ]
    longest = max(table["tokens"][item][c] for c in pool) + max(foreign["tokens"][item][c] for c in heard)
    tokens = sum(table["tokens"][item][c] for c in pool) + sum(foreign["tokens"][item][c] for c in heard)
    first = next(i for i, value in enumerate(likes) if value > max(likes) - 1e-12)
    return table["right"][item][pool[first]], tokens + len(table["asked"][item]) + len(foreign["asked"][item]), longest


def test_accuracy_and_cost_are_those_of_plain_loops():
    home, abroad, columns = table_of(1), table_of(2, "es"), np.r_[0, 7:13]
    picks = lambda item: samples.draw_pools([np.arange(1, 7)], 4, True, 5, 0, item)  # noqa: E731
    heard = lambda item: samples.draw_pools([columns[1:]], 3, False, 5, 9, item)  # noqa: E731
    rules = {"MBR": samples.mbr, "X-MBR": samples.x_mbr, "best-of-N": samples.best_of_n}
    found = answer_tables.evaluate(home, range(5), columns, rules, picks, abroad, heard, 2).set_index(["rule", "item"])
    for item in range(5):
        pairs = zip(picks(item), heard(item), strict=True)
        expected = [by_hand(home, item, columns, pick, abroad, voters) for pick, voters in pairs]
        got = found.loc[("X-MBR", item), ["right", "tokens", "passes"]]
        np.testing.assert_allclose(got.astype(float), np.mean(expected, axis=0))
        own = home["tokens"][item][columns][picks(item)]
        asked = len(home["asked"][item])
        assert found.tokens["MBR", item] == pytest.approx(asked + own.sum(1).mean())
        assert found.passes["MBR", item] == pytest.approx(own.max(1).mean())
        assert found.tokens["best-of-N", item] == pytest.approx(2 * asked + (2 * own + 1).sum(1).mean())
        assert found.passes["best-of-N", item] == pytest.approx(own.max(1).mean() + 2)
        pool = home["right"][item][columns][picks(item)]
        assert found.right["perfect", item] == pool.any(1).mean()
        assert found.right["one sample", item] == pool[:, 0].mean()


def test_without_foreign_answers_there_is_no_cross_lingual_rule():
    picks = lambda item: samples.draw_pools([np.arange(1, 7)], 4, True, 5, 0, item)  # noqa: E731
    rules = {"MBR": samples.mbr, "X-MBR": samples.x_mbr}
    found = answer_tables.evaluate(table_of(1), range(3), np.arange(7), rules, picks)
    assert set(found.rule) == {"MBR", "one sample", "perfect"}


def test_what_is_packed_comes_back():
    table = table_of(3)
    table["reward"][2:, 4:9] = np.round(np.random.default_rng(0).normal(size=(3, 5)), 2)
    for row in range(2, 5):  # equal answers of equal length are judged once
        for pair in {(t, int(n)) for t, n in zip(table["text"][row], table["tokens"][row], strict=True)}:
            same = [(t, int(n)) == pair for t, n in zip(table["text"][row], table["tokens"][row], strict=True)]
            table["reward"][row, same] = table["reward"][row, same].max()
    table["chops"][2:] = np.arange(15).reshape(3, 5)
    packed = json.loads(json.dumps(answer_tables.packed(table)))
    empty = {key: table[key] for key in ("task", "items", "asked")}
    found = answer_tables.unpacked(packed, empty)
    for name in ("text", "tokens", "logprob", "reward", "chops", "key", "right", "value"):
        np.testing.assert_array_equal(found[name], table[name], err_msg=name)
    both = answer_tables.joined([packed, packed])
    assert both["text"] == packed["text"] * 2
    assert not answer_tables.departing(found, table).any()
    assert answer_tables.departing(found | {"text": found["text"][::-1]}, table).mean() > 0.25


def test_the_judge_is_counted_for_the_pool_that_it_saw():
    table, columns = table_of(4), np.r_[0, 7:13]
    picks = np.concatenate([samples.draw_pools([np.arange(1, 7)], 3, True, 1, 0, item) for item in range(5)])
    table["chops"] = np.array([[2, 0, 0, 50, 4]] * 5)
    found = answer_tables.judged(table, range(1, 5), columns, picks[1:])
    for row, item in enumerate(range(1, 5)):
        pool = columns[picks[item]]
        assert found.right[row] == table["right"][item, pool[2]]
        assert found.greedy[row] == (table["key"][item, pool[2]] == table["key"][item, 0])
        assert found.tokens[row] == 50 + len(table["asked"][item]) + table["tokens"][item, pool].sum()
        assert found.passes[row] == 4 + table["tokens"][item, pool].max()


def test_the_tuned_setting_is_the_one_whose_answers_are_right():
    tables = {("t", language): table_of(seed, language) for seed, language in enumerate(("en", "es"))}
    for table in tables.values():
        table["text"][:, 7:] = table["items"].right.to_numpy(object)[:, None]
        table["text"][:, 9] = "no idea"  # one sample is wrong, and every pool outvotes it
    tables = {name: answer_tables.graded(table) for name, table in tables.items()}
    scores = samples.tune(tables, {"cold": np.arange(1, 7), "warm": np.arange(7, 13)}, range(3), 4, 20, 0)
    assert scores["warm"] == 1 > scores["cold"]


def test_seconds_are_a_question_s():
    clock = pd.DataFrame({"name": ["MBR, 5", "MBR, 5", "CHOPS, 8"], "repeat": [0, 1, 0], "seconds": [2.0, 4.0, 9.0]})
    found = answer_tables.seconds(clock, 2).set_index(["rule", "n"])
    assert found.s.to_dict() == {("MBR", 5): 1.5, ("CHOPS", 8): 4.5}
    assert found.loc[("MBR", 5), ["s_low", "s_high"]].tolist() == [1, 2]


# -- intervals ---------------------------------------------------------------------------------------------------------


def rows_of(values):
    index = pd.MultiIndex.from_product([["a"], range(len(values))], names=["task", "item"])
    return pd.Series(values, index=index)


def test_one_run_is_the_plain_bootstrap():
    values = np.random.default_rng(0).normal(size=60)
    found = multilingual.over_runs(rows_of(values), runs=pd.Series(np.zeros(60)))
    plain = measure.bootstrap(values)
    assert (found.value, found.n) == (plain.value, 60)
    assert [found.low, found.high] == pytest.approx([plain.low, plain.high], abs=0.03)


def test_runs_that_differ_widen_the_interval():
    values, runs = np.repeat([0.0, 1.0, 2.0, 3.0], 24), pd.Series(np.repeat(range(4), 24))
    found = multilingual.over_runs(rows_of(values), runs=runs)
    plain = measure.bootstrap(values)
    assert found.high - found.low > 3 * (plain.high - plain.low)
    assert found.low == pytest.approx(0.5, abs=0.26)


def test_intervals_over_runs_cover():
    """Four runs of 24 questions that differ little: the true mean lies inside as often as promised."""
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        values = rng.normal(size=(4, 1)) * 0.1 + rng.normal(size=(4, 24))
        found = multilingual.over_runs(rows_of(values.ravel()), runs=pd.Series(np.repeat(range(4), 24)), draws=300)
        hits += found.low <= 0 <= found.high
    assert hits >= 0.93 * 200


def test_runs_may_be_of_different_sizes_and_order():
    values, runs = rows_of(np.r_[np.zeros(3), np.ones(9)]), pd.Series([*"aaabbbbbbbbb"])
    mixed = values.sample(frac=1, random_state=0)
    for rows in (values, mixed):
        found = multilingual.over_runs(rows, runs=runs)
        assert (found.value, found.low, found.high) == (0.75, 0, 1)
    with pytest.raises(ValueError, match="at least one row"):
        multilingual.over_runs(values[:0], runs=runs)


def test_a_statistic_of_two_columns_gets_the_rows_together():
    table = pd.DataFrame({"a": rows_of(np.arange(1.0, 13)), "b": rows_of(np.arange(1.0, 13) * 2)})
    found = multilingual.over_runs(table, lambda r: r[:, 0].sum() / r[:, 1].sum(), runs=pd.Series(np.arange(12) // 4))
    assert (found.low, found.value, found.high) == (0.5, 0.5, 0.5)


# -- the shipped answers -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    from workbook.models import lm

    return answer_tables.shipped("multilingual_answers", lm.load_tokenizer())


def test_the_shipped_table_fits_the_full_run(shipped):
    given, tables = shipped
    chosen = plan("test-time/multilingual-samples", "paper").parameters
    for name in ("seed", "demonstrations", "dev_items", "samples", "temperatures", "pool_size", "min_p"):
        assert chosen[name] == given[name], name
    assert ["en", "es", *chosen["languages"]] == given["languages"]
    assert chosen["test_items"] <= given["test_items"]
    assert set(tables) == set(product(multilingual.TASKS, given["languages"]))


def test_the_shipped_table_is_whole(shipped):
    given, tables = shipped
    columns = 1 + 2 * len(given["temperatures"]) * given["samples"]
    head, size = given["dev_items"], given["dev_items"] + given["runs"] * given["test_items"]
    for table in tables.values():
        assert table["text"].shape == (size, columns)
        assert (table["logprob"] <= 0.01).all()
        assert ((table["tokens"] >= 1) & (table["tokens"] <= answer_tables.NEW_TOKENS)).all()
        assert (table["chops"][:head] == -1).all()
        assert ((table["chops"][head:, :3] >= 0) & (table["chops"][head:, :3] < given["pool_size"])).all()
        setting = checkpoints.provenance("multilingual_answers")["setting"]
        cut, tau = "min-p" in setting, float(setting.split(",")[0])
        start = 1 + given["samples"] * (cut * len(given["temperatures"]) + given["temperatures"].index(tau))
        assert np.isfinite(table["reward"][head:, np.r_[0, start : start + given["samples"]]]).all()


def test_no_question_is_reported_twice_and_none_that_tuned(shipped):
    given, tables = shipped
    for (task, language), table in tables.items():
        examples, _ = multilingual.split(
            task, language, given["seed"], demonstrations=given["demonstrations"], dev=given["dev_items"], test=1
        )
        right = [*examples.right, *table["items"].right]
        assert len(set(right)) == len(right)


def test_the_shipped_setting_is_the_tuned_one(shipped):
    given, tables = shipped
    names = [f"{tau:g}{', min-p' * cut}" for cut, tau in product((False, True), given["temperatures"])]
    column = {name: 1 + np.arange(given["samples"]) + i * given["samples"] for i, name in enumerate(names)}
    count = plan("test-time/multilingual-samples", "paper").parameters["pools_drawn"]
    scores = samples.tune(tables, column, range(given["dev_items"]), given["pool_size"], count, given["seed"])
    assert max(scores, key=scores.get) == checkpoints.provenance("multilingual_answers")["setting"]


def test_shipped_answers_are_what_the_model_writes(shipped):
    """Greedy answers and samples to two questions, drawn again; another processor may round a token away."""
    from workbook.models import lm

    given, tables = shipped
    tokenizer, model = lm.load_tokenizer(), answers.load_model()
    sizes = {"demonstrations": given["demonstrations"], "dev": 2, "test": 1}
    laws = answers.tempered, lambda logits, temperature: samples.pruned(logits, temperature, given["min_p"])
    how = {"temperatures": given["temperatures"], "samples": given["samples"], "laws": laws}
    task, language = multilingual.TASKS[0], "es"
    examples, items = multilingual.split(task, language, given["seed"], **sizes)
    how |= {"size": given["pool_size"], "seed": given["seed"]}
    found = answer_tables.ask(model, tokenizer, task, examples, items[:2], **how)
    assert answer_tables.departing(found, tables[task, language]).mean() <= 0.25
    assert found["work"][1] < found["work"][0]


# -- the questions -----------------------------------------------------------------------------------------------------


def test_questions_are_the_same_in_every_language():
    for task in multilingual.TASKS:
        sets = {language: multilingual.questions(task, language, 30, 4) for language in multilingual.LANGUAGES}
        assert len(sets["en"].question.unique()) >= 25
    numbers = [sets_.right.str.split("=").str[-1].tolist() for sets_ in (
        multilingual.questions("word problems", language, 30, 4) for language in multilingual.LANGUAGES)]  # fmt: skip
    assert all(row == numbers[0] for row in numbers)


def test_more_questions_begin_with_the_same_ones():
    for task, language in product(multilingual.TASKS, multilingual.LANGUAGES):
        few, many = (multilingual.questions(task, language, count, 5) for count in (9, 100))
        assert few.equals(many[:9])
    few, many = (multilingual.questions(multilingual.TASKS[0], "en", count, 5) for count in (9, 300))
    assert few.equals(many[:9])
    assert many.right[:108].nunique() == 108


def test_runs_share_no_question_and_draw_their_own_examples():
    for task in multilingual.TASKS:
        options = {"demonstrations": 6, "dev": 6, "test": 24}
        parts = [multilingual.split(task, "es", 3, **options, run=run) for run in range(4)]
        asked = [question for _, items in parts for question in items.question]
        assert len(asked) == len(set(asked)) == 6 + 4 * 24
        shown = [tuple(examples.right) for examples, _ in parts]
        assert len(set(shown)) == 4
        head = {*parts[0][0].right, *parts[0][1].right[:6]}
        for examples, items in parts:
            assert len(examples) == len(set(examples.right)) == 6
            assert set(examples.right) <= head
            assert not set(examples.question) & set(items.question)
        few = multilingual.split(task, "es", 3, demonstrations=6, dev=6, test=4)
        assert few[0].equals(parts[0][0])
        assert few[1].equals(parts[0][1][:10])
    signs = [text.split()[1] for text in multilingual.split(multilingual.TASKS[0], "en", 3, **options, run=2)[0].right]
    assert signs == ["+", "-", "*"] * 2


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


def test_likeness_is_that_of_sacrebleu():
    rng, metric = np.random.default_rng(0), CHRF()
    texts = ["", "a", "7 + 5 = 12", "7 - 5 = 2", "Perú", "peru", "Bosnia y Herzegovina", "aaaa aaaa", "Südafrika"]
    texts += ["".join(rng.choice([*"aab +1"], rng.integers(1, 15))) for _ in range(30)]
    for text, reference in product(texts, texts):
        expected = metric.sentence_score(multilingual.fold(text), [multilingual.fold(reference)]).score / 100
        assert multilingual.chrf(text, reference) == pytest.approx(expected, abs=1e-12)


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
    ("run.written[:, 0] + 2", "run.written[:, 0]"),
    ("np.r_[seed, item]", "np.r_[seed, seed]"),
    ('np.r_[0, columns], {"MBR": mbr}', 'np.r_[0, 0 * columns], {"MBR": mbr}'),
    ('found.right[found.rule == "MBR"]', 'found.right[found.rule == "one sample"]'),
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
        test_pools_of_a_question_are_fixed_by_seed_and_item, test_the_tuned_setting_is_the_one_whose_answers_are_right,
    ]  # fmt: skip
    assert any(map(test_mutations.fails, checks)), f"nothing noticed that {old!r} became {new!r}"


def test_stored_oracles_are_all_green():
    document = json.loads(notebook.path_of("test-time/multilingual-samples").read_text(encoding="utf-8"))
    kept = [cell for cell in document["cells"] if cell["metadata"].get("tags", []) == ["oracle", "keep_output"]]
    text = "".join("".join(output["text"]) for cell in kept for output in cell["outputs"])
    assert text.count(" ok") >= 14
    assert "FAILED" not in text
