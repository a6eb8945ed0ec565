"""The method cells of diffusion/bottleneck-sampling against diffusers, Pillow, scipy and arithmetic by hand."""

from itertools import pairwise
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import test_mutations
import torch
from PIL import Image
from scipy.integrate import solve_ivp
from scipy.linalg import solve, sqrtm
from torch.linalg import eigh

from workbook import notebook

FLUX = [(32, 6, 1.0, 9.0), (16, 20, 0.8, 6.0), (32, 8, 0.6, 9.0)]  # side, N, w, s of the paper's Table 4
SMALL = [(8, 4, 1.0, 3.0), (4, 6, 0.7, 2.0), (8, 5, 0.5, 3.0)]


@pytest.fixture(scope="module")
def bottleneck_sampling():
    return notebook.load_method("diffusion/bottleneck-sampling")


def stages_of(module, rows):
    return [module.Stage(*row) for row in rows]


def noises_of(rows, count=3):
    draw = torch.Generator().manual_seed(5)
    return [torch.randn(count, 1, side, side, generator=draw) for side, *_ in rows]


def toy(x, sigma):
    """A velocity that is not linear and depends on the level."""
    return x - (1 - sigma) * torch.tanh(2 * x) + 0.3 * sigma


def theirs(stage):
    """A scheduler of diffusers for one stage, and how many steps its image-to-image pipelines skip."""
    _, steps, strength, shift = stage
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps).tolist())
    return scheduler, int(max(steps - min(steps * strength, steps), 0))


def levels_by_hand(stage):
    _, steps, strength, shift = stage
    left = [(steps - k) / steps for k in range(steps + 1)][int(steps - steps * strength) :]
    return [shift * level / (1 + (shift - 1) * level) for level in left]


def pillow(x, side, kind):
    """Every picture of a batch, resized by Pillow itself."""
    rows = [np.array(Image.fromarray(p.numpy()).resize((side, side), Image.Resampling[kind.upper()])) for p in x[:, 0]]
    return torch.from_numpy(np.stack(rows))[:, None]


def by_hand(rows, noises, kind, *, early=False):
    """Bottleneck Sampling with schedulers of diffusers and pictures of Pillow; also every state on the way."""
    clean, seen = None, []
    for number, (stage, fresh) in enumerate(zip(rows, noises, strict=True)):
        scheduler, skipped = theirs(stage)
        sigmas = scheduler.sigmas[skipped:].tolist()
        x = fresh
        if clean is not None:
            x = clean if clean.shape == fresh.shape else pillow(clean, stage[0], kind)
            x = (1 - sigmas[0]) * x + sigmas[0] * fresh
        if early and number + 1 < len(rows):
            start = levels_by_hand(rows[number + 1])[0]
            enough = [sigma for sigma in sigmas if sigma > start]
            sigmas = [*enough, sigmas[len(enough)], 0.0] if sigmas[len(enough)] else sigmas
        seen.append(x)
        for here, there in pairwise(sigmas):
            x = x + (there - here) * toy(x, here)
            seen.append(x)
        clean = x
    return clean, seen


@pytest.mark.parametrize("stage", [*FLUX, (16, 24, 0.8, 9.0), (32, 16, 0.7, 9.0), (16, 5, 0.1, 2.0), (16, 3, 1.0, 1.0)])
def test_levels_are_those_of_an_image_to_image_pipeline(bottleneck_sampling, stage):
    found = bottleneck_sampling.stage_levels(bottleneck_sampling.Stage(*stage))
    scheduler, skipped = theirs(stage)
    assert found == pytest.approx(scheduler.sigmas[skipped:].numpy(), abs=1e-6)
    assert found == pytest.approx(levels_by_hand(stage), abs=1e-12)


def test_skipped_steps_are_those_of_diffusers(bottleneck_sampling):
    pipeline = diffusers.StableDiffusion3Img2ImgPipeline
    for steps in range(1, 31):
        for strength in (0.05, 0.3, 0.6, 0.7, 0.8, 1.0):
            scheduler, _ = theirs((32, steps, strength, 3.0))
            _, left = pipeline.get_timesteps(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
            stage = bottleneck_sampling.Stage(32, steps, strength, 3.0)
            assert len(bottleneck_sampling.stage_levels(stage)) - 1 == left


@pytest.mark.parametrize("strength", [0.0, -0.5, 1.2, float("nan")])
def test_strengths_outside_of_their_range_are_refused(bottleneck_sampling, strength):
    with pytest.raises(ValueError, match="strength"):
        bottleneck_sampling.stage_levels(bottleneck_sampling.Stage(32, 8, strength))


@pytest.mark.parametrize("kind", ["nearest", "box", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize(("old", "new"), [(32, 16), (16, 32), (12, 8), (8, 8)])
def test_resizing_is_pillows(bottleneck_sampling, kind, old, new):
    x = torch.randn(4, 1, old, old, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(bottleneck_sampling.resize(x, new, kind), pillow(x, new, kind), atol=1e-5)
    matrix = bottleneck_sampling.resize_matrix(old, new, kind)
    assert matrix.shape == (new, old)
    assert matrix.sum(1).numpy() == pytest.approx(1, abs=1e-6)


def test_an_unknown_filter_is_refused(bottleneck_sampling):
    with pytest.raises(KeyError):
        bottleneck_sampling.resize(torch.zeros(1, 1, 8, 8), 4, "cubic")


def test_reintroduced_noise_has_the_variance_of_its_level(bottleneck_sampling):
    clean, fresh = torch.full((100, 1, 32, 32), 0.7), torch.randn(100, 1, 32, 32)
    x = bottleneck_sampling.renoise(clean, 0.6, fresh)
    assert torch.allclose(x - 0.6 * fresh, 0.4 * clean, atol=1e-6)
    assert (x - 0.4 * clean).square().mean().item() == pytest.approx(0.36, rel=0.02)


@pytest.mark.parametrize("rows", [FLUX, SMALL, SMALL[:1], SMALL[:2]])
@pytest.mark.parametrize("kind", ["lanczos", "nearest"])
@pytest.mark.parametrize("early", [False, True])
def test_the_method_is_schedulers_and_pillow_by_hand(bottleneck_sampling, rows, kind, early):
    noises, seen = noises_of(rows), []
    end = bottleneck_sampling.bottleneck(
        toy, noises, stages_of(bottleneck_sampling, rows), kind=kind, early=early,
        callback=lambda i, sigma, x: seen.append((i, sigma, x)),
    )  # fmt: skip
    expected, states = by_hand(rows, noises, kind, early=early)
    assert torch.allclose(end, expected, atol=2e-5)
    assert len(seen) == len(states)
    for (_, _, x), state in zip(seen, states, strict=True):
        assert torch.allclose(x, state, atol=2e-5)
    counts = [i for i, _, _ in seen]
    assert counts == sorted(counts)
    assert counts[-1] == len(states) - len(rows)
    assert seen[-1][1] == 0.0


def test_leaving_early_ends_in_what_the_network_takes_for_clean(bottleneck_sampling):
    noises, calls = noises_of(FLUX), []

    def model(x, sigma):
        calls.append((x.shape[-1], sigma))
        return toy(x, sigma)

    bottleneck_sampling.bottleneck(model, noises, stages_of(bottleneck_sampling, FLUX), early=True)
    assert [side for side, _ in calls] == [32] * 3 + [16] * 3 + [32] * 5
    levels = [sigma for _, sigma in calls]
    assert levels[1] > 0.96 >= levels[2]  # the last call of stage 1 is the first at or below the start of stage 2
    assert levels[4] > 0.9375 >= levels[5]


def test_only_a_stage_from_pure_noise_decides_alone(bottleneck_sampling):
    noises = noises_of(SMALL)
    last = bottleneck_sampling.Stage(8, 5, 1.0, 3.0)
    stages = [*stages_of(bottleneck_sampling, SMALL[:2]), last]
    alone = bottleneck_sampling.bottleneck(toy, noises[2:], [last])
    assert torch.equal(bottleneck_sampling.bottleneck(toy, noises, stages), alone)
    usual = bottleneck_sampling.bottleneck(toy, noises, stages_of(bottleneck_sampling, SMALL))
    other = bottleneck_sampling.bottleneck(toy, [-noises[0], *noises[1:]], stages_of(bottleneck_sampling, SMALL))
    assert (usual - other).abs().max() > 1e-4


def test_a_first_stage_without_a_picture_to_start_from_is_refused(bottleneck_sampling):
    with pytest.raises(ValueError, match="pure noise"):
        bottleneck_sampling.bottleneck(toy, noises_of(SMALL[1:]), stages_of(bottleneck_sampling, SMALL[1:]))


def test_one_trajectory_resizes_noisy_states_and_keeps_the_level(bottleneck_sampling):
    fresh, calls = noises_of(FLUX)[0], []

    def model(x, sigma):
        calls.append((x.shape[-1], sigma))
        return toy(x, sigma)

    end = bottleneck_sampling.one_trajectory(model, fresh, stages_of(bottleneck_sampling, FLUX), kind="bilinear")
    levels, x = levels_by_hand((32, 27, 1.0, 9.0)), fresh
    for i in range(27):
        x = pillow(x, 16, "bilinear") if i == 6 else pillow(x, 32, "bilinear") if i == 22 else x
        x = x + (levels[i + 1] - levels[i]) * toy(x, levels[i])
    assert torch.allclose(end, x, atol=2e-5)
    assert [side for side, _ in calls] == [32] * 6 + [16] * 16 + [32] * 5
    assert [sigma for _, sigma in calls] == pytest.approx(levels[:-1])


def test_cost_in_calls_of_the_last_size(bottleneck_sampling):
    stages = stages_of(bottleneck_sampling, FLUX)
    assert bottleneck_sampling.relative_cost(stages, {32: 50, 16: 10}) == pytest.approx(11 + 16 / 5)
    assert bottleneck_sampling.relative_cost(stages[:2], {32: 50, 16: 10}) == pytest.approx(6 * 5 + 16)


def covariance(size=16):
    """A covariance without any structure."""
    root = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return root @ root.T / size


@pytest.mark.parametrize("sigma", [0.2, 0.7, 1.0])
def test_gaussian_velocity_is_the_regression_of_noise_minus_picture(bottleneck_sampling, sigma):
    law, x = covariance().numpy(), np.random.default_rng(0).normal(size=(5, 16))
    state = (1 - sigma) ** 2 * law + sigma**2 * np.eye(16)
    expected = x @ solve(state, sigma * np.eye(16) - (1 - sigma) * law)
    found = bottleneck_sampling.gaussian_velocity(eigh(torch.from_numpy(law)))(
        torch.from_numpy(x).reshape(5, 1, 4, 4), sigma
    )
    assert found.flatten(1).numpy() == pytest.approx(expected)


@pytest.mark.parametrize("sigma", [0.4, 0.9])
def test_gaussian_end_is_where_the_flow_ends(bottleneck_sampling, sigma):
    law, start = covariance(), covariance().flip(0, 1) + torch.eye(16)
    model, root = bottleneck_sampling.gaussian_velocity(eigh(law)), torch.from_numpy(np.real(sqrtm(start.numpy())))
    found = solve_ivp(
        lambda s, flat: model(torch.from_numpy(flat).reshape(16, 1, 4, 4), s).numpy().ravel(),
        (sigma, 0), root.numpy().ravel(), rtol=1e-8, atol=1e-10,
    )  # fmt: skip
    end = found.y[:, -1].reshape(16, 16)
    expected = bottleneck_sampling.gaussian_end(eigh(law), start, sigma).numpy()
    assert end.T @ end == pytest.approx(expected, abs=1e-6)
    true = (1 - sigma) ** 2 * law + sigma**2 * torch.eye(16)
    assert torch.allclose(bottleneck_sampling.gaussian_end(eigh(law), true, sigma), law, atol=1e-9)


def enlargement(module, kind):
    """The matrix that enlarges flattened pictures of 4 × 4 pixels to 8 × 8."""
    return torch.kron(*[module.resize_matrix(4, 8, kind)] * 2)


def test_restart_enlarges_renoises_and_flows(bottleneck_sampling):
    law, half = covariance(64), covariance(16)
    draws = 40_000
    z = torch.randn(draws, 16 + 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    small = (z[:, :16] @ torch.linalg.cholesky(half).T).reshape(draws, 1, 4, 4)
    x = 0.4 * bottleneck_sampling.resize(small, 8, "bicubic").flatten(1) + 0.6 * z[:, 16:]
    expected = bottleneck_sampling.gaussian_end(eigh(law), torch.cov(x.T), 0.6)
    found = bottleneck_sampling.restart(eigh(law), half, enlargement(bottleneck_sampling, "bicubic"), 0.6)
    assert ((found - expected).norm() / found.norm()).item() < 0.06


def test_restart_keeps_or_remakes_as_the_formula_says(bottleneck_sampling):
    """A law that is a multiple of one: every frequency has the same variance."""
    law, half = 2.0 * torch.eye(64, dtype=torch.float64), 0.5 * torch.eye(16, dtype=torch.float64)
    enlarge = enlargement(bottleneck_sampling, "lanczos")
    for sigma in (0.3, 0.8):
        state = (1 - sigma) ** 2 * 0.5 * enlarge @ enlarge.T + sigma**2 * torch.eye(64)
        expected = 2 * state / ((1 - sigma) ** 2 * 2 + sigma**2)
        assert torch.allclose(bottleneck_sampling.restart(eigh(law), half, enlarge, sigma), expected)
    assert torch.allclose(bottleneck_sampling.restart(eigh(law), half, enlarge, 1.0), law)


def test_spectrum_finds_the_frequency_of_a_wave(bottleneck_sampling):
    place = torch.arange(8, dtype=torch.float64)
    for k in range(1, 4):
        wave = torch.cos(2 * torch.pi * k * place / 8).expand(8, 8).reshape(64, 1)
        found = bottleneck_sampling.spectrum(wave @ wave.T)
        assert found.argmax() == k
        assert found[[i for i in range(5) if i != k]].abs().max() < 1e-9
    white = bottleneck_sampling.spectrum(3 * torch.eye(64, dtype=torch.float64))
    assert white.numpy() == pytest.approx(3)


MUTATIONS = [
    ("stage.steps - stage.steps * stage.strength", "stage.steps * stage.strength"),
    ("flow.grid(stage.steps, stage.shift)", "flow.grid(stage.steps, 1 / stage.shift)"),
    ("matrix @ x @ matrix.T", "matrix @ x.mT @ matrix.T"),
    ("(1 - sigma) * clean + sigma * fresh", "(1 - sigma) * clean - sigma * fresh"),
    ("stage.side, kind), float(sigmas[0]), fresh)", "stage.side, kind), stage.strength, fresh)"),
    ("np.argmax(sigmas <= following[0])", "np.argmax(sigmas < 0.99 * following[0])"),
    ("[*levels[1:], [0.0]]", "[[0.0], *levels[1:]]"),
    ("done += len(sigmas) - 1", "done += len(sigmas)"),
    ("sigmas[done : done + count + 1]", "sigmas[done + 1 : done + count + 2]"),
    ("/ flops[stages[-1].side]", "/ flops[stages[0].side]"),
    ("(sigma - (1 - sigma) * values)", "(sigma + (1 - sigma) * values)"),
    ("carry @ start @ carry", "carry @ start"),
    ("enlarge @ half @ enlarge.T + sigma**2", "enlarge @ half @ enlarge.T + sigma"),
    ("dim=(2, 3)", "dim=(0, 1)"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught("diffusion/bottleneck-sampling", old, new, tmp_path, monkeypatch)
