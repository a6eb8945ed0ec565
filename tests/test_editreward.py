"""EditReward's losses against quadrature, regression and laws written anew; its panels, judges, editors and pools."""

from itertools import combinations, product

import numpy as np
import pytest
import test_mutations
import torch
from scipy import integrate, optimize, stats
from skimage.metrics import structural_similarity
from sklearn.linear_model import LogisticRegression

from workbook import editors, images, notebook, panels, pixeleditors, pools, preferences
from workbook.models import canvas

PLACES = torch.linspace(-3, 3, 13, dtype=torch.float64)
SIGMA = torch.linspace(0.1, 2, 13, dtype=torch.float64)
sigmoid = lambda z: 1 / (1 + np.exp(-z))  # noqa: E731


@pytest.fixture(scope="module")
def editreward():
    return notebook.load_method("test-time/editreward")


def refusal(call):
    """What a call says when it refuses its arguments, or nothing."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


def mean_over_z(function, delta, spread):
    """E[function(z)] by adaptive integration."""
    density = lambda u: function(delta + spread * u) * stats.norm.pdf(u)  # noqa: E731
    return integrate.quad(density, -12, 12, epsabs=1e-11)[0]


# -- the losses --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["coded", "coded, margin", "likelihood", "BT", "BT with ties"])
def test_losses_are_their_integrals(editreward, kind):
    found = editreward.preference_loss(kind, PLACES, SIGMA, margin=0.57, k=5.0)
    for value, delta, spread in zip(found.tolist(), PLACES.tolist(), SIGMA.tolist(), strict=True):
        expected = {
            "coded": lambda d, s: mean_over_z(lambda z: -np.log(sigmoid(z)), d, s),
            "coded, margin": lambda d, s: mean_over_z(lambda z: -np.log(sigmoid(z)), d - 0.57, s),
            "likelihood": lambda d, s: -np.log(mean_over_z(sigmoid, d, s)),
            "BT": lambda d, s: -np.log(sigmoid(d)),
            "BT with ties": lambda d, s: -np.log(sigmoid(d - np.log(5))),
        }[kind](delta, spread)
        assert value == pytest.approx(expected, abs=1e-5)


def test_the_two_numbers_of_the_exercise(editreward):
    delta, spread = torch.tensor(-1.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64).sqrt()
    assert editreward.preference_loss("coded", delta, spread).item() == pytest.approx(1.711, abs=1e-3)
    assert editreward.preference_loss("likelihood", delta, spread).item() == pytest.approx(1.017, abs=1e-3)


def test_the_coded_loss_always_wants_less_spread_and_the_likelihood_does_not(editreward):
    for kind, always in (("coded", True), ("likelihood", False)):
        spread = SIGMA.clone().requires_grad_()
        slope = torch.autograd.grad(editreward.preference_loss(kind, PLACES, spread).sum(), spread)[0]
        assert bool((slope > 0).all()) == always
        if not always:
            assert (slope[PLACES < 0] < 0).all()  # a pair that went against the odds
            assert (slope[PLACES > 0] > 0).all()


def test_win_tie_and_loss_of_bradley_terry_with_ties_add_up(editreward):
    win, loss = (editreward.preference_loss("BT with ties", d, None, k=3.0) for d in (PLACES, -PLACES))
    tie = (3.0**2 - 1) * (-win - loss).exp()
    assert torch.allclose((-win).exp() + tie + (-loss).exp(), torch.ones_like(win))


def test_a_linear_head_is_logistic_regression(editreward):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 3))
    beats = rng.random(400) < sigmoid(x @ [1.0, -1.0, 0.3])
    signed = torch.from_numpy(np.where(beats, 1, -1)[:, None] * x)
    loss = lambda w: editreward.preference_loss("BT", signed @ torch.from_numpy(w), None).mean().item()  # noqa: E731
    peer = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(x, beats).coef_[0]
    assert optimize.minimize(loss, np.zeros(3), tol=1e-10).x == pytest.approx(peer, abs=1e-3)


def test_fusion_averages_log_sigma_or_adds_variances(editreward):
    mu, log_sigma = torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, np.log(4.0)]])
    level, width = editreward.fuse(mu, log_sigma)
    assert (level.item(), width.exp().item()) == pytest.approx((2.0, 2.0))  # not 2.5, the mean of sigma
    level, width = editreward.fuse(mu, log_sigma, "sum")
    assert (level.item(), width.exp().item()) == pytest.approx((4.0, 17**0.5))


def test_what_is_unknown_is_refused(editreward):
    kind = refusal(lambda: editreward.preference_loss("bt", PLACES, SIGMA))
    assert kind == "kind = 'bt': use BT, BT with ties, likelihood, coded or coded, margin."
    assert refusal(lambda: editreward.fuse(PLACES, SIGMA, "max")) == "how = 'max': use mean or sum."
    ties = refusal(lambda: editreward.comparisons(torch.ones(2, 2), "kept"))
    assert ties == "ties = 'kept': use one of dropped, fused, by head, heads only, all."
    few = lambda: editreward.train_heads("BT", torch.ones(8, 2, 2, 3), torch.ones(1, 8, 2, 2).int(), epochs=1)  # noqa: E731
    assert refusal(few) == "8 canvases are fewer than a batch of 32."


# -- comparisons -------------------------------------------------------------------------------------------------------


def lessons(one, other, ties):
    """What a pair teaches, as a list of (column, winner), written from the table in the text."""
    total, gaps = sum(one) - sum(other), [a - b for a, b in zip(one, other, strict=True)]
    winner = lambda gap: 0 if gap > 0 else 1  # noqa: E731
    heads = [(1 + d, winner(gap)) for d, gap in enumerate(gaps) if gap]
    if ties == "heads only":
        return heads
    if total:
        return [(0, winner(total))]
    both = [(0, 0), (0, 1)]
    return {"dropped": [], "all": both, "fused": both if any(gaps) else [], "by head": heads}[ties]


@pytest.mark.parametrize("ties", ["dropped", "fused", "by head", "heads only", "all"])
def test_comparisons_teach_what_the_table_says(editreward, ties):
    for seed in range(20):
        scores = torch.randint(1, 4, (4, 2), generator=torch.Generator().manual_seed(seed))
        weights = editreward.comparisons(scores, ties)
        for row, (i, j) in zip(weights, combinations(range(4), 2), strict=True):
            expected = torch.zeros(3, 2)
            for column, winner in lessons(scores[i].tolist(), scores[j].tolist(), ties):
                expected[column, winner] += 1
            assert torch.equal(row, expected)


def test_the_objective_is_the_mean_over_lessons(editreward):
    draw = torch.Generator().manual_seed(3)
    scores = torch.randint(1, 4, (2, 5, 3, 2), generator=draw)
    mu, log_sigma = torch.randn(2, 2, 5, 3, 2, generator=draw, dtype=torch.float64)
    weights = editreward.comparisons(scores, "by head").double()
    found = editreward.objective("likelihood", weights, mu, log_sigma)
    for m in range(2):
        losses = []
        for b, (i, j) in product(range(5), combinations(range(3), 2)):
            for column, winner in lessons(scores[m, b, i].tolist(), scores[m, b, j].tolist(), "by head"):
                a, z = (i, j) if winner == 0 else (j, i)
                pick = [0, 1] if column == 0 else [column - 1]
                delta = mu[m, b, a, pick].mean() - mu[m, b, z, pick].mean()
                widths = [log_sigma[m, b, e, pick].mean().exp().item() for e in (a, z)]
                losses.append(-np.log(mean_over_z(sigmoid, delta.item(), np.hypot(*widths))))
        assert found[m].item() == pytest.approx(np.mean(losses), abs=1e-4)


def test_a_fused_tie_pulls_together_and_tells_the_heads_nothing_apart(editreward):
    mu = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]], requires_grad=True)
    weights = editreward.comparisons(torch.tensor([[[[5, 3], [4, 4]]]]), "fused")
    slope = torch.autograd.grad(editreward.objective("BT", weights, mu, torch.zeros_like(mu)).sum(), mu)[0][0, 0]
    assert (slope[0] > 0).all()  # of the first edit: down, in both heads alike
    assert torch.allclose(slope[0, 0], slope[0, 1])
    apart = editreward.comparisons(torch.tensor([[[[5, 3], [4, 4]]]]), "by head")
    slope = torch.autograd.grad(editreward.objective("BT", apart, mu, torch.zeros_like(mu)).sum(), mu)[0][0, 0]
    assert slope[0, 0] < 0 < slope[0, 1]  # following is told to rise, visual to fall


# -- training ----------------------------------------------------------------------------------------------------------


def test_models_side_by_side_are_each_alone(editreward):
    """Gradients of three models in one batch are those of one model on its own, on its own labels."""
    draw = torch.Generator().manual_seed(1)
    states, scores = torch.randn(24, 3, 2, 6, generator=draw), torch.randint(3, 9, (3, 24, 3, 2), generator=draw)
    torch.manual_seed(0)
    many = preferences.Heads(3, 6, hidden=5, dropout=0.0)
    weights = editreward.comparisons(scores, "by head")
    mu, log_sigma = (x.unflatten(1, (24, 3)) for x in many(states.flatten(0, 1)))
    whole = torch.autograd.grad(editreward.objective("coded", weights, mu, log_sigma).sum(), many.weights[0])[0]
    for m in range(3):
        one = preferences.Heads(1, 6, hidden=5, dropout=0.0)
        one.load_state_dict({name: p[m : m + 1] for name, p in many.state_dict().items()})
        mu, log_sigma = (x.unflatten(1, (24, 3)) for x in one(states.flatten(0, 1)))
        value = editreward.objective("coded", weights[m : m + 1], mu, log_sigma).sum()
        assert torch.allclose(torch.autograd.grad(value, one.weights[0])[0][0], whole[m], atol=1e-6)


def line_of_labels(models=2, canvases=64):
    """States whose first number is the quality of their dimension, and panels that see it exactly."""
    states = torch.rand(canvases, 4, 2, 4, generator=torch.Generator().manual_seed(2))
    return states, (30 * states[..., 0]).round().int().expand(models, -1, -1, -1)


@pytest.mark.parametrize("arm", ["regression", "BT", "BT, by head", "BT with ties", "likelihood, ties by head"])
def test_heads_learn_the_order(editreward, arm):
    states, scores = line_of_labels()
    heads = editreward.train_heads(arm, states, scores, epochs=40, rate=5e-3)
    mu = heads(states.flatten(0, 1))[0].mean(-1)
    for m in range(2):
        assert stats.spearmanr(mu[m], states[..., 0].sum(-1).flatten()).statistic > 0.9


def test_each_head_reads_its_own_dimension(editreward):
    states, scores = line_of_labels()
    mu = editreward.train_heads("BT, by head", states, scores, epochs=40, rate=5e-3)(states.flatten(0, 1))[0][0]
    for d in range(2):
        assert stats.spearmanr(mu[:, d], states[..., d, 0].flatten()).statistic > 0.9
        assert abs(stats.spearmanr(mu[:, d], states[..., 1 - d, 0].flatten()).statistic) < 0.4


def test_training_repeats_and_tells_its_watcher(editreward):
    (states, scores), seen = line_of_labels(models=1), []
    runs = [editreward.train_heads("coded", states, scores, epochs=3, seed=4, watch=seen.append) for _ in range(2)]
    assert torch.equal(runs[0].weights[0], runs[1].weights[0])
    assert len(seen) == 2 * 3 * 2
    assert seen[0].shape == (1, 32, 4, 2)
    other = editreward.train_heads("coded", states, scores, epochs=3, seed=5)
    assert not torch.equal(runs[0].weights[0], other.weights[0])


# -- all weights -------------------------------------------------------------------------------------------------------


class Tilted(torch.nn.Module):
    """States of an input (n, 3): its first two numbers, each with a weight that starts at the wrong sign."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([-1.0, 1.0]))

    def forward(self, x):
        return torch.stack([x[:, :2] * self.weight, x[:, 2:].expand(-1, 2)], -1)  # (n, 2 dimensions, 2 numbers)


def tilted_labels():
    """Inputs (canvases, candidates, 3) whose first two numbers are the qualities, and one panel that sees them."""
    x = torch.rand(64, 4, 3, generator=torch.Generator().manual_seed(4))
    return x, (30 * x[..., :2]).round().int()[None]


def one_head():
    torch.manual_seed(1)
    return preferences.Heads(1, 2, hidden=8, dropout=0.0)


def test_with_a_network_all_weights_learn_the_network_by_the_smaller_step(editreward):
    """The first step of Adam is the rate itself, whatever the gradient: so both rates can be read off the weights."""
    x, scores = tilted_labels()
    heads, network = one_head(), Tilted()
    before = [network.weight.detach().clone(), heads.weights[2].detach().clone()]
    options = {"epochs": 1, "batch": 64, "rate": 1e-3, "slower": 0.2}
    back = editreward.train_heads("BT", (x,), scores, heads=heads, network=network, **options)
    assert back is heads
    assert (network.weight - before[0]).abs().tolist() == pytest.approx([2e-4, 2e-4], rel=1e-2)
    assert (heads.weights[2] - before[1]).abs().max().item() == pytest.approx(1e-3, rel=1e-2)
    parts = (heads, network)
    assert not any(part.training or p.requires_grad for part in parts for p in part.parameters())


def test_one_step_through_a_network_is_the_gradient_of_the_objective(editreward):
    """Against Adam on the objective itself, written out for one batch of all canvases."""
    x, scores = tilted_labels()
    found, network = one_head(), Tilted()
    options = {"epochs": 1, "batch": 64, "rate": 1e-3, "slower": 0.5}
    editreward.train_heads("likelihood", (x,), scores, heads=found, network=network, **options)
    heads, other = one_head(), Tilted()
    optimiser = torch.optim.Adam(
        [{"params": heads.parameters(), "lr": 1e-3}, {"params": other.parameters(), "lr": 5e-4}]
    )
    mu, log_sigma = (part.unflatten(1, (64, 4)) for part in heads(other(x.flatten(0, 1))[None]))
    weights = editreward.comparisons(scores, "dropped")
    editreward.objective("likelihood", weights, mu, log_sigma).sum().backward()
    optimiser.step()
    assert torch.allclose(network.weight, other.weight, atol=2e-5)
    for one, two in zip(found.weights, heads.weights, strict=True):  # a bias of mu has no slope: noise alone
        assert torch.allclose(one, two, atol=5e-5)


def test_the_rate_warms_up_and_stays(editreward):
    """Heads without a slope in one weight's way: 40 steps, of which the first two are smaller."""
    x, scores = tilted_labels()
    seen, heads, network = [], one_head(), Tilted()
    record = lambda log_sigma: seen.append(network.weight[0].item())  # noqa: E731  told before each step's effect
    options = {"epochs": 40, "batch": 64, "rate": 1e-4, "slower": 1.0, "watch": record}
    editreward.train_heads("BT", (x,), scores, heads=heads, network=network, **options)
    steps = np.abs(np.diff([-1.0, *seen]))[:4]
    assert steps == pytest.approx([0.5e-4, 1e-4, 1e-4, 1e-4], rel=0.1)


def test_all_weights_see_what_the_heads_alone_cannot(editreward):
    """A network that hides a dimension: heads on its states cannot tell it, all weights can."""
    x, scores = tilted_labels()
    hidden = Tilted()
    hidden.weight.data = torch.tensor([0.0, 1.0])
    states = hidden(x.flatten(0, 1)).detach().unflatten(0, (64, 4))
    rank = {}
    for name, data, network in (("alone", states, None), ("all", (x,), hidden)):
        heads = editreward.train_heads(
            "BT, by head", data, scores, epochs=60, batch=16, heads=one_head(), network=network, rate=5e-3, slower=1.0
        )
        read = states.flatten(0, 1) if network is None else network(x.flatten(0, 1))
        rank[name] = stats.spearmanr(heads(read)[0][0, :, 0], x[..., 0].flatten()).statistic
    assert rank["all"] > 0.9
    assert abs(rank["alone"]) < 0.4


def test_some_of_the_heads_are_a_copy_of_their_own(editreward):
    torch.manual_seed(0)
    many, states = preferences.Heads(3, 4, hidden=5, dropout=0.0), torch.randn(6, 2, 4)
    some = many.eval().requires_grad_(False).only([2])
    assert torch.allclose(some.eval()(states)[0][0], many(states)[0][2])
    assert all(p.requires_grad for p in some.parameters())
    with torch.no_grad():
        some.weights[0].add_(1)
    assert not torch.allclose(some(states)[0][0], many(states)[0][2])


# -- annotators --------------------------------------------------------------------------------------------------------


def test_the_law_of_a_panel_by_enumeration():
    """Two annotators, one dimension: all sixteen pairs of scores, with the chances of each by the normal integral."""
    quality, bias, noise = np.array([[0.35], [0.8]]), [0.4, -0.2], 0.6
    found = panels.law(quality, bias, noise)
    for row, q in zip(found, quality[:, 0], strict=True):
        chance = [[stats.norm.cdf(k + 0.5, 1 + 3 * q + b, noise) for k in (1, 2, 3)] for b in bias]
        each = [np.diff([0, *c, 1]) for c in chance]
        expected = np.zeros(7)
        for i, j in product(range(4), repeat=2):
            expected[i + j] += each[0][i] * each[1][j]
        assert row == pytest.approx(expected)


def test_a_panel_agrees_with_its_own_law():
    panel, quality = panels.Panel(0.9, seed=3, annotators=2), np.array([[[0.5, 0.6], [0.7, 0.5]]])
    many = panel.sums(np.repeat(quality, 20_000, 0), number=1).sum(-1)
    seen = [(np.sign(many[:, 0] - many[:, 1]) == sign).mean() for sign in (1, 0, -1)]
    assert panel.chances(quality[:, 0], quality[:, 1])[0] == pytest.approx(seen, abs=0.012)
    assert many.min() >= 4
    assert many.max() <= 16
    assert not np.array_equal(panel.sums(quality, 0), panels.Panel(0.9, seed=4, annotators=2).sums(quality, 0))


def test_nobody_beats_the_ceiling_and_the_likelier_side_reaches_it():
    panel, rng = panels.Panel(1.0, seed=0), np.random.default_rng(0)
    quality = rng.random((400, 4, 2))
    first, second = preferences.pairs_of(4)
    chances = panel.chances(quality[:, first], quality[:, second])[None]
    sums = panel.sums(quality, 0).sum(-1)
    labels = np.sign(sums[:, first] - sums[:, second])[None]
    truth = preferences.Truth(np.zeros((400, 6, 1)), labels, chances)
    likelier = np.sign(truth.exact - 0.5)
    right = (likelier == labels)[labels != 0].mean()
    assert right == pytest.approx(truth.ceiling(), abs=0.03)
    assert truth.ceiling() > 0.7


# -- judging -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_for_ties_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    delta, label = rng.standard_normal(40).round(seed % 3), rng.integers(-1, 2, 40)
    epsilon, accuracy = preferences.tie_threshold(delta, label)
    assert (preferences.called(delta, epsilon) == label).mean() == pytest.approx(accuracy)
    every = [(np.sign(delta) * (abs(delta) > e) == label).mean() for e in [0.0, *abs(delta)]]
    assert accuracy == pytest.approx(max(every))


def test_the_stretch_finds_the_scale():
    rng = np.random.default_rng(0)
    delta = rng.standard_normal(20_000)
    label = np.where(rng.random(20_000) < sigmoid(3 * delta), 1, -1) * (rng.random(20_000) < 0.9)
    factor = preferences.stretch(delta, np.zeros_like(delta), label, lambda delta, spread: delta.sigmoid())
    assert factor == pytest.approx(3, rel=0.08)


def test_grades_by_hand():
    """One model, two problems of three answers: every measure counted on fingers."""
    delta = np.array([[[[1.0], [2.0], [1.0]], [[-1.0], [0.1], [1.0]]]])
    gaps, labels = np.array([[[1.0], [1.0], [-1.0]], [[-1.0], [0.0], [2.0]]]), np.array([[[1, 1, 0], [-1, 0, 1]]])
    chances = np.tile([0.5, 0.2, 0.3], (1, 2, 3, 1))
    past = delta[:1, :1, :, 0], np.zeros((1, 1, 3)), np.array([[[1, 1, 1]]])
    truth = preferences.Truth(gaps, labels, chances)
    found = preferences.grade(delta, np.zeros((1, 2, 3)), truth, past, lambda d, s: d.sigmoid(), ["order"])
    assert found.score("order").value == pytest.approx(100 * 4 / 5)
    assert found.score("label").value == pytest.approx(100)
    assert found.score("all 2").value == pytest.approx(100)
    assert found.score("all 3").value == pytest.approx(0)  # a tie is missed in each problem
    assert found.score("order", less=found).value == 0
    guess = found.guess[0]
    expected = -(0.625 * np.log(guess) + 0.375 * np.log(1 - guess)).mean()
    assert found.score("nats").value == pytest.approx(expected)


def test_truth_of_a_test_set_by_hand():
    quality, juries = np.array([[[0.2, 0.9], [0.6, 0.5], [0.6, 0.4]]]), [panels.Panel(0.7, seed=s) for s in range(2)]
    sums = torch.tensor([[[[5, 6], [6, 5], [4, 4]]], [[[7, 6], [6, 5], [9, 9]]]])
    truth = preferences.truth_of(quality, sums, juries)
    assert truth.gaps[0] == pytest.approx(np.array([[0, -0.4, 0.4], [0.1, -0.4, 0.5], [0.1, 0, 0.1]]))
    assert truth.labels.tolist() == [[[0, 1, 1]], [[1, -1, -1]]]
    assert truth.chances[1, 0, 2] == pytest.approx(juries[1].chances(quality[0, 1:2], quality[0, 2:])[0])
    assert truth.first(1).labels.tolist() == [[[0, 1, 1]]]
    assert len(truth.first(1).exact) == 1


def test_intervals_of_crossed_tables_grow_with_what_varies():
    rng = np.random.default_rng(0)
    rows, columns = rng.standard_normal((5, 1)), rng.standard_normal((1, 200))
    both, seeds, problems = (preferences.crossed(x) for x in (rows + columns, rows + 0 * columns, 0 * rows + columns))
    width = lambda m: m.high - m.low  # noqa: E731
    assert width(both) > max(width(seeds), width(problems))
    assert width(problems) == pytest.approx(2 * 1.96 / 200**0.5, rel=0.2)
    assert preferences.crossed([1.0, 2.0], [2.0, 2.0]).value == pytest.approx(0.75)


# -- best of n ---------------------------------------------------------------------------------------------------------


def test_the_largest_of_n_normal_numbers():
    for n, known in {1: 0, 2: np.pi**-0.5, 4: 1.0294, 8: 1.4236, 16: 1.7660}.items():
        assert preferences.largest_normal(n) == pytest.approx(known, abs=1e-4)


def test_the_gain_of_normal_pools_is_the_predicted_one():
    rng = np.random.default_rng(0)
    quality = rng.standard_normal((400, 16))
    reward = 0.6 * quality + 0.8 * rng.standard_normal((400, 16))
    table, gains = preferences.best_of({"judge": reward[None]}, quality, [1, 4, 16])
    assert table.value.to_numpy() == pytest.approx(table.predicted, abs=0.08)
    assert table.value.iloc[1] == pytest.approx(0.6 * 1.0294, abs=0.06)
    assert gains["judge", 1] == pytest.approx(np.zeros((1, 400)), abs=1e-12)
    assert gains["judge", 4][0, 7] == pytest.approx(pools.expected_best(quality[7], reward[7], 4) - quality[7].mean())
    assert preferences.predicted_gain(np.ones((1, 16)), quality[:1], 4) == pytest.approx(0)


# -- edits and editors -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def some():
    return editors.draw_tasks(90, canvas.Canvases("test"), torch.Generator().manual_seed(0))


def test_tasks_are_what_their_words_say(some):
    assert some.kind.tolist() == [0, 1, 2] * 30
    changed = some.source != some.target
    assert (changed.sum(1) == 1).all()
    for i, place in enumerate(changed.int().argmax(1).tolist()):
        side, kind, word = (editors.INSTRUCTION[n] for n in some.words[i].tolist())
        assert place == (canvas.NOUN, canvas.BRIGHT, canvas.MIRRORED)[some.kind[i]][some.side[i]]
        assert (side, kind) == (("left", "right")[some.side[i]], editors.KINDS[some.kind[i]])
        assert word == canvas.WORDS[some.target[i, place]]
    old, new = (canvas.item_words(part, some.side)[:, 2] - 8 for part in (some.source, some.target))
    assert (some.strange != new).all()
    assert (some.strange != old)[some.kind == 0].all()


def test_hand_made_edits_have_the_quality_that_is_claimed(some):
    whole = torch.ones(len(some))
    exact = editors.blend(some, whole, 0 * whole, whole > 0)
    assert torch.equal(canvas.half(exact, some.side), some.asked)
    assert torch.equal(canvas.half(exact, 1 - some.side), canvas.half(some.x, 1 - some.side))
    mirrored, bright = some.kind == 2, some.kind == 1
    own = canvas.half(some.x, some.side)
    assert torch.allclose(some.asked[mirrored], own[mirrored].flip(3))
    dimmer = (some.asked[bright] + 1).amax((1, 2, 3)) < (own[bright] + 1).amax((1, 2, 3))
    assert torch.equal(dimmer, some.words[bright, 2] == editors.INSTRUCTION.index("dim"))
    for fault, name in enumerate(editors.FAULTS):
        edited, quality = editors.by_hand(some, torch.full((90,), fault), torch.Generator().manual_seed(1))
        assert ((quality >= 0) & (quality <= 1)).all()
        assert edited.shape == some.x.shape
        if name == "exact":
            assert (quality[:, 0] == 1).all()
        if name in ("nothing", "wrong word", "wrong side"):
            assert (quality[:, 0] == 0).all()
        if name == "half way":
            assert ((quality[:, 0] > 0.19) & (quality[:, 0] < 0.81)).all()


def test_blemishes_grow_with_their_level_and_stay_on_their_half(some):
    for blemish in range(1, len(editors.BLEMISHES)):
        kind, sizes = torch.full((90,), blemish), []
        for level in (0.0, 0.25, 1.0):
            draw = torch.Generator().manual_seed(0)
            spoilt = editors.blemished(some.x, some.side, kind, torch.full((90,), level), draw)
            assert torch.equal(canvas.half(spoilt, 1 - some.side), canvas.half(some.x, 1 - some.side))
            sizes.append((spoilt - some.x).square().mean().item())
        assert sizes[0] == pytest.approx(0, abs=1e-6)
        assert sizes[0] < sizes[1] < sizes[2]


def test_the_examiner_agrees_with_known_quality(some):
    examiner = editors.Examiner(canvas.Judge(images.load_classifier()), per_class=100)
    whole = torch.ones(len(some))
    exact, half = (editors.blend(some, share * whole, 0 * whole, whole > 0) for share in (1, 0.3))
    following, visual = examiner(some, exact).T
    assert following.mean() > 0.75
    assert visual.mean() > 0.7
    assert examiner(some, some.x)[:, 0].mean() < 0.1
    assert examiner(some, half)[:, 0].mean() < following.mean()
    spilt = editors.blend(some, whole, whole, whole > 0)
    assert examiner(some, spilt)[:, 0].mean() < following.mean() - 0.2
    noise = editors.blemished(exact, some.side, torch.full((90,), 2), 0.7 * whole, torch.Generator().manual_seed(0))
    assert examiner(some, noise)[:, 1].mean() < visual.mean() - 0.3


def test_a_mixture_has_different_editors_and_takes_one_more():
    pool, draw, tries = canvas.Canvases("test"), torch.Generator().manual_seed(0), iter([-1.0, 1.0])
    other = lambda tasks: (torch.full_like(tasks.x, next(tries)), np.full((len(tasks), 2), 0.5))  # noqa: E731
    tasks, edited, fault, quality = editors.mixture(6, 4, pool, draw, other=other, others=3)
    assert all(len(set(row)) == 4 for row in fault[3:].tolist())
    assert (fault[:3, :2] == 6).all()
    assert (fault == 6).sum() == 6
    assert (edited[:3, 0] == -1).all()
    assert (edited[:3, 1] == 1).all()
    assert (quality[fault == 6] == 0.5).all()
    assert len(tasks) == 6


def test_ssim_to_the_source_is_that_of_scikit_image(some):
    edited, _ = editors.by_hand(some[:4], torch.tensor([0, 2, 4, 5]), torch.Generator().manual_seed(0))
    found = editors.naive_scores(some[:4], edited)
    for value, one, other in zip(found["SSIM to source"], edited[:, 0], some.x[:4, 0], strict=True):
        _, full = structural_similarity(
            one.numpy(), other.numpy(), win_size=7, data_range=2.0, use_sample_covariance=False, full=True
        )
        assert value.item() == pytest.approx(full[3:-3, 3:-3].mean(), abs=1e-4)
    assert (editors.naive_scores(some[:4], some.x[:4])["least change"] == 0).all()


def test_directions_of_change_in_a_space_of_pictures_and_captions(some):
    """The cosine of two steps, written out; nothing changed is no direction; and the asked-for edit points the way."""
    clip = notebook.load_method("checkpoints/edit_clip")
    network, whole = clip.load_clip(), torch.ones(len(some))
    exact, wrong = (editors.blend(some, whole, 0 * whole, whole > 1 - right) for right in (1, 0))
    with torch.inference_mode():
        picture = network.pictures(exact) - network.pictures(some.x)
        text = network.captions(some.target) - network.captions(some.source)
    expected = (picture * text).sum(1) / (picture.norm(dim=1) * text.norm(dim=1))
    found = clip.direction(network, some.x, exact, some.source, some.target, chunk=40)
    assert torch.allclose(found, expected, atol=1e-5)
    assert (clip.direction(network, some.x, some.x, some.source, some.target) == 0).all()
    assert found.mean() > 0.3
    classes = some.kind == 0
    other = clip.direction(network, some.x, wrong, some.source, some.target)
    assert (found > other)[classes].double().mean() > 0.8


def test_untrained_judges_look_at_the_asked_half_and_at_the_captions(some):
    told, edited = [], some.x.flip(2)

    def direction(*given):
        told.extend(given)
        return torch.arange(len(some))

    chances = lambda half: half.mean((1, 2, 3))[:, None] + torch.arange(10)  # noqa: E731
    found = editors.untrained_scores(some, edited, chances, direction)
    assert list(found) == ["least change", "SSIM to source", "classifier", "CLIP direction"]
    for i, value in enumerate(found["classifier"].tolist()):
        half = edited[i, 0, :, 32:] if some.side[i] else edited[i, 0, :, :32]
        wanted = some.target[i, canvas.NOUN[some.side[i]]] - 8
        assert value == pytest.approx((half.mean() + wanted).item(), abs=1e-5)
    for given, own in zip(told, (some.x, edited, some.source, some.target), strict=True):
        assert given is own
    assert torch.equal(found["CLIP direction"], torch.arange(len(some)))


def test_editors_learn_from_what_they_are_shown():
    """From exact edits the editor becomes better than from edits that change nothing; and order sets the choice."""
    pool, draw = canvas.Canvases("train"), torch.Generator().manual_seed(0)
    tasks = editors.draw_tasks(300, pool, draw)
    tasks = tasks[(tasks.kind > 0).nonzero()[:, 0]]
    fault = torch.arange(len(tasks)) // 2 % 2  # exact for a task of each kind, nothing for the next two, …
    whole = torch.ones(len(tasks))
    edited = editors.blend(tasks, (fault == 0).float(), 0 * whole, whole > 0)
    good = np.argsort(fault.numpy(), kind="stable")[None]
    orders = {"good": good, "bad": good[:, ::-1]}
    taught = pixeleditors.from_selections(tasks, edited, orders, [0.5, 1.0], tasks[:60], steps=200)
    following = {key: x[..., 0].mean() for key, x in taught.items()}
    assert following["good", 0.5] > following["good", 1.0] > following["bad", 0.5]
    assert following["good", 0.5] > 0.6
    assert np.array_equal(taught["good", 1.0], taught["bad", 1.0])
    assert taught["good", 0.5].shape == (1, 60, 2)
    classes = editors.draw_tasks(3, pool, draw)
    assert refusal(lambda: pixeleditors.word_numbers(classes)).startswith("editors that learn cannot swap classes")


# -- the backbone ------------------------------------------------------------------------------------------------------


def test_the_backbone_answers_facts_on_unseen_items(some):
    reader = notebook.load_method("checkpoints/edit_judge")
    network, whole = reader.load_reader(), torch.ones(len(some))
    states = {
        share: reader.read(network, some.x, editors.blend(some, share * whole, 0 * whole, whole > 0), some.words)
        for share in (0, 1)
    }
    fits = {share: network.answers(x[:, 0])["match"].argmax(1).double().mean().item() for share, x in states.items()}
    assert fits[1] > 0.8
    assert fits[0] < 0.15
    assert states[1].shape == (90, 2, reader.WIDTH)
    clean = network.answers(states[1][:, 1])["blemish"].argmax(1)
    assert (clean == 0).double().mean() > 0.6


MUTATIONS = [
    ("functional.softplus(-delta)\n", "functional.softplus(delta)\n"),
    ("np.log(k) - delta", "-np.log(k) - delta"),
    ("weights / weights.sum()", "weights"),
    ("function(mean[..., None] + spread", "function(mean[..., None] - 2 * spread"),
    ("functional.softplus(-z), delta - margin", "functional.softplus(-z), delta + margin"),
    (".clamp(min=1e-12).log()", ".clamp(min=1e-12)"),
    ("log_sigma.mean(-1)) if", "log_sigma.exp().mean(-1).log()) if"),
    ("(2 * log_sigma).logsumexp(-1) / 2", "log_sigma.logsumexp(-1)"),
    ("scores[..., first, :] - scores[..., second, :]", "scores[..., second, :] - scores[..., first, :]"),
    ("[columns > 0, columns < 0]", "[columns >= 0, columns < 0]"),
    ("torch.tensor([0.0, 1, 1])", "torch.tensor([0.0, 1, 0])"),
    ("tied * (apart != 0).any(-1, keepdim=True)", "tied"),
    ("weights + heads * tied[..., None]", "weights + heads"),
    ("variance = (2 * width).exp()", "variance = width.exp()"),
    ("variance[..., first, :] + variance[..., second, :]", "variance[..., first, :]"),
    ("torch.stack([delta, -delta], -1)", "torch.stack([delta, delta], -1)"),
    ("weights.flatten(1).sum(1).clamp(min=1)", "len(weights)"),
    ("wanted - wanted.mean()", "wanted.mean() - wanted"),
    ("weights[own, picked]", "weights[own, picked.flip(1)]"),
    ("[(network, slower * rate)]", "[(network, rate)]"),
    ("else [(network, slower * rate)]", "else []"),
    ("(step + 1) / (0.05 * epochs", "(step + 1) / (0.5 * epochs"),
    ("network(*(x[picked].flatten(0, 2)", "network(*(x[picked.flip(1)].flatten(0, 2)"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught("test-time/editreward", old, new, tmp_path, monkeypatch)
