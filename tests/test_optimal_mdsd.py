"""The method of decoding/optimal-mdsd, and the shared rules for several drafts, against independent roads."""

import sys
from functools import partial
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from test_mutations import checks, fails, mutate
from transformers import LlamaConfig, LlamaForCausalLM

from workbook import acceptance, decoding, notebook, verifiers
from workbook.chance import Chance, ToyModel, enumerate_outcomes
from workbook.models.lm import Llama

mdsd = notebook.load_method("decoding/optimal-mdsd")
NAME = "decoding/optimal-mdsd"


def pairs(count=8, vocabulary=5, sharpness=0.5, seed=0):
    rng = np.random.default_rng(seed)
    return [tuple(rng.dirichlet(np.full(vocabulary, sharpness), 2)) for _ in range(count)]


def over_subsets(target, sets, law):
    """1 + min over all subsets H of target(H) - P(set inside H)."""
    tokens = range(len(target))
    subsets = [set(h) for size in range(len(target) + 1) for h in combinations(tokens, size)]
    inside = [sum(p for s, p in zip(sets.tolist(), law, strict=True) if h.issuperset(s)) for h in subsets]
    return 1 + min(sum(target[list(h)]) - q for h, q in zip(subsets, inside, strict=True))


def sequential_law(draft, k):
    """Ordered draws without replacement and their probabilities, by the definition."""
    for draws in permutations(range(len(draft)), k):
        probability, left = 1.0, set(range(len(draft)))
        for token in draws:
            probability *= draft[token] / draft[list(left)].sum()
            left.remove(token)
        yield draws, probability


def kept_and_law(propose, select, target, draft, k):
    """Exactly: the probability that the selected token is a guess, and the token's law."""

    def once(chance):
        tokens = np.array(propose(draft, k, chance))
        chosen = select(target, draft, tokens, chance)
        return chosen, chosen in tokens

    law, kept = np.zeros(len(target)), 0.0
    for p, (token, inside) in enumerate_outcomes(once):
        law[token] += p
        kept += p * inside
    return kept, law


# -- the optimum -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("replace", [True, False])
def test_prefix_minimum_equals_all_subsets_and_the_linear_program(k, replace):
    optimum = mdsd.optimal_with_replacement if replace else mdsd.optimal_without_replacement
    for t, d in pairs():
        sets, law = acceptance.draft_sets(d, k, replace=replace)
        value = optimum(t, d, k)
        assert value == pytest.approx(over_subsets(t, sets, law), abs=1e-9)
        assert value == pytest.approx(acceptance.linear_program(t, sets, law), abs=1e-9)
        assert value == pytest.approx(acceptance.transport(t, sets, law), abs=1e-9)


def test_best_set_is_a_prefix_by_ratio():
    """Pairs on which sorting by the difference of the laws goes wrong, found among a thousand."""
    for seed in (94, 194, 374, 674, 976):
        t, d = np.random.default_rng(seed).dirichlet(np.ones(6), 2)
        best = over_subsets(t, *acceptance.draft_sets(d, 3))
        assert mdsd.optimal_with_replacement(t, d, 3) == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("k", [2, 3])
def test_draws_inside_by_the_sequential_definition(k):
    for _, d in pairs(6, 6, sharpness=0.3):
        order = np.random.default_rng(k).permutation(6)
        inside = acceptance.all_draws_inside(d, order, k)
        for size in range(1, 7):
            chosen = set(order[:size].tolist())
            expected = sum(p for draws, p in sequential_law(d, k) if chosen.issuperset(draws))
            assert inside[size - 1] == pytest.approx(expected, abs=1e-11)


def test_two_draws_in_closed_form_also_when_one_token_has_nearly_all_the_mass():
    for sharpness, heavy in ((1.0, 0.0), (0.05, 0.0), (0.3, 1 - 1e-9)):
        rng = np.random.default_rng(3)
        d = rng.dirichlet(np.full(3000, sharpness)) * (1 - heavy)
        d[7] += heavy
        order = rng.permutation(3000)
        tail = np.append(np.cumsum(d[order][::-1])[::-1][1:], 0)
        others = np.array([d[:i].sum() + d[i + 1 :].sum() for i in order])
        expected = 1 - tail * (1 + np.cumsum(d[order] / others))
        np.testing.assert_allclose(acceptance.all_draws_inside(d, order, 2), expected, atol=1e-11)


def test_three_draws_as_a_double_sum():
    d = np.random.default_rng(4).dirichlet(np.full(60, 0.5))
    inside = d[:40]
    pair = np.outer(inside / (1 - inside), inside) * (1 - np.eye(40))
    third = (inside.sum() - inside[:, None] - inside) / (1 - inside[:, None] - inside)
    assert acceptance.all_draws_inside(d, np.arange(40), 3)[-1] == pytest.approx((pair * third).sum(), abs=1e-11)


def test_distinct_guesses_are_never_worse_than_independent_ones():
    for t, d in pairs(20, 40, seed=6):
        for k in (2, 3, 5):
            assert mdsd.optimal_without_replacement(t, d, k) >= mdsd.optimal_with_replacement(t, d, k) - 1e-10


def test_bottleneck_may_hold_tokens_that_are_drawn_more_often_than_n_d():
    t, d = np.array([0.1, 0.2, 0.7]), np.array([0.9, 0.05, 0.05])
    assert mdsd.optimal_without_replacement(t, d, 2) == pytest.approx(1 + 0.3 - 0.045 / 0.1 - 0.045 / 0.95, abs=1e-10)


def test_closed_forms_of_the_exercises_and_of_uniform_laws():
    d, t = np.array([0.4, 0.3, 0.15, 0.1, 0.05]), np.array([0.1, 0.2, 0.3, 0.15, 0.25])
    assert mdsd.optimal_with_replacement(t, d, 2) == pytest.approx(0.81, abs=1e-12)
    assert mdsd.greedy_acceptance(t, d, 2) == pytest.approx(0.783333, abs=1e-6)
    uniform, two = np.full(8, 1 / 8), np.r_[0.5, 0.5, np.zeros(6)]
    assert mdsd.optimal_with_replacement(two, uniform, 4) == pytest.approx(1 - 0.75**4, abs=1e-12)
    assert mdsd.optimal_without_replacement(two, uniform, 4) == pytest.approx(1 - 15 / 70, abs=1e-10)
    assert mdsd.optimal_without_replacement(uniform, two, 5) == pytest.approx(0.25, abs=1e-12)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="target is no distribution"):
        mdsd.optimal_with_replacement(np.array([0.5, 0.6]), np.array([0.5, 0.5]), 2)
    with pytest.raises(ValueError, match="draft is no distribution"):
        mdsd.optimal_without_replacement(np.array([0.5, 0.5]), np.array([1.5, -0.5]), 2)
    with pytest.raises(ValueError, match="at least 1"):
        mdsd.optimal_with_replacement(np.array([0.5, 0.5]), np.array([0.5, 0.5]), 0)


# -- greedy drafts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3])
def test_greedy_rule_attains_its_optimum_and_keeps_the_law(k):
    for t, d in pairs(6, 5, seed=7):
        kept, law = kept_and_law(mdsd.greedy_proposal, mdsd.greedy_selection, t, d, k)
        outcomes = enumerate_outcomes(lambda c, d=d: mdsd.greedy_proposal(d, k, c))
        sets = np.array([tokens for _, tokens in outcomes])
        best = acceptance.linear_program(t, sets, np.array([p for p, _ in outcomes]))
        np.testing.assert_allclose(law, t, atol=1e-12)
        assert kept == pytest.approx(best, abs=1e-9)
        assert mdsd.greedy_acceptance(t, d, k) == pytest.approx(best, abs=1e-9)


def test_greedy_proposal_is_the_top_and_one_more():
    d = np.array([0.1, 0.4, 0.05, 0.25, 0.2])
    tokens = mdsd.greedy_proposal(d, 3, Chance(0))
    assert tokens[:2] == [1, 3]
    assert tokens[2] in (0, 2, 4)
    assert sorted(mdsd.greedy_proposal(np.array([0.5, 0.0, 0.5]), 4, Chance(0))) == [0, 2]


@pytest.mark.parametrize(("drafts", "length"), [(2, 2), (3, 1)])
def test_greedy_text_has_the_targets_law(drafts, length):
    target, draft = ToyModel(5, 4), ToyModel(6, 4)
    setting = {"drafts": drafts, "length": length, "tokens": 2, "propose": mdsd.greedy_proposal}
    np.testing.assert_allclose(
        verifiers.exact_law(partial(verifiers.descend, mdsd.greedy_selection), target, draft, **setting),
        target.law(2),
        atol=1e-12,
    )


# -- the shared rules ------------------------------------------------------------------------------------------------


def test_draft_sets_merge_orders():
    d = np.array([0.5, 0.3, 0.2])
    sets, law = acceptance.draft_sets(d, 2)
    found = {tuple(sorted(set(s))): p for s, p in zip(sets.tolist(), law, strict=True)}
    assert found[(0,)] == pytest.approx(0.25)
    assert found[(0, 1)] == pytest.approx(0.3)
    sets, law = acceptance.draft_sets(d, 2, replace=False)
    expected = {}
    for draws, p in sequential_law(d, 2):
        expected[tuple(sorted(draws))] = expected.get(tuple(sorted(draws)), 0) + p
    assert {tuple(s): pytest.approx(p) for s, p in zip(sets.tolist(), law, strict=True)} == expected


def test_shared_kseq_equals_the_notebook_of_its_paper():
    spectr = notebook.load_method("decoding/spectr")
    for t, d in pairs(6, 12, seed=8):
        for k in (1, 2, 4):
            assert acceptance.kseq_discount(t, d, k) == pytest.approx(spectr.kseq_threshold(t, d, k), abs=1e-8)
            assert acceptance.kseq_acceptance(t, d, k) == pytest.approx(spectr.kseq_acceptance(t, d, k), abs=1e-9)


@pytest.mark.parametrize(
    ("propose", "select"),
    [
        (verifiers.independent, verifiers.kseq_selection),
        (verifiers.independent, verifiers.recursive_selection),
        (verifiers.distinct, verifiers.distinct_recursive_selection),
    ],
)
def test_rules_for_one_token_keep_the_law_below_their_optimum(propose, select):
    for t, d in pairs(4, 4, seed=9):
        for k in (2, 3):
            kept, law = kept_and_law(propose, select, t, d, k)
            np.testing.assert_allclose(law, t, atol=1e-12)
            best = acceptance.linear_program_acceptance(t, d, k, replace=propose is verifiers.independent)
            assert kept <= best + 1e-9


@pytest.mark.parametrize(
    ("propose", "verifier"),
    [
        (verifiers.independent, verifiers.kseq_verification),
        (verifiers.distinct, verifiers.distinct_recursive_rejection),
    ],
)
def test_verifiers_for_several_rows_keep_the_law_of_the_text(propose, verifier):
    target, draft = ToyModel(3), ToyModel(4)
    law = verifiers.exact_law(verifier, target, draft, drafts=2, length=2, tokens=3, propose=propose)
    np.testing.assert_allclose(law, target.law(3), atol=1e-12)


def test_sampled_acceptance_without_replacement_is_unbiased():
    t, d = np.random.default_rng(11).dirichlet(np.ones(5), 2)
    assert acceptance.distinct_recursive_acceptance(t, d, 1, samples=3) == pytest.approx(np.minimum(t, d).sum())
    for k in (2, 3):
        kept, _ = kept_and_law(verifiers.distinct, verifiers.distinct_recursive_selection, t, d, k)
        runs = [acceptance.distinct_recursive_acceptance(t, d, k, samples=100, seed=seed) for seed in range(60)]
        assert abs(np.mean(runs) - kept) < 4 * np.std(runs) / 60**0.5


def test_enumerations_of_the_library_agree_with_their_definitions():
    t, d = np.random.default_rng(12).dirichlet(np.ones(4), 2)
    kept, law = kept_and_law(verifiers.distinct, verifiers.distinct_recursive_selection, t, d, 2)
    both = verifiers.exact_selection(verifiers.distinct, verifiers.distinct_recursive_selection, t, d, 2)
    np.testing.assert_allclose(both[0], law, atol=1e-15)
    assert both[1] == pytest.approx(kept, abs=1e-15)
    drawn = {tuple(s): p for s, p in zip(*verifiers.proposal_sets(verifiers.distinct, d, 2), strict=True)}
    assert drawn == {draws: pytest.approx(p) for draws, p in sequential_law(d, 2)}
    sets, law = acceptance.draft_sets(d, 2)
    assert acceptance.subsets(t, sets, law) == pytest.approx(over_subsets(t, sets, law), abs=1e-12)


def test_distinct_proposal_ends_with_the_support():
    assert sorted(verifiers.distinct(np.array([0.2, 0.0, 0.8]), 4, Chance(1))) == [0, 2]


@pytest.mark.parametrize("greedy", [False, True])
def test_loop_with_parted_rows_follows_the_targets_law(greedy):
    """Rows that part at the first token, in the real loop on tiny models: chi-square of the second new token."""
    models = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, initializer_range=0.5, tie_word_embeddings=True,
        )  # fmt: skip
        models.append(LlamaForCausalLM(config).eval())
    target = Llama.from_transformers(models[0])
    kept = np.array([2, 4, 7])  # a draft of three tokens: four rows are asked for, three can part
    draft = Llama.from_transformers(models[1], head=models[1].lm_head.weight.detach()[kept], vocabulary=kept)
    prompt, rows = [1, 2, 3], []
    tokens = torch.cat([torch.tensor([prompt]).expand(11, -1), torch.arange(11)[:, None]], 1)
    first = decoding.probabilities(target(torch.tensor([prompt]), target.cache(1, 3), last=True)[0, 0])
    second = first @ decoding.probabilities(target(tokens, target.cache(11, 4), last=True)[:, 0])
    method = (mdsd.greedy_proposal, partial(verifiers.descend, mdsd.greedy_selection))
    propose, verifier = method if greedy else (verifiers.distinct, verifiers.distinct_recursive_rejection)
    counts = np.zeros(11)
    for seed in range(300):
        trace = decoding.decode(
            target, draft, prompt, verifier=verifier, drafts=4, length=2, new_tokens=2, chance=Chance(seed),
            propose=propose, callback=lambda seen, _: rows.append(len(set(seen.tokens[:, 0]))),
        )  # fmt: skip
        counts[trace.tokens[1]] += 1
    assert set(rows) == {3}
    deviation = ((counts - 300 * second) ** 2 / (300 * second)).sum()
    assert deviation < 35, f"chi-square {deviation:.1f} with 10 degrees of freedom"


# -- one wrong sign is noticed ---------------------------------------------------------------------------------------

MUTATIONS = [
    ("target[able] / draft[able])]\n    cut = np.cumsum(target[able]) - np.cumsum(draft[able]) ** n",
     "target[able] - draft[able])]\n    cut = np.cumsum(target[able]) - np.cumsum(draft[able]) ** n"),
    ("- np.cumsum(draft[able]) ** n", "+ np.cumsum(draft[able]) ** n"),
    ("able = np.flatnonzero(target < n * draft)", "able = np.flatnonzero(target < draft)"),
    ("target < draft * (1 / np.maximum(left, np.finfo(float).tiny)).sum()", "target < draft * n"),
    ("np.cumsum(target[able]) - rules.all_draws_inside", "np.cumsum(target[able]) + rules.all_draws_inside"),
    ("np.argsort(-draft, kind=\"stable\")[: min(k,", "np.argsort(draft, kind=\"stable\")[: min(k,"),
    ("chance.draw(np.maximum(target - law, 0))", "chance.draw(np.maximum(law - target, 0))"),
    ("target[x] / law[x]", "target[x] / draft[x]"),
    ("target[top].sum() + np.minimum", "draft[top].sum() + np.minimum"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize("number", range(len(MUTATIONS)))
def test_changed_sign_is_caught(number, tmp_path, monkeypatch):
    old, new = MUTATIONS[number]
    this = sys.modules[__name__]
    monkeypatch.setattr(this, "mdsd", mutate(NAME, old, new, tmp_path, monkeypatch))
    assert any(map(fails, checks(this, {}))), f"nothing noticed that {old!r} became {new!r}"
