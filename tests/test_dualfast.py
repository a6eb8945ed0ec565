"""The method cells of diffusion/dualfast against formulas by hand, schedulers of diffusers and quadrature."""

import numpy as np
import pytest
import test_mutations
import torch
from scipy.integrate import quad

from workbook import graph, notebook
from workbook.diffusion import Counted, GaussianMixture, LinearVP, sample, time_grid
from workbook.plan import plan
from workbook.sampling import diffusers_method

LINEAR = LinearVP()
MIXTURE = GaussianMixture([[-1.0], [1.2]], [0.04, 0.09], [0.4, 0.6])
START = torch.linspace(-2, 2, 41, dtype=torch.float64)[:, None]
SIGMA_MIN = {"final_sigmas_type": "sigma_min"}
MEMBERS = {  # options of solver(), and the scheduler that it must equal
    "DDIM": ({}, ("DDIMScheduler", {})),
    "DDIM, noise form": ({"form": "noise"}, ("DDIMScheduler", {})),
    "DPM-Solver-2M": (
        {"order": 2, "form": "noise"},
        ("DPMSolverMultistepScheduler", SIGMA_MIN | {"algorithm_type": "dpmsolver"}),
    ),
    "DPM-Solver++(2M)": ({"order": 2}, ("DPMSolverMultistepScheduler", SIGMA_MIN)),
    "UniPC-1": ({"order": 1, "corrector": True}, ("UniPCMultistepScheduler", {"solver_order": 1})),
    "UniPC-2": ({"order": 2, "corrector": True}, ("UniPCMultistepScheduler", {})),
    "UniPC-3": ({"order": 3, "corrector": True}, ("UniPCMultistepScheduler", {"solver_order": 3})),
    "UniPC-3, noise form": (
        {"order": 3, "corrector": True, "form": "noise"},
        ("UniPCMultistepScheduler", {"solver_order": 3, "predict_x0": False}),
    ),
}


@pytest.fixture(scope="module")
def dualfast():
    return notebook.load_method("diffusion/dualfast")


def path(method, steps, *, model=None, power=2.0, schedule=LINEAR):
    """The states of a trajectory of the mixture, the start included."""
    states = [START]
    times = time_grid(schedule, steps, power=power)
    model = model or MIXTURE.eps(schedule)
    sample(model, START, schedule, method=method, times=times, callback=lambda i, t, x: states.append(x))
    return states


def apart(one, other):
    return max((a - b).abs().max().item() for a, b in zip(one, other, strict=True))


def pushed(older, strength):
    """The mixture's noise with the rule around it, for one trajectory; older: "first" or "prev"."""
    heard = []

    def model(x, t):
        heard.append(MIXTURE.eps(LINEAR)(x, t))
        reference = heard[0] if older == "first" else heard[max(len(heard) - 2, 0)]
        return heard[-1] + strength[len(heard) - 1] * (heard[-1] - reference)

    return model


def by_hand(name, steps, strength, older, power=2.0):
    """DPM-Solver-2M or DPM-Solver++(2M), below 15 steps, with the corrected noise in the first-order term alone."""
    times, x, eps, clean = time_grid(LINEAR, steps, power=power), START, [], []
    states = [x]
    for i in range(steps):
        (a, b), (s, z) = LINEAR.signal(times[i : i + 2]), LINEAR.noise(times[i : i + 2])
        step = np.log(b / z) - np.log(a / s)
        eps.append(MIXTURE.eps(LINEAR)(x, times[i]))
        clean.append((x - s * eps[i]) / a)
        reference = eps[0] if older == "first" else eps[max(i - 1, 0)]
        new = eps[i] + strength[i] * (eps[i] - reference)
        before = np.log(LINEAR.rho(times[i - 1]) / LINEAR.rho(times[i])) / step if i else 1.0
        bend = 0.0 < i < steps - 1
        if name == "noise":
            slope = (eps[i] - eps[i - 1]) / before if bend else 0.0
            x = b / a * x - z * (np.exp(step) - 1) * (new + slope / 2)
        else:
            slope = (clean[i] - clean[i - 1]) / before if bend else 0.0
            x = z / s * x - b * (np.exp(-step) - 1) * ((x - s * new) / a + slope / 2)
        states.append(x)
    return states


def test_strengths_rise_from_zero(dualfast):
    assert dualfast.strengths(0.6, 4) == pytest.approx([0, 0.2, 0.4, 0.6])
    assert dualfast.strengths(0.6, 4, "constant") == pytest.approx([0, 0.6, 0.6, 0.6])
    assert dualfast.strengths(0.6, 1) == pytest.approx([0])
    with pytest.raises(KeyError):
        dualfast.strengths(0.6, 4, "square")


def test_the_rule_pushes_away_from_the_noisier_estimate(dualfast):
    heard = [torch.tensor([v], dtype=torch.float64) for v in (1.0, 3.0, 4.0)]
    for older, expected in [("prev", [1.0, 3 + 0.5 * 2, 4 + 0.25 * 1]), ("first", [1.0, 3 + 0.5 * 2, 4 + 0.25 * 3])]:
        renew = dualfast.dual_noise([0.9, 0.5, 0.25], older)
        for _ in range(2):  # a second trajectory knows nothing of the first
            assert [renew(eps, i).item() for i, eps in enumerate(heard)] == pytest.approx(expected)
    with pytest.raises(ValueError, match="no step in memory"):
        dualfast.dual_noise([0.0], "next")


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("steps", [5, 14, 15, 20])
def test_without_the_rule_each_member_is_the_scheduler_of_its_name(dualfast, name, steps):
    options, (scheduler, theirs) = MEMBERS[name]
    assert apart(path(dualfast.solver(**options), steps), path(diffusers_method(scheduler, **theirs), steps)) < 5e-4


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("older", ["first", "prev"])
def test_everywhere_is_the_scheduler_fed_with_the_corrected_noise(dualfast, name, older):
    options, (scheduler, theirs) = MEMBERS[name]
    ours = dualfast.solver(**options, c_max=0.3, tau=older, where="all")
    wrapped = pushed(older, 0.3 * np.arange(9) / 8)
    assert apart(path(ours, 9), path(diffusers_method(scheduler, **theirs), 9, model=wrapped)) < 5e-4


@pytest.mark.parametrize("name", ["noise", "data"])
@pytest.mark.parametrize("older", ["first", "prev"])
@pytest.mark.parametrize("steps", [3, 8])
def test_the_rule_in_the_first_order_term_is_the_formula_by_hand(dualfast, name, older, steps):
    strength = 0.4 * np.arange(steps) / (steps - 1)
    ours = path(dualfast.solver(2, form=name, c_max=0.4, tau=older), steps)
    assert apart(ours, by_hand(name, steps, strength, older)) < 1e-10
    constant = path(dualfast.solver(2, form=name, c_max=0.4, tau=older, ramp="constant"), steps)
    assert apart(constant, by_hand(name, steps, 0.4 * (np.arange(steps) > 0), older)) < 1e-10


@pytest.mark.parametrize("older", ["first", "prev"])
def test_unipc_uses_the_same_corrected_noise_in_predictor_and_corrector(dualfast, older):
    """Two steps of UniPC-2, the last of order one: x_1 by DDIM, corrected, then x_2 with the corrected noise."""
    times = time_grid(LINEAR, 2)
    a, s = LINEAR.signal(times), LINEAR.noise(times)
    h, g = np.diff(np.log(a / s))
    eps = [MIXTURE.eps(LINEAR)(START, times[0])]
    clean = [(START - s[0] * eps[0]) / a[0]]
    x = s[1] / s[0] * START - a[1] * (np.exp(-h) - 1) * clean[0]
    eps.append(MIXTURE.eps(LINEAR)(x, times[1]))
    clean.append((x - s[1] * eps[1]) / a[1])
    new = (x - s[1] * (eps[1] + 0.4 * (eps[1] - eps[0]))) / a[1]
    x = s[1] / s[0] * START - a[1] * (np.exp(-h) - 1) * (clean[0] + (clean[1] - clean[0]) / 2)
    x = s[2] / s[1] * x - a[2] * (np.exp(-g) - 1) * new
    found = path(dualfast.solver(2, corrector=True, c_max=0.4, tau=older), 2)[-1]
    assert torch.allclose(found, x, atol=1e-12)


def test_half_of_the_previous_estimate_is_adams_bashforth(dualfast):
    deis = notebook.load_method("diffusion/deis")
    ours = path(dualfast.solver(c_max=0.5, tau="prev", ramp="constant"), 9)
    assert apart(ours, path(deis.ipndm(1), 9)) < 1e-9


@pytest.mark.parametrize("name", MEMBERS)
def test_the_first_step_is_plain_and_no_call_is_added(dualfast, name):
    options, _ = MEMBERS[name]
    counted = Counted(MIXTURE.eps(LINEAR))
    plain = path(dualfast.solver(**options), 6, model=counted)
    ours = path(dualfast.solver(**options, c_max=0.5, tau="first"), 6, model=counted)
    assert counted.calls == 12
    assert torch.equal(plain[1], ours[1])
    assert (plain[2] - ours[2]).abs().max() > 1e-3


@pytest.mark.parametrize("places", [[-1.3, -2.1], [-0.7, 1.0], [-0.5, -1.1, 1.0]])
@pytest.mark.parametrize("h", [-2.5, -0.01, 1.4])
def test_weights_of_the_differences_are_exact_for_polynomials(dualfast, places, h):
    mass = quad(lambda s: np.exp((1 - s) * h), 0, 1)[0]
    for power in range(1, len(places) + 1):
        mean = quad(lambda s, p=power: s**p * np.exp((1 - s) * h), 0, 1)[0] / mass
        found = np.dot(dualfast.difference_weights(places, h), np.array(places) ** (power - 1))
        assert found == pytest.approx(mean, rel=1e-9)


def test_one_difference_weighs_a_half(dualfast):
    assert dualfast.difference_weights([-0.8], 0.7) == [0.5]
    assert dualfast.difference_weights([], 0.7) == []


def test_the_parts_of_error_and_gain_add_up(dualfast):
    draw = torch.Generator().manual_seed(0)
    truth, limit, plain, better = torch.randn(4, 6, 2, 3, dtype=torch.float64, generator=draw)
    base, dual = (dualfast.split_error(end, limit, truth) for end in (plain, better))
    square = lambda error: error.square().mean((1, 2)).numpy()  # noqa: E731
    assert base.total.to_numpy() == pytest.approx(square(plain - truth))
    assert base.discretisation.to_numpy() == pytest.approx(square(plain - limit))
    assert base.approximation.to_numpy() == pytest.approx(square(limit - truth))
    assert (base.discretisation + base.approximation + 2 * base.meeting).to_numpy() == pytest.approx(
        base.total.to_numpy()
    )
    repairs = dualfast.split_gain(base, dual)
    assert repairs[0] == pytest.approx(square(plain - limit) - square(better - limit))
    assert sum(repairs) == pytest.approx(square(plain - truth) - square(better - truth))
    perfect = dualfast.split_gain(dualfast.split_error(plain, limit, limit), dualfast.split_error(better, limit, limit))
    assert perfect[1] == pytest.approx(0)


@pytest.mark.parametrize("width", [0.0, 0.3])
@pytest.mark.parametrize("t", [0.05, 0.6, 1.0])
def test_kernel_noise_is_the_noise_of_the_mixture(dualfast, width, t):
    centres = torch.randn(7, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = torch.randn(5, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    law = GaussianMixture(centres, [width**2] * 7, [1 / 7] * 7)
    expected = law.eps(LINEAR)(x.flatten(1), t).reshape(x.shape)
    assert torch.allclose(dualfast.kernel_noise(centres, width, LINEAR)(x, t), expected, atol=1e-10)


MUTATIONS = [
    ("(eps - older)  # away", "(older - eps)  # away"),
    ("memory[0] if i else eps", "memory[-1] if i > 1 else eps"),
    ('if i == 0 or tau == "prev"', 'if i == 0 or tau == "first"'),
    ("index / max(calls - 1, 1)", "index / max(calls, 1)"),
    ("np.expm1(sign * h)", "np.expm1(-sign * h)"),
    ("w / r * (o - m)", "w / r * (m - o)"),
    ('both = [new if where == "all" else eps, new]', 'both = [eps if where == "all" else new, new]'),
    ("last[:] = x, both[1]", "last[:] = x, both[0]"),
    ("np.exp((1 - s) * h)", "np.exp(s * h)"),
    ('"meeting": d * a', '"meeting": d * d'),
    ("alpha**2 / 2 * squares", "alpha / 2 * squares"),
    ("sigma / variance * (flat", "sigma * variance * (flat"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    deis = notebook.load_method("diffusion/deis")
    load = notebook.load_method
    monkeypatch.setattr(notebook, "load_method", lambda name: deis if name == "diffusion/deis" else load(name))
    test_mutations.test_changed_sign_is_caught("diffusion/dualfast", old, new, tmp_path, monkeypatch)


def test_a_changed_method_of_deis_makes_the_notebook_stale():
    assert "the method of diffusion/deis" in graph.ingredients(plan("diffusion/dualfast"))
    assert not any(name.startswith("the method of") for name in graph.ingredients(plan("diffusion/deis")))
