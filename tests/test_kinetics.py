"""The method of test-time/kinetics against independent references, and the family and fits that it uses."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from workbook import measure, scaling
from workbook.models import gpt
from workbook.models.lm import Llama
from workbook.notebook import load_method


@pytest.fixture(scope="module")
def kinetics():
    return load_method("test-time/kinetics")


@pytest.fixture(scope="module")
def network():
    network = gpt.build(3, seed=1).eval()
    network.set_attn_implementation("eager")
    return network


@pytest.fixture
def heads():
    """Queries (2, 3, 4, 16), keys and values (2, 3, 96, 16), mean keys of blocks of 8."""
    generator = torch.Generator().manual_seed(3)
    q, keys, values = (torch.randn(2, 3, n, 16, generator=generator) for n in (4, 96, 96))
    return q, keys, values, keys.unflatten(2, (-1, 8)).mean(3)


QWEN_0_6B = (0.752e9, 28, 16, 8, 128)
QWEN_14B = (14.77e9, 40, 40, 8, 128)


# -- the bill ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [10, 40, 111, 240, 999])
def test_attended_is_the_sum_over_tokens(kinetics, budget):
    prompt, length = 40, 200
    by_token = sum(min(budget, prompt + t + 0.5) for t in range(length))
    assert kinetics.attended(prompt, length, budget) == pytest.approx(by_token, rel=1e-12)


def test_attended_of_whole_tokens_is_half_a_token_a_step_away(kinetics):
    """The integral stands between the sums that count a token before and after it is written."""
    before = sum(100 + t for t in range(50))
    assert before < kinetics.attended(100, 50) < before + 50


@pytest.mark.parametrize("trials", [1, 7])
def test_dense_bill_shares_the_prompt_but_not_the_answers(kinetics, trials):
    model = kinetics.shape("toy", 1000, 3, 4, 2, 8)
    assert (model.kv, model.group) == (96, 2)
    flops = moved = 0
    for t in range(64):
        flops += trials * (2 * 1000 + 4 * (20 + t + 0.5) * 3 * 4 * 8)  # layers, heads, head width
        moved += 2 * 96 * (20 + trials * (t + 0.5))
    assert kinetics.cost(model, 20, 64, trials) == pytest.approx((flops, moved), rel=1e-12)


def test_sparse_bill_shares_nothing_and_pays_for_the_search(kinetics):
    model = kinetics.shape("toy", 1000, 3, 4, 2, 8)
    flops = moved = 0
    for t in range(64):
        past = 20 + t + 0.5
        flops += 5 * (2 * 1000 + 4 * min(40, past) * 96 + 2 * past / 8 * 96)
        moved += 2 * 96 * 5 * min(40, past) + 2 * 48 * (20 + 5 * (t + 0.5)) / 8
    assert kinetics.cost(model, 20, 64, 5, budget=40, block=8) == pytest.approx((flops, moved), rel=1e-12)


def test_sparse_bill_grows_linearly_and_dense_bill_quadratically(kinetics):
    model = kinetics.shape("0.6B", *QWEN_0_6B)
    price = {"intensity": 562.5}
    dense = kinetics.eflops(model, 256, 64000, **price) / kinetics.eflops(model, 256, 32000, **price)
    sparse = kinetics.eflops(model, 256, 64000, budget=512, **price) / kinetics.eflops(
        model, 256, 32000, budget=512, **price
    )
    assert 3.9 < dense < 4
    assert 2 < sparse < 2.02


def test_flops_of_a_real_step_are_what_the_bill_says(kinetics, network):
    prompt = gpt.problems(2, 9, np.random.default_rng(0)).prompt
    past = network(prompt, use_cache=True).past_key_values
    counted = measure.flops(lambda: network(prompt[:, :1], past_key_values=past, use_cache=True))
    size = gpt.SIZES[3]
    used = sum(p.numel() for n, p in network.named_parameters() if "norm" not in n and "embed" not in n)
    model = kinetics.shape("used", used, size.layers, size.heads, size.kv_heads, size.head_dim)
    flops, _ = kinetics.cost(model, prompt.shape[1] + 0.5, 1)  # the new token sees itself too: n + 1 = (n + 1/2) + 1/2
    assert counted == 2 * flops


def test_attention_ratio_is_the_limit_of_many_trials(kinetics):
    model = kinetics.shape("0.6B", *QWEN_0_6B)
    bill = kinetics.eflops(model, 256, 16384, 1e9, intensity=562.5)
    parameters = 2 * 1e9 * model.parameters * 16384
    assert kinetics.attention_ratio(model, 256, 16384, 562.5) == pytest.approx(bill / parameters - 1, rel=1e-6)
    assert kinetics.attention_ratio(model, 256, 16384, 562.5) == pytest.approx(352.6, abs=0.1)


@pytest.mark.parametrize("intensity", [0, 15, 562.5])
def test_affordable_spends_the_budget_exactly(kinetics, intensity):
    model = kinetics.shape("14B", *QWEN_14B)
    tokens = kinetics.affordable(model, 256, 7e15, intensity)
    assert kinetics.eflops(model, 256, tokens, intensity=intensity) == pytest.approx(7e15, rel=1e-12)


def test_exercises(kinetics):
    small, large = kinetics.shape("0.6B", *QWEN_0_6B), kinetics.shape("14B", *QWEN_14B)
    assert 2 * small.kv * 32768 / 2**30 == 3.5
    for intensity, tokens, slack in ((562.5, 27000, 500), (0, 5450, 10)):
        price = kinetics.eflops(small, 256, 32768, intensity=intensity)
        assert kinetics.affordable(large, 256, price, intensity) == pytest.approx(tokens, abs=slack)
    assert kinetics.coverage(3, 32, 4) == pytest.approx(0.3395, abs=5e-5)


# -- strategies and frontiers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n", "trials"), [(0, 6, 3), (1, 6, 3), (4, 6, 3), (6, 6, 6), (2, 9, 1)])
def test_coverage_is_the_share_of_subsets_with_a_right_answer(kinetics, right, n, trials):
    subsets = list(combinations([True] * right + [False] * (n - right), trials))
    assert kinetics.coverage(right, n, trials) == pytest.approx(np.mean([any(s) for s in subsets]), abs=1e-12)


def test_coverage_is_what_redrawing_gives(kinetics):
    rng, answers = np.random.default_rng(0), np.arange(20) < 3
    drawn = np.mean([answers[rng.permutation(20)[:5]].any() for _ in range(4000)])
    assert kinetics.coverage(3, 20, 5) == pytest.approx(drawn, abs=4 * 0.5 / 4000**0.5)


def test_best_of_n_bills_the_mean_cost_not_the_cost_of_the_mean(kinetics):
    model = kinetics.shape("toy", 1000, 3, 4, 2, 8)
    lengths, right = np.array([[10, 90, 10, 90]]), np.array([[True, False, False, False]])
    costs, scores = kinetics.best_of_n(model, np.array([20]), lengths, right, intensity=562.5)
    assert costs.shape == scores.shape == (1, 3)
    for column, n in enumerate((1, 2, 4)):
        bills = [kinetics.eflops(model, 20, length, n, intensity=562.5) for length in (10, 90)]
        assert costs[0, column] == pytest.approx(np.mean(bills))
    np.testing.assert_allclose(scores[0], [1 / 4, 1 / 2, 1])


def test_long_chain_scores_unfinished_answers_zero_and_bills_only_what_is_written(kinetics):
    model = kinetics.shape("toy", 1000, 3, 4, 2, 8)
    lengths, right = np.array([[20, 70]]), np.array([[True, True]])
    costs, scores = kinetics.long_chain(model, np.array([20]), lengths, right, intensity=0)
    np.testing.assert_allclose(scores[0], [0, 0] + [0.5] * 6 + [1] * 4)  # budgets 8, 16, ... 96
    assert costs[0, 3] == pytest.approx(np.mean([kinetics.eflops(model, 20, n, intensity=0) for n in (20, 32)]))
    assert costs[0, -1] == costs[0, -4]


def test_spend_takes_the_best_affordable_configuration_of_each_question(kinetics):
    cost = np.array([[[1.0, 2.0, 4.0], [1.0, 3.0, 9.0]]])
    score = np.array([[[0.2, 0.1, 0.9], [0.0, 0.5, 1.0]]])
    got = kinetics.spend(cost, score, np.array([0.5, 1, 2, 3, 4, 10]))
    np.testing.assert_allclose(got[0], [[0, 0.2, 0.2, 0.2, 0.9, 0.9], [0, 0, 0, 0.5, 0.5, 1]])


def test_split_half_takes_the_luck_out_of_the_choice(kinetics):
    """Configurations of equal worth: the best of many looks better than it is, unless others judge it."""
    rng = np.random.default_rng(0)
    chosen, judges = (rng.binomial(8, 0.5, (1, 400, 12)) / 8 for _ in range(2))
    cost, grid = np.broadcast_to(np.arange(12.0), (1, 400, 12)), np.array([20.0])
    assert kinetics.spend(cost, chosen, grid).mean() > 0.7
    assert kinetics.spend(cost, chosen, grid, judges).mean() == pytest.approx(0.5, abs=0.03)


def test_compare_knows_a_shift_and_its_price(kinetics):
    """A small and a large model; FLOPs make the small one cheaper for every level, eFLOPs the large one."""
    budgets, parameters = np.array([1.0, 2.0, 4.0, 8.0]), np.array([10.0, 40.0])
    small_first = np.array([[0.5, 1, 1, 1], [0, 0.5, 1, 1]])
    large_first = np.array([[0, 0, 0.5, 1], [0.5, 1, 1, 1]])
    shift, penalty = kinetics.compare(
        small_first, large_first, (budgets, budgets), parameters, np.array([0.5, 0.9, 2.0])
    )
    assert shift == 2  # from 10 to 40 parameters is two doublings
    assert penalty == 4
    assert kinetics.compare(small_first, small_first, (budgets, budgets), parameters, np.array([0.5])) == (0, 1)


# -- attention ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [88, 89, 95, 96])
def test_block_attention_with_a_large_budget_is_dense(kinetics, heads, length):
    q, keys, values, means = heads
    dense = F.scaled_dot_product_attention(q, keys[:, :, :length], values[:, :, :length])
    got = kinetics.block_attention(q, keys, values, means, length, 200)
    torch.testing.assert_close(got, dense, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("length", "sinks"), [(81, 0), (85, 1), (88, 0)])
def test_block_attention_reads_the_blocks_of_the_best_mean_logits(kinetics, heads, length, sinks):
    q, keys, values, means = heads
    full, seen = (length - 1) // 8, torch.zeros(2, 3, length, dtype=torch.bool)
    for row in range(2):
        for head in range(3):
            logits = [(q[row, head] @ keys[row, head, 8 * b : 8 * b + 8].T).mean().item() for b in range(full)]
            best = sorted(range(sinks, full), key=lambda b: -logits[b])[: 3 - sinks]
            for b in [*range(sinks), *best, full]:
                seen[row, head, 8 * b : 8 * b + 8] = True
    masked = F.scaled_dot_product_attention(q, keys[:, :, :length], values[:, :, :length], attn_mask=seen[:, :, None])
    got = kinetics.block_attention(q, keys, values, means, length, 32, sinks)
    torch.testing.assert_close(got, masked, atol=1e-6, rtol=0)


def test_block_attention_really_gathers(kinetics, heads, monkeypatch):
    """What reaches the attention kernel is no longer than the budget."""
    q, keys, values, means = heads
    read, true = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v: read.append(k.shape) or true(q, k, v))
    kinetics.block_attention(q, keys, values, means, 93, 32)
    assert read == [(2, 3, 29, 16)]  # three blocks and the five tokens of the newest


@pytest.mark.parametrize("kind", ["dense", "block", "oracle", "local"])
def test_decoding_with_a_large_budget_gives_the_models_own_logits(kinetics, network, kind):
    model, problems = Llama.from_transformers(network), gpt.problems(3, 8, np.random.default_rng(0))
    cache = model.cache(3, 96)
    model(problems.prompt, cache)
    attend = kinetics.attention(kind, cache, budget=96, block=8)
    got = [model(token, cache, attend=attend) for token in problems.solution[:, :20].split(1, dim=1)]
    expected = network(torch.cat([problems.prompt, problems.solution[:, :20]], 1)).logits[:, -20:]
    torch.testing.assert_close(torch.cat(got, 1), expected, atol=1e-4, rtol=1e-4)


def test_mean_keys_follow_the_cache(kinetics, network):
    """Blocks that become full while decoding get the mean of their keys: a cache filled at once chooses the same."""
    model, ids = Llama.from_transformers(network), gpt.problems(2, 12, np.random.default_rng(1)).prompt
    whole, grown = model.cache(2, 48), model.cache(2, 48)
    model(ids[:, :38], whole)
    model(ids[:, :14], grown)
    attend = kinetics.attention("block", grown, budget=48, block=8)
    for token in ids[:, 14:38].split(1, dim=1):
        model(token, grown, attend=attend)
    torch.testing.assert_close(grown.keys[:, :, :, :38], whole.keys[:, :, :, :38], atol=1e-4, rtol=1e-4)
    narrow = [kinetics.attention("block", cache, budget=24, block=8) for cache in (whole, grown)]
    attend_cells = attend.__closure__
    means = next(c.cell_contents for c in attend_cells if isinstance(c.cell_contents, torch.Tensor))
    torch.testing.assert_close(
        means[:, :, :, :4], whole.keys.unflatten(3, (-1, 8)).mean(4)[:, :, :, :4], atol=1e-4, rtol=1e-4
    )
    logits = [model(ids[:, 38:39], cache, attend=a) for cache, a in zip((whole, grown), narrow, strict=True)]
    torch.testing.assert_close(*logits, atol=1e-3, rtol=1e-3)


def test_oracle_keeps_the_best_tokens_and_local_the_last(kinetics, network):
    model, ids = Llama.from_transformers(network), gpt.problems(2, 12, np.random.default_rng(1)).prompt
    cache = model.cache(2, 48)
    model(ids, cache)
    q = torch.randn(2, 2, 2, 16, generator=torch.Generator().manual_seed(0))
    keys, values, length = cache.keys[1], cache.values[1], cache.length
    best = torch.zeros(2, 2, length, dtype=torch.bool)
    score = torch.einsum("bhrd,bhnd->bhn", q, keys[:, :, :length])
    best.scatter_(2, score.argsort(-1, descending=True)[..., :16], True)
    last = (torch.arange(length) >= length - 8) | (torch.arange(length) < 8)
    for kind, seen in (("oracle", best), ("local", last.expand(2, 2, -1))):
        expected = F.scaled_dot_product_attention(
            q, keys[:, :, :length], values[:, :, :length], attn_mask=seen[:, :, None]
        )
        got = kinetics.attention(kind, cache, budget=16, block=8, sinks=1)(1, q, length)
        torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)
        dense = kinetics.attention(kind, cache, budget=16, block=8, sinks=1, dense_layers=2)(1, q, length)
        assert (dense - got).abs().max() > 1e-3  # a dense layer stays dense


# -- the family and the fits -------------------------------------------------------------------------------------------


def test_solutions_are_right_and_read_back():
    for steps in (1, 7, 12):
        problems = gpt.problems(20, steps, np.random.default_rng(steps))
        for prompt, solution, answer in zip(problems.prompt, problems.solution, problems.answer, strict=True):
            listed, start = gpt.decode(prompt).rstrip("\n").split("|")
            value = int(start)
            for line, step in zip(
                gpt.decode(solution).split("\n"), (listed[i : i + 3] for i in range(0, 3 * steps, 3)), strict=False
            ):
                value = {"+": value + int(step[2]), "-": value - int(step[2]), "*": value * int(step[2])}[step[1]] % 97
                assert line == f"{step}={value:02d}"
            assert value == answer
        np.testing.assert_array_equal(gpt.final_answers(problems.solution), problems.answer)
        np.testing.assert_array_equal(gpt.lengths(problems.solution), 7 * steps + 4)


def test_an_answer_behind_the_full_stop_or_without_one_does_not_count():
    texts = [">58.", "a+8=>5.>58.", ">5+.", ">58", "58."]
    tokens = torch.full((len(texts), 11), gpt.encode("\n").item())
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = gpt.encode(text)
    np.testing.assert_array_equal(gpt.final_answers(tokens), [58, -1, -1, -1, -1])
    np.testing.assert_array_equal(gpt.lengths(tokens), [4, 7, 4, 11, 3])


def test_sizes_state_their_parameters():
    for number, size in gpt.SIZES.items():
        assert gpt.build(number).num_parameters() == size.parameters


@pytest.mark.parametrize("size", gpt.SIZES)
def test_checkpoints_solve_short_chains_better_with_size(size):
    """One step at temperature 1: four in five right for the smallest, nearly all for the largest."""
    problems = gpt.problems(64, 1, np.random.default_rng(5))
    spent, right = gpt.answers(gpt.load(size), [problems], 4, seed=0)
    assert right.mean() > {1: 0.65, 2: 0.85, 3: 0.93, 4: 0.95, 5: 0.96}[size]
    assert np.median(spent) == 11


def test_power_law_finds_its_exponent():
    rng = np.random.default_rng(0)
    x = np.geomspace(1, 1000, 12)
    law = scaling.power_law(x, 3 * x**-0.5 * np.exp(0.05 * rng.standard_normal(12)))
    assert law.low < -0.5 < law.high
    assert law.exponent == pytest.approx(-0.5, abs=0.03)
    assert law(100) == pytest.approx(0.3, rel=0.1)
    for bad in (([1, 2], [1, 2]), ([1, 1, 1], [1, 2, 3]), ([1, 2, 3], [1, 0, 3]), ([1, 2, np.nan], [1, 2, 3])):
        with pytest.raises(ValueError, match="power law"):
            scaling.power_law(*bad)


def test_additive_fit_is_exact_where_the_model_is_and_never_negative():
    rng = np.random.default_rng(0)
    features = np.stack([np.ones(9), 1e9 * rng.random(9), 1e6 * rng.random(9)], 1)
    truth = np.array([0.03, 1e-11, 2e-8])
    weights, held_out = scaling.additive_fit(features, features @ truth)
    np.testing.assert_allclose(weights, truth, rtol=1e-6)
    np.testing.assert_allclose(held_out, features @ truth, rtol=1e-6)
    assert (scaling.additive_fit(features, 1 / (features @ truth))[0] >= 0).all()


def test_frontier_tools():
    curves = np.array([[0.0, 0.2, 0.9, 0.8], [0.1, 0.4, 0.5, 0.5]])
    np.testing.assert_array_equal(scaling.envelope(curves)[1], [1, 1, 0, 0])
    prices = scaling.cheapest(curves, np.array([1.0, 2.0, 4.0, 8.0]), np.array([0.3, 0.85, 0.95]))
    np.testing.assert_array_equal(prices, [[4, 4, np.inf], [2, np.inf, np.inf]])
    np.testing.assert_allclose(scaling.smooth(np.array([0.0, 3.0, 6.0])), [1, 3, 5])
