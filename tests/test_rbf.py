"""Rollover budget forcing against a loop over one chain, its walks against Gaussians in closed form, and its peers."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import test_mutations
import torch

from workbook import diffusion, flow, notebook, particles

MEAN, SPREAD = 0.8, 0.3
TIMES = torch.linspace(0.02, 1, 40, dtype=torch.float64)
PATHS = ["straight", "preserving", "straightened"]


@pytest.fixture(scope="module")
def rbf():
    return notebook.load_method("test-time/rbf")


def normal(seed=0):
    return partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian(x, t, problem=None):
    """n - x_0 of N(MEAN, SPREAD) on the straight path, from its two conditional means."""
    t = t.to(x.dtype).reshape(-1, *[1] * (x.dim() - 1))
    off = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * SPREAD + t**2)
    return t * off - (MEAN + (1 - t) * SPREAD * off)


def first_pixel(picture, problem):
    return picture.flatten(1)[:, 0]


def searching(reward=first_pixel, problems=1, seed=0, velocity=gaussian, shape=(1,)):
    return particles.Search(velocity, reward, problems, normal(seed), shape=shape)


def refusal(call):
    """What a call says when it refuses its arguments, or nothing."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return ""


class Lottery:
    """A reward by chance, which keeps what it gave."""

    def __init__(self, seed=0, power=1.0):
        self.source, self.power, self.given = torch.Generator().manual_seed(seed), power, []

    def __call__(self, picture, problem):
        self.given.append(torch.rand(len(picture), generator=self.source, dtype=torch.float64) ** self.power)
        return self.given[-1]


def official_loop(start, draws, quota, steps):
    """What the official loop does with one chain: (draw, stage) of each move and the best reward of its last stage.

    Written with its own variables: a budget counter that starts at one, is reset to zero and always counts on, a
    budget that is full when the counter is a multiple of it, a step that never goes beyond steps - 2.
    """
    record, budget, counter, step, best, moves = start, quota, 1, 0, -1e9, []
    for number, reward in enumerate(draws):
        best, proceed = max(best, reward), step < steps - 2
        if record < reward:
            record = reward
            if proceed:
                moves.append((number, step, "roll"))
                budget, counter, step, best = budget - counter + quota, 0, step + 1, -1e9
        elif counter % budget == 0 and proceed:
            moves.append((number, step, "full"))
            budget, counter, step, best = quota, 0, step + 1, -1e9
        counter += 1
    return moves, best


# -- paths and walks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PATHS)
def test_slopes_are_the_derivatives_of_the_path(rbf, name):
    path, r, h = getattr(rbf, name), TIMES[:-1], 1e-6
    for value, slope in ((0, 2), (1, 3)):
        found = (path(r + h)[value] - path(r - h)[value]) / (2 * h)
        assert torch.allclose(found, path(r)[slope], rtol=1e-6, atol=1e-6)


def test_the_paths_are_what_they_are_called(rbf):
    signal, noise, *_ = rbf.preserving(TIMES)
    assert torch.allclose(signal**2 + noise**2, torch.ones_like(TIMES))
    assert signal[-1].log().item() == pytest.approx(-(0.1 + 19.9 / 2) / 2)  # -T/2 at r = 1, T = (19.9/2) + 0.1
    for name in ("straight", "straightened"):
        signal, noise, *_ = getattr(rbf, name)(TIMES)
        assert torch.allclose(signal + noise, torch.ones_like(TIMES))
    one, other = rbf.straightened(TIMES), rbf.preserving(TIMES)
    assert torch.allclose(one[0] / one[1], other[0] / other[1])  # the same signal-to-noise ratio at the same r


@pytest.mark.parametrize("name", PATHS)
def test_converted_velocity_mean_picture_and_noise_in_closed_form(rbf, name):
    path, x = getattr(rbf, name), normal()(len(TIMES), 2)
    a, s, rise, fall = (value[:, None] for value in path(TIMES))
    off = (x - a * MEAN) / (a**2 * SPREAD + s**2)
    picture, white = MEAN + a * SPREAD * off, s * off
    u = rbf.converted(gaussian, path, x, TIMES)
    assert torch.allclose(u, rise * picture + fall * white, atol=1e-10)
    clean, noise = rbf.split(path, x, u, TIMES)
    assert torch.allclose(clean, picture, atol=1e-10)
    assert torch.allclose(noise, white, atol=1e-10)


@pytest.mark.parametrize("name", ["preserving", "straightened"])
def test_conversion_is_the_general_formula_between_any_two_paths(rbf, name):
    """u(x, r) = (S'/S) x + (dt/dr) S u(x/S, t), with S = σ_r/σ_t and dt/dr from equal signal-to-noise ratios."""
    x, path = normal()(len(TIMES), 1), getattr(rbf, name)
    a, s, rise, fall = path(TIMES)
    t = 1 / (1 + a / s)
    a_t, s_t, rise_t, fall_t = rbf.straight(t)
    rate = s_t**2 * (s * rise - a * fall) / (s**2 * (s_t * rise_t - a_t * fall_t))
    size, growth = s / s_t, (s_t * fall - s * fall_t * rate) / s_t**2
    expected = (growth / size)[:, None] * x + (rate * size)[:, None] * gaussian(x / size[:, None], t)
    assert torch.allclose(rbf.converted(gaussian, path, x, TIMES), expected, atol=1e-10)


def test_one_conversion_is_one_network_call_at_the_same_ratio(rbf):
    asked = []

    def velocity(x, t):
        asked.append((x, t))
        return torch.zeros_like(x)

    x = normal()(len(TIMES), 1)
    rbf.converted(velocity, rbf.preserving, x, TIMES)
    a, s, *_ = rbf.preserving(TIMES)
    assert len(asked) == 1
    assert torch.allclose(asked[0][1], s / (a + s))
    assert torch.allclose(asked[0][0], x / (a + s)[:, None])


def test_grids(rbf):
    exp = [1, 0.995, 0.980, 0.954, 0.917, 0.866, 0.8, 0.714, 0.6, 0.436]
    assert rbf.walk("VP").times.tolist() == pytest.approx(exp, abs=6e-4)
    assert rbf.walk("linear", grid="even").times.tolist() == pytest.approx(np.arange(10, 0, -1) / 10)
    size, t = rbf.walk("VP").straight(-1)
    assert t == pytest.approx(0.709, abs=5e-4)
    assert size == pytest.approx(sum(v.item() for v in rbf.preserving(torch.tensor([0.19**0.5]))[:2]), rel=1e-4)


def test_a_step_by_hand(rbf):
    process, noise = rbf.walk("linear", 4, "even", norm=2.0), torch.tensor([[0.5]], dtype=torch.float64)
    x, u = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([[0.7]], dtype=torch.float64)
    stage = torch.tensor([1])  # r = 0.75, next 0.5: g = 2 · 0.75²
    white = 0.25 * 0.7 + 0.3  # α u - α' x, over α + σ = 1
    g = 2 * 0.75**2
    expected = 0.3 + (-0.7 - g**2 / 2 * white / 0.75) * 0.25 + g * 0.25**0.5 * 0.5
    assert process.step(x, u, stage, noise).item() == pytest.approx(expected)


def test_without_noise_every_walk_follows_the_ode(rbf):
    x, u = normal()(3, 2), normal(1)(3, 2)
    stage, noise = torch.tensor([0, 3, 7]), normal(2)(3, 2)
    for kind in rbf.KINDS:
        process = rbf.walk(kind, norm=0.0 if kind != "ODE" else 3.0)
        width = (process.times[stage] - process.times[stage + 1])[:, None]
        assert torch.allclose(process.step(x, u, stage, noise), x - u * width)


def test_the_control_is_vp_divided_by_its_size(rbf):
    """One tiny step from the same state, with the same noise: x / S of VP is the control's x, to first order."""
    fine = torch.tensor([0.7, 0.7 - 1e-7], dtype=torch.float64)
    vp, control = (replace(rbf.walk(kind), times=fine) for kind in ("VP", "linear, VP's noise"))
    x, noise, stage = normal()(6, 1), normal(1)(6, 1), torch.zeros(6, dtype=torch.int64)
    size = [vp.straight(i)[0] for i in (0, 1)]
    u, _ = vp.look(gaussian, x, fine[stage])
    v, _ = control.look(gaussian, x / size[0], fine[stage])
    one, other = vp.step(x, u, stage, noise) / size[1], control.step(x / size[0], v, stage, noise)
    assert (one - x / size[0]).abs().max() > 1e-4  # the noise moved it
    assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "VP", "linear, VP's noise"])
def test_noise_leaves_the_law_alone(rbf, kind):
    search, process = searching(), rbf.walk(kind, 100, "even", norm=2.0)
    end = particles.finish(search, process, particles.best_of_n(search, process, 100 * 4000), steps=20)
    assert end.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert end.var().item() == pytest.approx(SPREAD, abs=0.03)


def test_an_unknown_walk_is_refused(rbf):
    assert "kinds are ODE, linear, VP" in refusal(lambda: rbf.walk("vp"))
    assert "grids are exp and even" in refusal(lambda: rbf.walk("VP", grid="cosine"))


# -- rollover ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("budget", "starts", "chains", "power"), [(120, 6, 2, 1.0), (61, 2, 3, 0.2), (200, 1, 1, 8.0)])
def test_rollover_decides_as_the_official_loop(rbf, budget, starts, chains, power):
    lottery, seen, problems = Lottery(power=power), [], 20
    search = searching(lottery, problems)
    watch = lambda *event: seen.append(event)  # noqa: E731
    found = rbf.rollover(search, rbf.walk("VP"), budget, chains=chains, starts=starts, watch=watch)
    quota, kinds = (budget - chains * starts) // (10 * chains), {"roll": 0, "full": 0}
    first = lottery.given[0].view(problems, chains, starts).amax(2)
    for p, c in np.ndindex(problems, chains):
        expected = official_loop(first[p, c].item(), [new.reward[p, c].item() for _, new, *_ in seen], quota, 10)
        moves = [
            (i, stage[p, c].item(), "roll" if roll[p, c] else "full")
            for i, (stage, _, roll, full, _) in enumerate(seen)
            if roll[p, c] or full[p, c]
        ]
        assert (moves, found.reward[p, c].item()) == expected
        for *_, kind in moves:
            kinds[kind] += 1
    assert min(kinds.values()) > 0
    assert (search.used == budget - budget % chains).all()


def test_every_draw_starts_where_the_last_move_led(rbf):
    """The states that are walked on from: the accepted draw after a roll, the best of the stage after a full quota."""
    lottery, came, seen = Lottery(seed=2), [], []
    search, process = searching(lottery, 3), rbf.walk("VP")
    original = search.advance
    search.advance = lambda process, here, stage: came.append((here.x.clone(), stage)) or original(process, here, stage)
    rbf.rollover(search, process, 100, starts=2, watch=lambda *event: seen.append(event))
    rolled = spent = 0
    for p, c in np.ndindex(3, 2):
        inside = []
        for i, (_, new, roll, full, _) in enumerate(seen[:-1]):
            inside.append((new.reward[p, c].item(), new.x[p, c].item()))
            here, after = came[i][0][p, c].item(), came[i + 1][0][p, c].item()
            if roll[p, c]:
                assert after == inside[-1][1]
                rolled, inside = rolled + 1, []
            elif full[p, c]:
                assert after == max(inside)[1]
                spent, inside = spent + 1, []
            else:
                assert after == here
    assert rolled > 0
    assert spent > 0


def test_the_record_is_never_lowered(rbf):
    """A reward that only falls: nothing rolls over, every stage takes its quota, the last one the rest."""
    count = iter(range(10**6))
    search, seen = searching(lambda x, _: torch.tensor([-float(next(count)) for _ in x], dtype=torch.float64)), []
    rbf.rollover(search, rbf.walk("VP"), 100, starts=5, watch=lambda *event: seen.append(event))
    stages = torch.stack([event[0] for event in seen])[:, 0, 0]
    assert not any(event[2].any() for event in seen)
    assert torch.bincount(stages).tolist() == [4] * 8 + [13]  # quota (100 - 10) // 20 = 4, of 45 draws


def test_a_reward_that_only_rises_rolls_everything_over(rbf):
    count = iter(range(10**6))
    search, seen = searching(lambda x, _: torch.tensor([float(next(count)) for _ in x], dtype=torch.float64)), []
    rbf.rollover(search, rbf.walk("VP"), 100, starts=5, watch=lambda *event: seen.append(event))
    stages = torch.stack([event[0] for event in seen])[:, 0, 0]
    assert torch.bincount(stages).tolist() == [1] * 8 + [37]


def test_rolled_over_draws_are_added_to_the_quota(rbf):
    """One roll after the first of four draws, then nothing better: the next stage has 3 + 4 draws, later ones 4."""
    rewards = iter([0.0] + [1.0] + [-1.0] * 10**4)
    search, seen = searching(lambda x, _: torch.tensor([next(rewards) for _ in x], dtype=torch.float64)), []
    rbf.rollover(search, rbf.walk("VP"), 51, chains=1, starts=1, watch=lambda *event: seen.append(event))
    stages = torch.stack([event[0] for event in seen])[:, 0, 0]
    assert torch.bincount(stages).tolist() == [1, 9, 5, 5, 5, 5, 5, 5, 10]  # quota (51 - 1) // 10 = 5


def test_the_default_start_is_a_tenth_of_the_budget(rbf):
    lottery = Lottery()
    rbf.rollover(searching(lottery), rbf.walk("VP"), 500)
    assert len(lottery.given[0]) == 50
    assert len(lottery.given) == 1 + (500 - 50) // 2


def test_a_budget_that_leaves_no_draw_is_refused(rbf):
    asked = lambda budget: rbf.rollover(searching(), rbf.walk("VP"), budget, starts=25)  # noqa: E731
    assert refusal(lambda: asked(69)) == "budget = 69: 2 chains need at least 70 calls."
    assert refusal(lambda: asked(70)) == ""
    peer = lambda budget: particles.svdd(searching(), rbf.walk("VP"), budget, starts=25)  # noqa: E731
    assert refusal(lambda: peer(67)) == "budget = 67: 2 chains need at least 68 calls."


# -- the peers (workbook.particles) ------------------------------------------------------------------------------------


def test_the_network_is_counted_where_it_is_called(rbf):
    asked = []

    def velocity(x, t, problem):
        asked.append(problem)
        return gaussian(x, t)

    for method, expected in [
        (particles.best_of_n, 100),
        (particles.svdd, 100),
        (partial(particles.svdd, block=3), 100),
        (particles.smc, 100),
        (partial(particles.search_over_paths, looks=10), 100),
        (rbf.rollover, 100),
    ]:
        asked.clear()
        search = searching(problems=3, velocity=velocity)
        kind = "ODE" if getattr(method, "func", None) is particles.search_over_paths else "VP"
        method(search, rbf.walk(kind), 100)
        assert torch.bincount(torch.cat(asked)).tolist() == search.used.tolist() == [expected] * 3


def test_best_of_n_on_the_ode_is_the_euler_sampler_of_diffusers(rbf):
    z, process = normal()(20, 1), rbf.walk("ODE", 10, "even")
    search = particles.Search(gaussian, first_pixel, 20, lambda *shape: z.view(shape), shape=(1,))
    here = particles.best_of_n(search, process, 10)
    model, times = lambda x, t: gaussian(x, torch.full((len(x),), t)), [*process.times.tolist(), 0.0]
    plain = diffusion.sample(model, z, flow.PATH, method=flow.diffusers_flow(), times=times)
    assert torch.allclose(here.clean.view(20, 1), plain, atol=1e-6)


def test_finishing_is_euler_to_zero(rbf):
    """From VP's last look: the same as Euler on the straight path from there."""
    search, process = searching(problems=4), rbf.walk("VP")
    here = search.look(process, search.noise(2), 9)
    size, t = process.straight(-1)
    x = here.x / size
    for start in np.linspace(t, 0, 6)[:-1]:
        x = x - t / 5 * gaussian(x.flatten(0, 1), torch.full((8,), start)).view_as(x)
    assert torch.allclose(particles.finish(search, process, here, steps=5), x)


def test_more_calls_never_hurt_best_of_n_on_the_ode(rbf):
    """The noises of a small budget are the first of those of a large one."""
    process, found = rbf.walk("ODE"), []
    for budget in (20, 50, 200):
        search = searching(lambda x, _: -(x.flatten(1)[:, 0] - 1).abs(), problems=4, shape=(16,))
        found.append(particles.best_of_n(search, process, budget).best().reward[:, 0])
    assert (found[0] <= found[1]).all()
    assert (found[1] <= found[2]).all()
    assert (found[0] < found[2]).any()


def test_svdd_on_the_ode_has_nothing_to_choose_from(rbf):
    narrow, wide = (
        particles.svdd(searching(problems=5), rbf.walk("ODE"), budget, starts=4) for budget in (8 + 18, 8 + 18 * 7)
    )
    assert torch.equal(narrow.reward, wide.reward)
    assert (
        particles.svdd(searching(problems=5), rbf.walk("linear"), 8 + 18 * 7, starts=4).reward.mean()
        > narrow.reward.mean()
    )


def test_code_chooses_every_block_only(rbf):
    search, asked = searching(problems=2), []
    original = search.advance
    search.advance = lambda process, here, stage: asked.append(here.x.clone()) or original(process, here, stage)
    particles.svdd(search, rbf.walk("VP"), 8 + 2 * 9 * 5, starts=4, block=3)
    distinct = [len(torch.unique(x[0, :5])) for x in asked]  # of the five candidates of one chain
    assert distinct == [1, 5, 5] * 3


def test_smc_reaches_the_tilted_law(rbf):
    """For Gaussian data the reward of the mean picture is the exact value function: the mean moves by SPREAD/λ."""
    for threshold in (0.5, 1.0):
        cloud, weight = particles.smc(
            searching(seed=4), rbf.walk("linear", 150, "even"), 150 * 4000, temperature=0.5, threshold=threshold
        )
        mean = (weight.softmax(1) * cloud.clean[..., 0]).sum().item()
        assert mean == pytest.approx(MEAN + SPREAD / 0.5, abs=0.08)


def test_smc_resamples_in_proportion(rbf):
    """Rewards 0 and log 3 at temperature 1: of four particles with shares 1/8, 3/8, 1/8, 3/8 none is lost twice."""
    looks = iter([torch.tensor([0, np.log(3), 0, np.log(3)]), torch.zeros(4)])
    search = searching(lambda x, _: next(looks).double())
    process, picked = rbf.walk("ODE", 2, "even"), []
    original = search.advance
    search.advance = lambda process, here, stage: picked.append(here.x.flatten()) or original(process, here, stage)
    _, weight = particles.smc(search, process, 8, temperature=1.0)
    ancestors = (picked[0][:, None] == normal()(1, 4, 1).flatten()).int().argmax(1)
    counts = torch.bincount(ancestors, minlength=4).tolist()
    for count, share in zip(counts, [1 / 8, 3 / 8, 1 / 8, 3 / 8], strict=True):
        assert np.floor(4 * share) <= count <= np.ceil(4 * share)  # what systematic resampling promises
    assert torch.allclose(weight[0], -torch.tensor([0, np.log(3), 0, np.log(3)])[ancestors])  # gain: 0 - before


def test_search_over_paths_keeps_the_law_and_climbs(rbf):
    neutral = searching(lambda x, _: torch.zeros(len(x), dtype=torch.float64), problems=3000)
    here, process = particles.search_over_paths(neutral, rbf.walk("ODE"), 220, looks=20)
    end = particles.finish(neutral, process, here)
    assert end.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert end.var().item() == pytest.approx(SPREAD, abs=0.05)
    eager = searching(problems=300)
    here, process = particles.search_over_paths(eager, rbf.walk("ODE"), 840, looks=20)
    assert particles.finish(eager, process, here).mean() > end.mean() + SPREAD**0.5
    short = refusal(lambda: particles.search_over_paths(eager, rbf.walk("ODE"), 199, looks=20))
    assert short == "budget = 199: 2 chains need at least 200 calls."


def test_best_takes_the_best_of_each_group():
    reward = torch.tensor([[1.0, 5, 2, 0, 3, 4], [9, 1, 1, 1, 1, 8]])
    states = particles.States(*(torch.arange(12.0).view(2, 6, 1).clone() for _ in "xuc"), reward)
    assert states.best(2).x[..., 0].tolist() == [[1, 5], [6, 11]]
    assert states.best().reward.tolist() == [[5], [9]]
    mask = torch.tensor([[True, False], [False, True]])
    mixed = states.best(2).replaced(mask, states.pick(torch.zeros(2, 2, dtype=torch.int64)))
    assert mixed.reward.tolist() == [[1, 4], [9, 9]]


def test_rare_targets_are_rare_on_both_sides():
    rng = np.random.default_rng(0)
    values, labels, classes = rng.normal(size=200_000), rng.integers(2, size=200_000), np.arange(40) % 2
    found = particles.rare(values, labels, classes, [0, 1])
    share = np.array([min((values[labels == c] <= v).mean(), (values[labels == c] >= v).mean())
                      for c, v in zip(classes, found, strict=True)])  # fmt: skip
    assert share.min() > 0.8e-3
    assert share.max() < 1.1e-2
    assert (found > 0).sum() == 20
    assert not np.allclose(found, particles.rare(values, labels, classes, [0, 2]))


def test_ink_and_tone():
    x = torch.full((1, 1, 4, 4), -1.0)
    x[:, :, 0] = 1
    assert particles.ink(x).item() == pytest.approx(25)
    assert particles.tone(x).item() == pytest.approx(50)


def test_noises_of_a_problem_are_averaged_before_the_interval():
    import pandas as pd

    table = pd.DataFrame({"arm": "a", "problem": [0, 1, 0, 1], "reward": [0.0, 10, 2, 12]})
    row = particles.summarise(table, ["arm"], ["reward"]).iloc[0]
    assert (row.value, row.low, row.high) == (6, 1, 11)


def test_the_trace_tells_draws_and_moves(rbf):
    trace, lottery = particles.Trace(), Lottery(seed=1)
    rbf.rollover(searching(lottery, 4), rbf.walk("VP"), 100, starts=2, watch=trace)
    usage, (chain, faces) = trace.usage(), trace.chain(1)
    assert usage.draws.sum() == pytest.approx(48)
    assert usage.rolled.iloc[-1] == 0
    moves = chain[chain.move != ""]
    assert moves.stage.tolist() == list(range(9))
    assert moves.move.iloc[-1] == "answer"
    assert set(moves.move[:-1]) == {"rolls over", "quota spent"}
    assert (chain.record.diff().dropna() >= 0).all()
    assert len(faces) == 9


def test_the_network_is_asked_in_parts_with_each_ones_label():
    class Network(torch.nn.Module):
        def forward(self, x, t, labels):
            return x * 0 + t[:, None, None, None] + 10 * labels[:, None, None, None]

    labels, problem = torch.tensor([3, 7]), torch.arange(2).repeat_interleave(20)
    t = torch.linspace(0, 1, 40, dtype=torch.float64)
    found = particles.labelled(Network(), labels)(torch.zeros(40, 1, 32, 32), t, problem)
    assert torch.allclose(found[:, 0, 0, 0], t.float() + 10 * labels[problem])
    assert found.dtype == torch.float32


def test_the_heldout_judge_is_another_network_and_right_more_than_nine_times_in_ten():
    from workbook import checkpoints, data

    judge = notebook.load_method("checkpoints/clf_heldout").load_heldout()
    pictures, labels = data.fashion_mnist_tensor("test")
    with torch.inference_mode():
        right = (judge(pictures[:500]).argmax(1) == labels[:500]).double().mean().item()
    assert right > 0.87  # 500 pictures; the header says what all 10,000 gave
    assert float(checkpoints.provenance("clf_heldout")["test_accuracy"]) >= 0.91


MUTATIONS = [
    ("slope * signal**2 / noise", "slope * signal / noise"),
    ("r**2 * (high - low) / 2) / 2", "r**2 * (high - low)) / 2"),
    ("(fall - noise / size * growth)", "(fall + noise / size * growth)"),
    ("(signal * fall - noise * rise) / size**2", "(signal * fall - noise * rise) / size"),
    ("(rise + fall) / size * x", "(rise - fall) / size * x"),
    ("(fall * x - noise * u) / below", "(fall * x + noise * u) / below"),
    ("(signal * u - rise * x) / below", "(rise * x - signal * u) / below"),
    ("score = -split(", "score = split("),
    ("-u + g**2 / 2 * score", "-u + g**2 * score"),
    ("g * width.sqrt() * noise", "g * width * noise"),
    ("(1 - share**2).sqrt()", "(1 - share).sqrt()"),
    ("square(r) / sum(preserving(r)[:2])", "square(r)"),
    ("noise / (signal + noise)", "signal / (signal + noise)"),
    ("quota = (budget - chains * starts) //", "quota = budget //"),
    ("stage < last - 1", "stage < last"),
    ("record = torch.maximum(record, new.reward)", "record = new.reward"),
    ("allowance - count + quota", "allowance + quota"),
    ("torch.where(full, quota, allowance)", "allowance"),
    ("here.replaced(roll, new).replaced(full, found)", "here.replaced(roll | full, new)"),
    ("torch.where(roll | full, 0, count) + 1", "torch.where(roll | full, 1, count) + 1"),
    ("torch.where(roll | full, -torch.inf, found.reward)", "found.reward"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught("test-time/rbf", old, new, tmp_path, monkeypatch)
