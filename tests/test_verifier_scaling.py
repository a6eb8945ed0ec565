"""The method of test-time/verifier-scaling against independent roads, and the task and models that it uses."""

import sys
from itertools import pairwise, product

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from test_mutations import checks, fails, mutate
from transformers import LlamaModel

from workbook import measure, notebook, paths, policies
from workbook.models import planted
from workbook.notebook import load_method

NAME, RUNS = "test-time/verifier-scaling", "checkpoints/verifier_scaling_runs"
scaling, lab = load_method(NAME), load_method(RUNS)
TUPLES = np.array([[3, 3, 7, 3, 3], [5, 5, 5, 5, 5], [1, 2, 1, 2, 9], [0, 1, 2, 3, 4]])


def small():
    """An untrained model of the family with two answers for each of three questions."""
    asked = planted.questions(3, np.random.default_rng(2)).repeat(2, 0)
    return planted.build(seed=3), asked, np.random.default_rng(4).integers(30, size=(6, 7))


# -- rewards, variance, anti-concentration ---------------------------------------------------------------------------


def test_reward_counts_the_tokens_that_are_left():
    np.testing.assert_array_equal(scaling.rewards([5, 8, 9], 8).sum(1), [4, 1, 0])
    np.testing.assert_array_equal(scaling.rewards([2], 4), [[0, 1, 1, 1]])


def test_spread_of_samples_and_of_outcomes():
    samples = np.array([[1.0, 1, 4, 10], [2, 2, 2, 2]])
    mean, sigma = scaling.spread(samples)
    np.testing.assert_allclose((mean, sigma), (samples.mean(1), samples.std(1)))
    by_chance = scaling.spread(np.array([[1.0, 4, 10]]), np.array([[0.5, 0.25, 0.25]]))
    np.testing.assert_allclose(np.ravel(by_chance), [mean[0], sigma[0]])


@pytest.mark.parametrize("epsilon", [0.0, 0.4, 1.0, 3.0])
def test_anti_concentration_is_the_share_beyond_the_bar(epsilon):
    samples = np.random.default_rng(0).integers(12, size=(5, 40)).astype(float)
    for row, found in zip(samples, scaling.anti_concentration(samples, [epsilon])[:, 0], strict=True):
        assert found == pytest.approx(np.mean(row >= row.mean() + row.std() * epsilon**0.5))


def test_a_trace_that_just_reaches_the_bar_counts():
    np.testing.assert_allclose(scaling.anti_concentration(np.array([[0.0, 0, 0, 4]]), [3.0, 3.01]), [[0.25, 0]])


def test_no_policy_in_a_chi_square_ball_passes_the_bar_of_its_radius():
    """What the bar means: E r + sigma sqrt(eps) is the best mean at chi-square divergence eps."""
    rng = np.random.default_rng(1)
    law, r = rng.dirichlet(np.ones(6)), rng.random(6)
    (mean,), (sigma,) = scaling.spread(r[None], law[None])
    for other in rng.dirichlet(np.ones(6), 200):
        divergence = (other**2 / law).sum() - 1
        assert other @ r <= mean + sigma * divergence**0.5 + 1e-12
    tilted = law * (1 + 0.1 * (r - mean) / sigma)
    assert tilted @ r == pytest.approx(mean + 0.1 * sigma)
    assert (tilted**2 / law).sum() - 1 == pytest.approx(0.01)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_heterogeneity_over_all_histories_of_a_tiny_mixture(steps):
    """Every trace of a chain with a random start, one by one: Var r, and the sum over tokens of E Var Q."""
    rng = np.random.default_rng(steps)
    step, start, solved = rng.dirichlet(np.ones(3), (1, 3)), rng.dirichlet(np.ones(3)), np.array([0.0, 1.0, 0.5])
    chances, totals = [], []
    for path in product(range(3), repeat=steps + 1):
        moves = pairwise(path)
        chances.append(start[path[0]] * np.prod([step[0, a, b] for a, b in moves]))
        totals.append(solved[list(path[1:])].sum())
    mean = np.dot(chances, totals)
    found = scaling.heterogeneity(step, start, solved, steps)
    assert found[0][0] == pytest.approx(mean, abs=1e-12)
    assert found[1][0] == pytest.approx(np.dot(chances, (np.array(totals) - mean) ** 2), abs=1e-12)


@pytest.mark.parametrize("gamma", [30.0, 100.0, 1000.0])
def test_heterogeneity_is_the_variance_of_the_exact_law(gamma):
    found = scaling.heterogeneity(planted.chain(TUPLES, gamma), np.eye(6)[0], np.eye(6)[5], 20)
    mean, sigma = scaling.spread(*planted.outcomes(TUPLES, (gamma,), 20))
    np.testing.assert_allclose(found, (mean, sigma**2), atol=1e-12)


# -- cloning, judging, climbing --------------------------------------------------------------------------------------


def test_likelihood_is_of_each_word_given_what_stands_before_it():
    model, asked, traces = small()
    found = scaling.likelihood(model, asked, traces)
    assert found.shape == (6, 7)
    ids = torch.cat([planted.encode(asked), torch.from_numpy(traces)], 1)
    with torch.no_grad():
        for h in (0, 3, 6):
            law = model(ids[:, : 5 + h]).logits[:, -1, :30].softmax(-1)
            torch.testing.assert_close(found[:, h].exp(), law[torch.arange(6), ids[:, 5 + h]], atol=1e-5, rtol=1e-4)


def test_clone_learns_its_traces_and_leaves_the_base_alone():
    model, asked, _ = small()
    asked = np.tile(asked, (5, 1))
    traces = planted.golds(asked)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    policy = scaling.clone(model, asked, traces, steps=25, rate=1e-2, batch=16, seed=0)
    assert scaling.likelihood(policy, asked, traces).mean() > scaling.likelihood(model, asked, traces).mean() + 1
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_verifier_judges_a_prefix_by_the_prefix_alone():
    model, asked, traces = small()
    verifier = scaling.Verifier(model)
    whole, part = verifier.score(asked, traces), verifier.score(asked, traces[:, :4])
    np.testing.assert_allclose(whole[:, :4], part, atol=1e-5)
    assert whole.shape == (6, 7)
    assert ((whole > 0) & (whole < 1)).all()


def test_verifier_judges_a_prefix_with_its_last_word():
    """Another last word changes the judgement of the whole trace, and of no shorter prefix."""
    model, asked, traces = small()
    verifier, other = scaling.Verifier(model), traces.copy()
    other[:, -1] = (other[:, -1] + 1) % planted.WORDS
    moved = np.abs(verifier.score(asked, other) - verifier.score(asked, traces))
    assert (moved[:, -1] > 1e-6).all()
    np.testing.assert_allclose(moved[:, :-1], 0, atol=1e-6)


def test_verifier_learns_labels_of_prefixes():
    model, rng = planted.build(seed=3), np.random.default_rng(0)
    asked, traces = planted.questions(300, rng), rng.integers(30, size=(300, 6))
    labels = scaling.rewards(1 + (traces[:, 0] < 15) * 3, 6)  # solved at once, or at step 4, by the first word
    verifier = scaling.learn_verifier(model, asked, traces, labels, steps=80, rate=2e-3, batch=32, seed=0)
    assert np.mean((verifier.score(asked, traces) > 0.5) == labels) > 0.85


def test_best_of_takes_the_value_of_the_highest_score():
    score, values = np.array([[0.1, 0.9, 0.3], [2, 1, 0]]), np.array([[5, 6, 7], [1, 2, 3]])
    np.testing.assert_array_equal(scaling.best_of(score, values), [6, 1])


def test_leave_one_out_subtracts_the_mean_of_the_others():
    returns = np.random.default_rng(0).random((4, 5))
    found = scaling.leave_one_out(returns)
    for question, sample in np.ndindex(4, 5):
        others = np.delete(returns[question], sample)
        assert found[question, sample] == pytest.approx(returns[question, sample] - others.mean())


def test_policy_loss_has_the_gradient_of_the_mean_reward():
    """All thirty words of a one-word answer, each with its own probability as weight."""
    model, rng = planted.build(seed=1), np.random.default_rng(0)
    asked, words, gains = planted.questions(1, rng).repeat(30, 0), np.arange(30)[:, None], rng.random(30)
    law = planted.answer_logits(model, asked[:1], words[:1])[0, 0].softmax(0)
    exact = torch.autograd.grad((law * torch.from_numpy(gains)).sum(), model.lm_head.weight)[0]
    weight = 30 * law.detach().numpy() * gains
    loss = scaling.policy_loss(model, model, asked, words, weight, 0.0)
    found = torch.autograd.grad(loss, model.lm_head.weight)[0]
    torch.testing.assert_close(found.double(), -exact.double(), atol=1e-6, rtol=1e-4)


def test_policy_loss_charges_the_divergence_from_the_base():
    (model, asked, traces), base = small(), planted.build(seed=5)
    free, priced = (scaling.policy_loss(model, base, asked, traces, np.ones(6), kl) for kl in (0.0, 0.5))
    own, other = (planted.answer_logits(m, asked, traces).double().log_softmax(-1) for m in (model, base))
    drift = torch.nn.functional.kl_div(other, own, reduction="none", log_target=True).sum((1, 2))
    assert (priced - free).item() == pytest.approx(0.5 * drift.mean().item(), rel=1e-4)
    assert drift.min() > 0
    assert free.item() == pytest.approx(-scaling.likelihood(model, asked, traces).sum(1).mean().item(), rel=1e-4)


def test_reinforce_climbs_and_reports():
    """A reward for one word: its share rises from a thirtieth, and the base stays what it was."""
    base, asked, seen = planted.build(seed=3), planted.questions(20, np.random.default_rng(0)), []

    def reward(questions, traces):
        assert len(questions) == len(traces) == 64
        assert all((questions[i] == questions[i + 1]).all() for i in range(0, 64, 4))  # four samples a question
        return (traces == 7).astype(np.float32)

    before = {key: value.clone() for key, value in base.state_dict().items()}
    policy = scaling.reinforce(
        base, reward, asked, 4, updates=25, rate=1e-2, kl=0.0, questions=16, seed=0, callback=lambda *a: seen.append(a)
    )
    assert len(seen) == 25
    assert np.mean([mean for _, mean, _ in seen[:3]]) < 0.2
    assert (planted.sample(policy, asked, 4, 1) == 7).mean() > 0.5
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_reinforce_stays_at_the_base_where_divergence_is_dear():
    base, asked = planted.build(seed=3), planted.questions(20, np.random.default_rng(0))
    common = {"updates": 15, "rate": 1e-2, "questions": 16, "seed": 0}
    policies_ = [
        scaling.reinforce(base, lambda q, t: (t == 7).astype(np.float32), asked, 4, kl=kl, **common) for kl in (0.0, 50)
    ]
    free, bound = ((planted.sample(policy, asked.repeat(20, 0), 4, 1) == 7).mean() for policy in policies_)
    assert free > 2 * bound


# -- the task --------------------------------------------------------------------------------------------------------


def longest_end(trace, gold):
    """The longest end of a trace that begins the gold tuple, by trying all."""
    return max(k for k in range(6) if tuple(trace[len(trace) - k :]) == tuple(gold[:k]) and k <= len(trace))


def test_overlap_table_is_the_longest_end_of_the_trace():
    rng, table = np.random.default_rng(0), planted.overlap_table(TUPLES)
    for row, gold in enumerate(TUPLES):
        for _ in range(60):
            trace, state = rng.choice([*gold, 8], size=30), 0
            for h, word in enumerate(trace):
                state = table[row, state, word]
                assert state == longest_end(trace[: h + 1].tolist(), gold)


def test_solved_at_is_the_first_place_of_the_tuple_in_the_trace():
    rng = np.random.default_rng(0)
    gold = TUPLES.repeat(50, 0)
    traces = np.where(rng.random((200, 14)) < 0.9, np.take_along_axis(gold, rng.integers(5, size=(200, 14)), 1), 8)
    traces[::3, 6:11] = gold[::3]
    for trace, goal, found in zip(traces, gold, planted.solved_at(traces, gold), strict=True):
        place = bytes(trace.tolist()).find(bytes(goal.tolist()))
        assert found == (15 if place < 0 else place + 5)


def test_hitting_law_by_every_trace_of_a_short_budget():
    """Words that are no part of the tuple are alike, so that six kinds of words make all traces."""
    gold, gamma, steps = TUPLES[:3], 30.0, 6
    table, law = planted.overlap_table(gold), planted.hitting_law(gold, (gamma,), steps)
    for row, goal in enumerate(gold):
        found = np.zeros(steps + 1)
        words = [*sorted(set(goal.tolist())), 29]
        for trace in product(words, repeat=steps):
            state, chance = 0, 1.0
            for word in trace:
                weight = gamma if table[row, state, word] == table[row, state].max() else 1.0
                chance *= weight / (gamma + 29) * (30 - len(words) + 1 if word == 29 else 1)
                state = table[row, state, word]
            found[planted.solved_at(np.array([trace]), goal[None])[0] - 1] += chance
        np.testing.assert_allclose(law[row], found, atol=1e-12)


def test_exact_numbers_of_the_mixtures():
    """Means, deviations and ceilings at H = 20, from an independent program."""
    expected = {(10.0, 30.0, 100.0, 1000.0): (0.3583, 0.3618, 0.6604), (100.0,): (0.5241, 0.2764, 0.5917)}
    for gammas, numbers in expected.items():
        mean, sigma = scaling.spread(*planted.outcomes(TUPLES[3:], gammas, 20))
        found = [mean[0] / 20, sigma[0] / 20, planted.ceiling(TUPLES[3:], gammas, 20)[0] / 20]
        np.testing.assert_allclose(found, numbers, atol=5e-5)


def test_walks_follow_the_law_and_their_likelihood():
    rng, gold = np.random.default_rng(0), TUPLES.repeat(1500, 0)
    gamma = rng.choice([30.0, 1000.0], size=len(gold))
    traces = planted.walk(gold, gamma, 20, rng)
    hit = planted.solved_at(traces, gold).reshape(4, -1)
    law = planted.hitting_law(TUPLES, (30.0, 1000.0), 20).cumsum(1)
    drawn = np.stack([np.bincount(row, minlength=22)[1:].cumsum() for row in hit]) / 1500
    assert abs(drawn - law).max() < 4 * 0.5 / 1500**0.5
    one = planted.log_likelihood(traces[:1, :1], gold[:1], (30.0, 1000.0))
    first = np.mean([planted.chances(gold[:1], g)[0, 0, traces[0, 0]] for g in (30.0, 1000.0)])
    assert one[0] == pytest.approx(np.log(first))


def test_samples_follow_the_network_and_go_on_from_what_is_begun():
    model, asked = planted.build(seed=3), planted.questions(1, np.random.default_rng(0))
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    begun = np.tile([[4, 9]], (3000, 1))
    traces = planted.sample(model, asked.repeat(3000, 0), 3, 0, begun=begun)
    np.testing.assert_array_equal(traces[:, :2], begun)
    law = planted.answer_logits(model, asked, traces[:1])[0, 2].softmax(0).detach().numpy()
    counts = np.bincount(traces[:, 2], minlength=30)
    assert ((counts - 3000 * law) ** 2 / (3000 * law)).sum() < 60  # chi-square with 29 degrees of freedom


def test_shipped_bases_solve_when_their_teachers_do():
    asked = planted.questions(1500, np.random.default_rng(12))
    for base, gammas in planted.BASES.items():
        hit = planted.solve(planted.load(base), asked, 1, 40, 5)[:, 0]
        own = np.bincount(hit, minlength=42)[1:].cumsum() / 1500
        apart = abs(own - planted.hitting_law(planted.golds(asked), gammas, 40).mean(0).cumsum()).max()
        assert apart < 0.05 + 1.36 / 1500**0.5, base  # the second term: sampling noise


def test_branching_finds_the_variance_of_the_network():
    base, asked = planted.lean(planted.load("homogeneous")), planted.questions(250, np.random.default_rng(8))
    found = planted.branching_variance(base, asked, 8, 0)
    plain = np.clip(9 - planted.solve(base, asked, 8, 8, 10**6), 0, None).var(1, ddof=1)
    error = np.hypot(found.std(), plain.std()) / len(asked) ** 0.5
    assert plain.mean() > 0.5
    assert abs(found.mean() - plain.mean()) < 4 * error


def test_solved_traces_are_solved_and_counted():
    base, asked = planted.load("heterogeneous"), planted.questions(60, np.random.default_rng(3))
    traces, written = planted.solved_traces(base, asked, 20, 0)
    assert (planted.solved_at(traces, planted.golds(asked)) <= 20).all()
    assert written > 60
    with pytest.raises(RuntimeError, match="questions have no solved trace after 1: allow more steps"):
        planted.solved_traces(base, asked, 6, 0, rounds=1)


def test_unknown_base_is_refused():
    with pytest.raises(ValueError, match="'wide': one of heterogeneous, homogeneous, sharp is allowed"):
        planted.load("wide")


# -- fits and intervals ----------------------------------------------------------------------------------------------


def test_fit_stops_where_the_held_out_loss_is_least():
    """Two held-out points want 1, the others 3: on the way from 0 to 3 the weights near 1 are kept."""
    module, targets = torch.nn.Linear(1, 1, bias=False), torch.tensor([1.0] * 2 + [3.0] * 18)
    torch.nn.init.zeros_(module.weight)
    policies.fit(
        module, lambda rows: ((module.weight[0, 0] - targets[rows]) ** 2).mean(), 20,
        steps=200, rate=0.02, batch=8, seed=0, every=1,
    )  # fmt: skip
    assert module.weight.item() == pytest.approx(1, abs=0.03)
    assert not module.training


def test_fit_without_looks_learns_from_all_and_keeps_the_last_weights():
    module, targets = torch.nn.Linear(1, 1, bias=False), torch.tensor([1.0] * 10 + [3.0] * 10)
    policies.fit(
        module, lambda rows: ((module.weight[0, 0] - targets[rows]) ** 2).mean(), 20,
        steps=300, rate=0.05, batch=20, seed=0, every=None,
    )  # fmt: skip
    assert module.weight.item() == pytest.approx(2, abs=0.15)


def test_fit_keeps_the_start_if_nothing_is_better():
    module = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(module.weight)
    targets = torch.tensor([0.0] * 2 + [3.0] * 18)
    policies.fit(
        module, lambda rows: ((module.weight[0, 0] - targets[rows]) ** 2).mean(), 20,
        steps=40, rate=0.1, batch=8, seed=0,
    )  # fmt: skip
    assert module.weight.item() == 0
    with pytest.raises(ValueError, match="1 examples cannot be split"):
        policies.fit(module, lambda rows: module.weight.sum(), 1, steps=1, rate=0.1, batch=1, seed=0)


def test_crossed_interval_of_one_run_is_the_bootstrap_over_questions():
    values = np.random.default_rng(0).random((1, 300))
    one, plain = policies.crossed(values, draws=2000), measure.bootstrap(values[0])
    assert (one.value, one.low, one.high) == pytest.approx((plain.value, plain.low, plain.high), abs=0.004)


def test_crossed_interval_covers_the_differences_between_runs():
    """Runs that differ by far more than questions do: more questions do not narrow the interval."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(6, 1))[:, :, None] + 0.01 * rng.normal(size=(6, 400, 1))
    found = policies.crossed(values, lambda v: v.mean())
    assert found.high - found.low > values.mean((1, 2)).std()
    assert found.low < values.mean() < found.high


# -- duels, their bill, and the runs that ship ------------------------------------------------------------------------

SETTING = ("sharp", 8, 32)


def small_recipe(**changed):
    """A recipe of seconds; of the `lab` that is looked at, so that a changed one is not told by its class alone."""
    common = {"seed": 3, "tests": 20, "tries": 2, "candidates": 3, "fit_steps": 11, "updates": 1}
    return lab.Recipe(**common | {"rate": 1e-3, "kl": 0.01} | changed)


def test_settings_vary_one_thing_at_a_time():
    plan, center = lab.settings([20, 10], 20, 64, [32, 64, 128])
    assert center == ("heterogeneous", 20, 64)
    assert len(plan) == len(set(plan)) == 2 * 2 + 2 + 1
    assert {n for name, h, n in plan if (name, h) == ("heterogeneous", 20)} == {32, 64, 128}
    assert {h for name, h, _ in plan if name == "homogeneous"} == {10, 20}
    assert ("sharp", 20, 64) in plan


def test_search_answers_with_the_candidate_that_the_verifier_prefers():
    class Judge:
        def score(self, asked, traces):
            return (traces == 7) * 1.0

    model, asked = planted.build(seed=3), planted.questions(30, np.random.default_rng(0))
    one = lab.Trained(model, verifier=Judge(), best_of=scaling.best_of, candidates=4)
    every = planted.sample(model, asked.repeat(4, 0), 9, 5).reshape(30, 4, 9)
    sevens = (every == 7).sum(2)
    np.testing.assert_array_equal((one.answers(asked, 9, 5) == 7).sum(1), sevens.max(1))
    assert sevens.max(1).mean() > 2 * sevens.mean()
    np.testing.assert_array_equal(lab.Trained(model).answers(asked, 9, 5), planted.sample(model, asked, 9, 5))
    assert (lab.Trained(model).price(9), one.price(9)) == ((9, 9), (36, 72))


def counted(train):
    """Traces written and traces through networks while `train` runs, by hooks on the networks themselves."""
    written, passed, sample = [], [], planted.sample

    def count(module, inputs, output):
        if isinstance(module, LlamaModel):
            passed.append(len(output.last_hidden_state) * (3 if torch.is_grad_enabled() else 1))

    def write(model, asked, *rest, **options):
        written.append(len(asked))
        return sample(model, asked, *rest, **options)

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    planted.sample = write
    try:
        result = train()
    finally:
        hook.remove()
        planted.sample = sample
    return result, sum(written), sum(passed) + sum(written)


@pytest.mark.parametrize("more", [False, True])
def test_training_is_billed_as_the_networks_saw_it(more):
    """Right traces are paid once though two clones learn from them; writing a word is one pass."""
    base = planted.load(SETTING[0])
    found, written, passed = counted(lambda: lab.trained(scaling, base, *SETTING[1:], 0, small_recipe(), more=more))
    clone, rl, search = (found[name] for name in ("VF: clone", "VB: RL", "VB: search"))
    extra, again = (found["RL, true reward"], found["clone, quickest"]) if more else (lab.Trained(base),) * 2
    shared = clone.written if more else 0
    assert written == clone.written + rl.written + extra.written + again.written - shared
    assert passed == clone.passed + rl.passed + extra.passed + again.passed - shared
    assert search.written == SETTING[2]
    assert rl.written - search.written == 128 * small_recipe().updates
    assert 0 < search.seconds < rl.seconds
    assert len(found) == (6 if more else 4)


def test_two_duels_of_a_run_are_equal_and_runs_differ():
    base = planted.load(SETTING[0])
    torch.manual_seed(11)
    (first, _), (again, methods) = (lab.duel(scaling, base, SETTING, 1, small_recipe()) for _ in range(2))
    other = lab.duel(scaling, base, SETTING, 0, small_recipe())[0]
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a["grades"], b["grades"])
        assert a["method"] == b["method"] == c["method"]
    assert any((a["grades"] != c["grades"]).any() for a, c in zip(first, other, strict=True))
    row, asked = first[0], lab.test_questions(small_recipe())
    traces = planted.sample(base, asked.repeat(2, 0), 8, lab.numbered(small_recipe(), 1))
    r = np.clip(9 - planted.solved_at(traces, planted.golds(asked).repeat(2, 0)), 0, None)
    np.testing.assert_array_equal(row["grades"], r.reshape(20, 2).sum(1))
    assert row["budget"] == 8
    assert row["run"] == 1
    ticks, clock = lab.clocked({SETTING: methods}, asked, 0, 1)
    assert clock.set_index("method").passes["VB: search"] == 2 * clock.set_index("method").tokens["VB: search"] == 48
    assert (ticks.seconds.groupby(ticks.name).sum() > 0).all()


def some_rows(runs, methods=("base", "VF: clone"), seed=0):
    """Rows of invented grades."""
    rng = np.random.default_rng(seed)
    return [
        {"run": run, "base": "sharp", "budget": 8, "n": 32, "method": method, "tokens": 5, "passes": 7,
         "seconds": 0.5, "grades": rng.integers(9, size=20).astype(np.int16)}
        for run in runs for method in methods
    ]  # fmt: skip


def test_packed_rows_are_unpacked():
    rows = some_rows([0, 1])
    table, recipe = lab.unpacked(*lab.packed(rows, small_recipe()))
    assert recipe == small_recipe()
    for row, read in zip(rows, table.to_dict("records"), strict=True):
        np.testing.assert_array_equal(row.pop("grades"), read.pop("grades"))
        assert row == read


def test_live_runs_take_the_place_of_their_shipped_twins():
    live, shipped = pd.DataFrame(some_rows([0], seed=1)), pd.DataFrame(some_rows([0, 1, 2]))
    found, misfit = lab.joined(live, small_recipe(), shipped, small_recipe())
    assert misfit == ""
    assert sorted(found.run) == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(np.stack(found.grades[found.run == 0]), np.stack(live.grades))
    apart = lab.departures(live, shipped, small_recipe())
    wanted = [abs(np.mean(a) - np.mean(b)) / 16 for a, b in zip(live.grades, shipped.grades[:2], strict=True)]
    np.testing.assert_allclose(apart.departs, wanted)
    assert min(wanted) > 0


def test_runs_that_were_made_otherwise_are_left_out_and_named():
    live, shipped = pd.DataFrame(some_rows([0], seed=1)), pd.DataFrame(some_rows([0, 1]))
    other = small_recipe(fit_steps=30)
    found, misfit = lab.joined(live, small_recipe(), shipped, other)
    assert found is live
    assert misfit == "fit_steps is 11 here, 30 there"
    found, misfit = lab.joined(live.assign(n=64), small_recipe(), shipped, small_recipe())
    assert sorted(found.run) == [0, 0]
    assert "never shipped" in misfit
    part = shipped.drop(index=3)  # run 1 lacks its clone
    assert sorted(lab.joined(live, small_recipe(), part, small_recipe())[0].run) == [0, 0]


def test_shipped_runs_are_whole():
    rows, recipe = lab.load_runs("verifier_scaling_runs")
    assert not rows.duplicated(["run", *lab.KEY]).any()
    sizes = rows.groupby("run").size()
    assert sizes.nunique() == 1
    assert list(sizes.index) == list(range(len(sizes)))
    assert len(sizes) >= 2
    grades = np.stack(rows.grades)
    assert grades.shape[1] == recipe.tests
    assert (grades >= 0).all()
    assert (grades.max(1) <= recipe.tries * (rows.budget - planted.LENGTH + 1)).all()  # none beats the optimum
    assert (paths.DATA / "checkpoints" / "verifier_scaling_runs.safetensors").stat().st_size <= 150_000


def test_what_the_base_earns_is_what_was_shipped():
    """The whole road of a grade but the training, for every run at the shortest budget."""
    rows, recipe = lab.load_runs("verifier_scaling_runs")
    rows = rows[(rows.method == "base") & (rows.budget == rows.budget.min())]
    asked = lab.test_questions(recipe).repeat(recipe.tries, 0)
    for row in rows.itertuples():
        traces = lab.Trained(planted.load(row.base)).answers(asked, row.budget, lab.numbered(recipe, row.run))
        r = scaling.true_reward(asked, traces).sum(1).reshape(-1, recipe.tries).sum(1)
        assert np.mean(r == row.grades) > 0.9  # another machine may round a word in a thousand otherwise


def test_the_checkpoint_notebook_trains_what_the_full_profile_asks_for():
    full = yaml.safe_load(notebook.path_of(NAME).with_suffix(".paper.yaml").read_text(encoding="utf-8"))
    ours, theirs = (notebook.read_parameters(notebook.path_of(name)) for name in (NAME, RUNS))
    for name in set(ours) & set(theirs) - {"runs", "device"}:
        assert theirs[name].default == full.get(name, ours[name].default), name


# -- one wrong sign is noticed ---------------------------------------------------------------------------------------

MUTATIONS = [
    ("np.arange(1, steps + 1) >= np", "np.arange(1, steps + 1) > np"),
    ("(rewards - mean[..., None]) ** 2", "(rewards + mean[..., None]) ** 2"),
    ("mean + sigma * np.sqrt(epsilons)[:, None] - 1e-9", "mean - sigma * np.sqrt(epsilons)[:, None] - 1e-9"),
    ("sigma * np.sqrt(epsilons)[:, None]", "sigma * np.asarray(epsilons)[:, None]"),
    ("returns.append(solved + ahead)", "returns.append(ahead)"),
    ("ahead**2 @ start - (ahead @ start) ** 2", "ahead**2 @ start + (ahead @ start) ** 2"),
    ("for q in reversed(returns)", "for q in returns"),
    ("law * (square - mean**2)", "law * square"),
    ("lambda rows: -likelihood(policy", "lambda rows: likelihood(policy"),
    ("score.argmax(1)", "score.argmin(1)"),
    ("-np.shape(traces)[1] :]", "-np.shape(traces)[1] - 1 : -1]"),
    ("returns.sum(1, keepdims=True) - returns) / (samples - 1)", "returns.sum(1, keepdims=True)) / samples"),
    ("(kl * drift - gain)", "(kl * drift + gain)"),
    ("law.exp() * (law - reference)", "law.exp() * (reference - law)"),
    (".repeat(group, 0)", ".repeat(2, 0)"),
    ("rewards(planted.solved_at(traces, planted.golds(asked))", "rewards(planted.solved_at(traces, asked)"),
]

MUTATIONS_OF_RUNS = [
    ("1000 * recipe.seed + 100 * run", "1000 * recipe.seed"),
    ("sorted({*trace_counts} - {traces})", "sorted({*trace_counts})"),
    ("(1 if self.verifier is None else 2)", "1"),
    ("self.best_of(score, np", "self.best_of(-score, np"),
    ("3 * 64 * recipe.fit_steps", "2 * 64 * recipe.fit_steps"),
    ("recipe.fit_steps}) * max(1, n // 10)", "recipe.fit_steps}) * n"),
    ("judged + 6 * fresh", "judged + 5 * fresh"),
    ("fresh, 5 * fresh", "fresh, 4 * fresh"),
    ("reshape(-1, recipe.tries).sum(1).astype", "reshape(recipe.tries, -1).sum(0).astype"),
    ("~held.run.isin(live.run)", "held.run.isin(live.run)"),
    ("if value != getattr", "if value == getattr"),
    ("lambda rows: len(rows) == len(wanted)", "lambda rows: len(rows) >= 1"),
    ("(table.J - table.J_shipped)", "(table.J + table.J_shipped)"),
    ("(rows.budget * recipe.tries)", "rows.budget"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    this = sys.modules[__name__]
    monkeypatch.setattr(this, "scaling", mutate(NAME, old, new, tmp_path, monkeypatch))
    of_the_method = (check for check in checks(this, {}) if "scaling" in check.__defaults__[0].__code__.co_names)
    assert any(map(fails, of_the_method)), f"nothing noticed that {old!r} became {new!r}"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("old", "new"), MUTATIONS_OF_RUNS)
def test_changed_bill_or_table_is_caught(old, new, tmp_path, monkeypatch):
    this = sys.modules[__name__]
    monkeypatch.setattr(this, "lab", mutate(RUNS, old, new, tmp_path, monkeypatch))
    of_the_lab = (check for check in checks(this, {}) if "lab" in check.__defaults__[0].__code__.co_names)
    assert any(map(fails, of_the_lab)), f"nothing noticed that {old!r} became {new!r}"
