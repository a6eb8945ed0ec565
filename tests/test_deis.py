"""The method cells of diffusion/deis, and the diffusion library under them, against independent references."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.interpolate import lagrange
from scipy.linalg import sqrtm

from workbook import data, images, notebook
from workbook.diffusion import (
    Counted,
    DiscreteVP,
    GaussianMixture,
    LinearVP,
    eps_network,
    noise,
    sample,
    time_grid,
)
from workbook.sampling import Sampler, adaptive_method, compare, diffusers_method, rmse_ratio

LINEAR, LEVELS = LinearVP(), DiscreteVP.ddpm()
GAUSSIAN = GaussianMixture([[0.3]], [0.25])
PLACES = {"t": float, "rho": lambda t: float(LINEAR.rho(t)), "logrho": lambda t: float(np.log(LINEAR.rho(t)))}


@pytest.fixture(scope="module")
def deis():
    return notebook.load_method("diffusion/deis")


def integral(f, t, s):
    """psi(tau -> s) k(tau) f(tau) from t to s, written in t and integrated adaptively."""

    def integrand(tau):
        shrink = np.exp((LINEAR.log_alpha_bar(s) - LINEAR.log_alpha_bar(tau)) / 2)
        return -0.5 * shrink * LINEAR.slope(tau) / np.sqrt(1 - np.exp(LINEAR.log_alpha_bar(tau))) * f(tau)

    return quad(integrand, t, s, epsabs=1e-13, epsrel=1e-11, limit=200)[0]


def end(method, steps, *, model=None, **grid):
    """Where the trajectory of the Gaussian from 1.5 ends."""
    start = torch.tensor([[1.5]], dtype=torch.float64)
    times = time_grid(LINEAR, steps, **grid)
    return sample(model or GAUSSIAN.eps(LINEAR), start, LINEAR, method=method, times=times).item()


def exact_end():
    spread = [np.sqrt(0.25 * LINEAR.signal(t) ** 2 + LINEAR.noise(t) ** 2) for t in (LINEAR.end, 1.0)]
    return 0.3 * LINEAR.signal(LINEAR.end) + spread[0] / spread[1] * (1.5 - 0.3 * LINEAR.signal(1.0))


@pytest.mark.parametrize("variable", PLACES)
def test_coefficients_are_integrals_of_lagrange_polynomials(deis, variable):
    times, place = time_grid(LINEAR, 8), PLACES[variable]
    psi, table = deis.ab_coefficients(LINEAR, times, 3, variable=variable)
    assert psi == pytest.approx(np.sqrt(np.exp(np.diff(LINEAR.log_alpha_bar(times)))), rel=1e-12)
    for i in (0, 1, 2, 3, 7):
        nodes = np.array([place(t) for t in times[max(i - 3, 0) : i + 1]])[::-1]
        for j in range(len(nodes)):
            basis = lagrange(nodes / nodes[0], np.eye(len(nodes))[j])
            expected = integral(lambda tau, b=basis, n=nodes[0]: b(place(tau) / n), times[i], times[i + 1])
            assert table[i, j] == pytest.approx(expected, abs=1e-8)
    assert not table[0, 1:].any()  # nothing is known before the first call


@pytest.mark.parametrize("schedule", [LINEAR, LEVELS])
@pytest.mark.parametrize("kind", ["t", "log"])
def test_order_zero_is_ddim(deis, schedule, kind):
    times = time_grid(schedule, 10, kind=kind)
    psi, table = deis.ab_coefficients(schedule, times, 0)
    assert table[:, 0] == pytest.approx(schedule.noise(times[1:]) - psi * schedule.noise(times[:-1]), abs=1e-10)


@pytest.mark.parametrize("variable", ["t", "rho"])
@pytest.mark.parametrize("order", range(4))
def test_a_step_with_a_full_history_is_exact_on_polynomials(deis, variable, order):
    place = PLACES[variable]

    def polynomial(t):
        return 0.4 + (place(t) / place(0.6)) ** order

    def model(x, t):
        return torch.full_like(x, polynomial(t))

    times, path = time_grid(LINEAR, 7), [torch.tensor([[1.5]], dtype=torch.float64)]
    method = deis.adams_bashforth(order, variable)
    sample(model, path[0], LINEAR, method=method, times=times, callback=lambda i, t, x: path.append(x))
    for i, (t, s) in enumerate(pairwise(times)):
        shrink = float(LINEAR.signal(s) / LINEAR.signal(t))
        expected = shrink * path[i].item() + integral(polynomial, t, s)
        if i >= order:
            assert path[i + 1].item() == pytest.approx(expected, abs=1e-9, rel=1e-9)
        elif order:
            assert path[i + 1].item() != pytest.approx(expected, abs=1e-9, rel=1e-9)  # the warm-up is of lower order


@pytest.mark.parametrize(
    ("order", "errors"),
    list(
        enumerate(
            [(1.1e-1, 5.8e-2, 2.9e-2), (4.3e-2, 1.3e-2, 3.5e-3), (2.1e-2, 3.6e-3, 5.3e-4), (1.2e-2, 1.2e-3, 1.1e-4)]
        )
    ),
)
def test_errors_on_the_gaussian(deis, order, errors):
    assert exact_end() == pytest.approx(1.0491334, abs=1e-7)
    found = [abs(end(deis.adams_bashforth(order), steps) - exact_end()) for steps in (10, 20, 40)]
    assert found == pytest.approx(errors, rel=0.05)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("kutta", 3), ("rk4", 4)])
def test_runge_kutta_in_rho(deis, name, order):
    coarse, fine = (abs(end(deis.rho_rk(name), steps) - exact_end()) for steps in (80, 160))
    assert np.log2(coarse / fine) == pytest.approx(order, abs=0.12)
    calls = Counted(GAUSSIAN.eps(LINEAR))
    end(deis.rho_rk(name), 5, model=calls)
    assert calls.calls == 5 * order  # these four need as many stages as their order


def test_ipndm_is_rho_ab_on_equal_steps_in_rho(deis):
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = time_grid(LINEAR, 12, kind="rho", power=1)
    ends = [
        sample(GAUSSIAN.eps(LINEAR), start, LINEAR, method=method, times=times)
        for method in (deis.ipndm(3), deis.adams_bashforth(3, "rho"))
    ]
    assert torch.allclose(*ends, atol=1e-10)


def test_unknown_variable_is_refused(deis):
    with pytest.raises(KeyError):
        deis.ab_coefficients(LINEAR, time_grid(LINEAR, 3), 1, variable="lambda")


def test_adapters_take_the_grid_they_are_given(deis):
    start = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = time_grid(LINEAR, 9, power=1.5)
    pairs = {
        "DDIMScheduler": (deis.adams_bashforth(0), {}),
        "DEISMultistepScheduler": (deis.adams_bashforth(1, "logrho"), {"solver_order": 2, "lower_order_final": False}),
    }
    for name, (mine, options) in pairs.items():
        ends = [
            sample(GAUSSIAN.eps(LINEAR), start, LINEAR, method=method, times=times)
            for method in (mine, diffusers_method(name, **options))
        ]
        assert torch.allclose(*ends, atol=1e-4)
    for name in ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"):
        many = time_grid(LINEAR, 80)
        found = sample(GAUSSIAN.eps(LINEAR), start[-2:], LINEAR, method=diffusers_method(name), times=many)
        exact = sample(
            GAUSSIAN.eps(LINEAR), start[-2:], LINEAR, method=adaptive_method(1e-9, "DOP853"), times=many[[0, -1]]
        )
        assert torch.allclose(found, exact, atol=2e-3)


def test_pndm_left_to_its_defaults_starts_late_and_calls_once_more():
    from diffusers import PNDMScheduler

    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(10)
    assert scheduler.timesteps[0] == 900
    assert len(scheduler.timesteps) == 11


def test_discrete_schedule_passes_through_its_levels():
    betas = np.linspace(1e-4, 0.02, 1000)
    times = (np.arange(1000) + 1) / 1000
    assert np.exp(LEVELS.log_alpha_bar(times)) == pytest.approx(np.cumprod(1 - betas), rel=1e-10)
    assert LEVELS.level(times[17]) == pytest.approx(17)
    between = np.linspace(LEVELS.end, 1, 777)
    for schedule in (LINEAR, LEVELS):
        assert schedule.time_of_rho(schedule.rho(between)) == pytest.approx(between, abs=1e-10)
        numeric = np.gradient(schedule.log_alpha_bar(between), between, edge_order=2)
        assert schedule.slope(between) == pytest.approx(numeric, rel=1e-3, abs=1e-3)
    whole = LEVELS.whole(time_grid(LEVELS, 60, power=4))
    assert np.all(np.diff(whole) < 0)
    assert np.allclose(whole * 1000, np.rint(whole * 1000))


def test_grids_and_the_loop_refuse_nonsense():
    with pytest.raises(ValueError, match="at least one step"):
        time_grid(LINEAR, 0)
    with pytest.raises(ValueError, match="no time grid"):
        time_grid(LINEAR, 4, kind="sigma")
    with pytest.raises(ValueError, match="fall strictly"):
        sample(GAUSSIAN.eps(LINEAR), torch.zeros(1, 1), LINEAR, method=adaptive_method(0.1), times=np.array([0.1, 0.5]))
    with pytest.raises(ValueError, match="fall strictly"):
        DiscreteVP([0.1, 0.2, 0.3, 0.4])


def test_compare_counts_the_calls(deis):
    x = noise(4, [1, 2], shape=(1,)).double()
    samplers = {"heun": Sampler(deis.rho_rk("heun"), 2), "PNDM": Sampler(diffusers_method("PNDMScheduler"), extra=1)}
    table, ends = compare(GAUSSIAN.eps(LINEAR), x, LINEAR, samplers, [1, 7], torch.zeros_like(x), grid=time_grid)
    assert set(zip(table.sampler, table.budget, table.calls, strict=True)) == {("heun", 7, 6), ("PNDM", 7, 7)}
    assert len(table) == 2 * 8
    assert set(ends) == {("heun", 7), ("PNDM", 7)}
    assert rmse_ratio(table, ("heun", "heun")).value == 1


def test_eps_of_a_mixture_is_the_gradient_of_its_density():
    mixture = GaussianMixture(np.random.default_rng(0).normal(size=(3, 5)), [0.1, 0.2, 0.3], [0.5, 0.3, 0.2])
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (gradient,) = torch.autograd.grad(mixture.log_density(x, 0.3, LINEAR).sum(), x)
    assert torch.allclose(mixture.eps(LINEAR)(x.detach(), 0.3), -float(LINEAR.noise(0.3)) * gradient, atol=1e-12)


def test_frechet_distance_is_the_textbook_formula():
    random = np.random.default_rng(0)
    one, other = random.normal(size=(200, 6)) @ random.normal(size=(6, 6)), 1 + random.normal(size=(150, 6))
    first, second = np.cov(one.T), np.cov(other.T)
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(first + second - 2 * sqrtm(first @ second).real)
    assert images.frechet_distance(one, other) == pytest.approx(expected, rel=1e-9)
    assert images.frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(images.frechet_distance(one[:3], other))  # fewer pictures than features
    with pytest.raises(ValueError, match="two pictures"):
        images.frechet_distance(one[:1], other)
    with pytest.raises(ValueError, match="cannot be drawn"):
        images.real_floor(one, other, 201)


def test_psnr_of_a_known_error():
    reference = torch.zeros(2, 1, 4, 4)
    assert images.psnr(reference + 0.2, reference) == pytest.approx([20, 20])


def test_the_scale_of_pictures_that_the_text_names():
    pictures, _ = data.fashion_mnist_tensor("train")
    spread = np.sqrt(torch.linalg.eigvalsh(torch.cov(pictures[:10_000].flatten(1).double().T))[-1].item())
    assert spread == pytest.approx(8.9, abs=0.1)
    assert LINEAR.time_of_rho([1, 9]) == pytest.approx([0.26, 0.66], abs=0.01)


def test_a_velocity_network_gives_the_noise():
    class Network(torch.nn.Module):
        """Knows that the picture is 0.3 everywhere."""

        def forward(self, x, level):
            t = (float(level[0]) + 1) / 1000
            signal, share = float(LEVELS.signal(t)), float(LEVELS.noise(t))
            e = (x - signal * 0.3) / share
            return SimpleNamespace(sample=signal * e - share * 0.3)

    x, t = noise(2, [0]), 0.37
    e = (x - float(LEVELS.signal(t)) * 0.3) / float(LEVELS.noise(t))
    assert torch.allclose(eps_network(Network(), LEVELS, prediction="velocity")(x, t), e, atol=1e-5)
    with pytest.raises(ValueError, match="'noise' or 'velocity'"):
        eps_network(Network(), LEVELS, prediction="score")
