"""The method cells of diffusion/easycache against loops by hand, closed forms, diffusers' Wan and its samplers."""

from functools import cache
from itertools import pairwise

import numpy as np
import pytest
import test_mutations
import torch
from diffusers import hooks
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastHook

from workbook import flow, notebook
from workbook.diffusion import Counted, sample
from workbook.models.video import VideoDiT

GRID = flow.grid(20, 3.0)


@pytest.fixture(scope="module")
def easycache():
    return notebook.load_method("diffusion/easycache")


def start(seed=0, size=40):
    return torch.randn(1, size, generator=torch.Generator().manual_seed(seed)).double()


def branches(x, sigma):
    """Two velocities that are not linear, not equal and depend on the level."""
    untold = x - (1 - sigma) * torch.tanh(2 * x)
    return torch.cat([untold, untold + 0.3 * torch.sin(3 * x + sigma)])


def run(model, x, sigmas=GRID, callback=None):
    """Euler's rule, by hand."""
    for here, there in pairwise(sigmas):
        x = x + (there - here) * model(x, here)
        if callback:
            callback(x)
    return x


def by_hand(network, x, sigmas, tau, warmup, weight=None, keep="change"):
    """EasyCache as the paper's code goes: a loop over steps in numpy. Returns the end, the steps computed and k."""
    steps, error, k, last, previous = len(sigmas) - 1, 0.0, None, None, None
    x, computed, rates = x.numpy()[0], [], {}
    for t in range(steps):
        if t < warmup or t >= steps - 1:
            compute, error = True, 0.0
        elif last is not None and k is not None:
            error += k * np.mean(np.abs(x - previous)) / np.mean(np.abs(last["out"][-1]))
            compute = not error < tau
            if compute:
                error = 0.0
        else:
            compute = True
        previous = x
        if compute:
            out = network(torch.from_numpy(x)[None], sigmas[t]).numpy()
            if last is not None:
                k = np.mean(np.abs(out[-1] - last["out"][-1])) / np.mean(np.abs(x - last["in"]))
                rates[t] = k
            last = {"in": x, "out": out, "delta": out - x}
            computed.append(t)
        else:
            out = x + last["delta"] if keep == "change" else last["out"]
        v = out[0] if weight is None else out[0] + weight * (out[1] - out[0])
        x = x + (sigmas[t + 1] - sigmas[t]) * v
    return x, computed, rates


@pytest.mark.parametrize("warmup", [0, 1, 2, 5])
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.1, 0.3, 1.0, float("inf")])
@pytest.mark.parametrize("keep", ["change", "velocity"])
@pytest.mark.parametrize("weight", [None, 3.0])
def test_the_method_is_the_papers_loop_by_hand(easycache, warmup, tau, keep, weight):
    network = branches if weight else lambda x, sigma: branches(x, sigma)[1:]
    cache = easycache.EasyCache(network, 20, threshold=tau, warmup=warmup, keep=keep)
    end = run(easycache.guide(cache, weight) if weight else cache, start())
    expected, computed, rates = by_hand(network, start(), GRID, tau, warmup, weight, keep)
    assert cache.computed == computed
    assert cache.rates == pytest.approx(rates)
    assert end[0].numpy() == pytest.approx(expected, abs=1e-12)


def test_the_rule_skips_some_and_computes_some(easycache):
    cache = easycache.EasyCache(branches, 20, threshold=0.1, warmup=2)
    run(easycache.guide(cache, 3.0), start())
    assert 5 < len(cache.computed) < 15
    assert np.ptp(np.diff(cache.computed)) > 1  # not at equal distances


def test_threshold_0_changes_no_bit(easycache):
    plain = run(easycache.guide(branches, 3.0), start())
    cache = easycache.EasyCache(branches, 20, threshold=0, warmup=0)
    assert torch.equal(run(easycache.guide(cache, 3.0), start()), plain)
    assert cache.computed == list(range(20))


@pytest.mark.parametrize(("warmup", "calls"), [(0, 3), (1, 3), (2, 3), (3, 4), (5, 6), (19, 20), (40, 20)])
def test_an_infinite_threshold_leaves_the_warmup_two_calls_for_k_and_the_last_step(easycache, warmup, calls):
    counted = Counted(branches)
    cache = easycache.EasyCache(counted, 20, threshold=float("inf"), warmup=warmup)
    run(easycache.guide(cache, 3.0), start())
    assert counted.calls == len(cache.computed) == calls
    assert cache.computed[-1] == 19


def test_what_nothing_moves_is_computed(easycache):
    cache = easycache.EasyCache(lambda x, sigma: 0 * x, 20, threshold=1.0, warmup=0)
    assert torch.equal(run(cache, start()), start())
    assert cache.computed == list(range(20))  # k is no number


def test_wrong_settings_are_refused_in_one_line(easycache):
    for settings in ({"threshold": -0.1}, {"threshold": float("nan")}, {"threshold": 0.1, "warmup": -1}):
        with pytest.raises(ValueError, match="neither may be negative"):
            easycache.EasyCache(branches, 20, **settings)
    with pytest.raises(ValueError, match="'change' or 'velocity'"):
        easycache.EasyCache(branches, 20, threshold=0.1, keep="delta")
    with pytest.raises(ValueError, match="step 0"):
        easycache.Cache(branches, [1, 2])


def test_a_cache_is_good_for_one_film(easycache):
    cache = easycache.EasyCache(branches, 20, threshold=0.1)
    run(easycache.guide(cache, 3.0), start())
    with pytest.raises(RuntimeError, match="new one for each film"):
        cache(start(), 1.0)


def test_guidance_is_the_weighted_sum_of_the_branches(easycache):
    untold, told = branches(start(), 0.4)
    found = easycache.guide(branches, 3.0)(start(), 0.4)
    assert torch.allclose(found, untold + 3 * (told - untold))
    assert found.shape == start().shape


TABLES = [[0, 1, 2, 6, 11, 19], [0, 7], [0, 1, 2, 3, 19]]


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_a_reused_change_is_one_short_leap(easycache, table, weight):
    cache = easycache.Cache(branches, table)
    end = run(easycache.guide(cache, weight), start())
    assert cache.computed == table
    x = start()
    for begin, stop in pairwise([*table, 20]):
        x = x + easycache.leap(GRID, begin, stop) * easycache.guide(branches, weight)(x, GRID[begin])
        product = 1.0
        for step in range(begin, stop):
            product *= 1 + GRID[step + 1] - GRID[step]
        assert easycache.leap(GRID, begin, stop) == pytest.approx(product - 1, abs=1e-15)
        assert 0 > easycache.leap(GRID, begin, stop) >= GRID[stop] - GRID[begin] - 1e-15
    assert torch.allclose(x, end, atol=1e-12)


@pytest.mark.parametrize("table", TABLES)
def test_a_reused_velocity_is_euler_on_the_coarser_grid(easycache, table):
    end = run(easycache.guide(easycache.Cache(branches, table, keep="velocity"), 3.0), start())
    assert torch.allclose(run(easycache.guide(branches, 3.0), start(), GRID[[*table, 20]]), end, atol=1e-12)


@pytest.mark.parametrize("tau", [0.03, 0.1, 0.3])
@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_the_next_call_is_foreseen_from_k_and_the_grid(easycache, tau, weight):
    states, cache = [start()], easycache.EasyCache(branches, 20, threshold=tau, warmup=3)
    model = easycache.guide(cache, weight)
    run(model, start(), callback=states.append)
    foreseen = [0, 1, 2]
    while foreseen[-1] < 19:
        step = foreseen[-1]
        velocity = branches(states[step], GRID[step])
        guided = easycache.guide(branches, weight)(states[step], GRID[step])
        rate = cache.rates[step] * float(easycache.size(guided) / easycache.size(velocity[-1:]))
        foreseen.append(easycache.next_call(rate, GRID, step, tau))
    assert foreseen == cache.computed


@pytest.mark.parametrize(("steps", "warmup", "calls"), [(50, 5, 20), (50, 5, 50), (20, 5, 4), (20, 0, 7), (10, 2, 3)])
def test_even_tables_have_the_calls_asked_for(easycache, steps, warmup, calls):
    table = easycache.evenly(steps, warmup, calls)
    assert len(set(table.tolist())) == len(table) == calls
    assert (table[0], table[-1]) == (0, steps - 1)
    gaps = np.diff(table[min(warmup, calls - 2) :])
    assert len(gaps) == 0 or np.ptp(gaps) <= 1
    assert table[: min(warmup, calls - 2)].tolist() == list(range(min(warmup, calls - 2)))


SPECTRUM = torch.tensor([0.01, 0.3, 1.0, 7.0, 20.0], dtype=torch.float64)


@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.1])
def test_gaussian_velocity_is_the_slope_of_the_exact_flow(easycache, sigma):
    spread = lambda s: ((1 - s) ** 2 * SPECTRUM + s**2).sqrt()  # noqa: E731  the flow carries x along spread(sigma)
    slope = (spread(sigma + 1e-6) - spread(sigma - 1e-6)) / 2e-6
    found = easycache.gaussian_velocity(SPECTRUM)(spread(sigma)[None], sigma)
    assert found[0].numpy() == pytest.approx(slope.numpy(), abs=1e-6)


@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.1])
def test_gaussian_rate_is_k_of_a_small_step(easycache, sigma):
    draws = torch.randn(4000, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    states = [draws * ((1 - s) ** 2 * SPECTRUM + s**2).sqrt() for s in (sigma, sigma - 1e-4)]
    network = easycache.gaussian_velocity(SPECTRUM)
    outs = [network(x, s) for x, s in zip(states, (sigma, sigma - 1e-4), strict=True)]
    k = (outs[1] - outs[0]).abs().mean() / (states[1] - states[0]).abs().mean()
    assert easycache.gaussian_rate(SPECTRUM, sigma).item() == pytest.approx(k.item(), rel=0.03)


@cache
def small_wan():
    """Untrained, with three blocks."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VideoDiT(layers=3, heads=2, head_width=12, text=16).eval().requires_grad_(False)


def film(network, blocks=None, steps=8):
    """A short run of a small Wan with other blocks in place of its own."""
    own = network.transformer.blocks
    x = torch.randn(1, 1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    if blocks is not None:
        network.transformer.blocks = torch.nn.ModuleList([blocks])
    try:
        with torch.no_grad():
            return sample(lambda x, sigma: network(x, sigma), x, flow.PATH, method=flow.euler, times=flow.grid(steps))
    finally:
        network.transformer.blocks = own


def test_teacache_watches_what_the_first_attention_sees(easycache):
    wan, seen, own, outs = small_wan(), [], [], []
    blocks = easycache.TeaBlocks(wan.transformer.blocks, 8, threshold=0.0)
    watch = wan.transformer.blocks[0].attn1.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    last = wan.transformer.blocks[-1].register_forward_hook(lambda m, args, out: outs.append(out))
    note = blocks.register_forward_hook(lambda m, args, out: own.append(m.signal))
    end = film(wan, blocks)
    for hook in (watch, note, last):
        hook.remove()
    assert len(seen) == len(own) == 8
    assert all(torch.equal(a, b) for a, b in zip(seen, own, strict=True))
    change = lambda parts: [float((b - a).abs().mean() / a.abs().mean()) for a, b in pairwise(parts)]  # noqa: E731
    assert pytest.approx(np.array([change(seen), change(outs)]), rel=1e-5) == np.array(blocks.pairs).T
    assert torch.equal(film(wan), end)  # threshold 0 changes no bit


def test_teacache_skips_by_the_polynomial_of_its_signal(easycache):
    wan = small_wan()
    full = easycache.TeaBlocks(wan.transformer.blocks, 8, threshold=0.0)
    film(wan, full)
    polynomial, seen, ran = (0.5, 2.0, 0.001), [], []
    tau = 1.5 * np.polyval(polynomial, full.pairs[0][0])
    some = easycache.TeaBlocks(wan.transformer.blocks, 8, threshold=tau, polynomial=polynomial)
    watches = [
        some.register_forward_hook(lambda m, args, out: seen.append((m.signal, out - args[0]))),
        wan.transformer.blocks[0].register_forward_hook(lambda m, args, out: ran.append(len(seen))),
    ]
    film(wan, some)
    for hook in watches:
        hook.remove()
    error, expected = 0.0, [0]
    for step in range(1, 8):
        before, now = seen[step - 1][0], seen[step][0]
        rise = float((now - before).abs().mean() / before.abs().mean())
        error += 0.5 * rise**2 + 2.0 * rise + 0.001
        if step == 7 or error >= tau:
            expected.append(step)
            error = 0.0
        else:
            assert torch.allclose(seen[step][1], seen[expected[-1]][1], atol=1e-5)
    assert ran == expected
    assert 2 < len(ran) < 8


def test_what_diffusers_helpers_hook_on_wan():
    """Why the notebook gives TaylorSeer patterns, leaves the text cache out, and asks both halves in one call."""
    wan = small_wan().transformer

    def of(config):
        wan.enable_cache(config)
        hooked = [n for n, m in wan.named_modules() if n and hasattr(m, "_diffusers_hook") and m._diffusers_hook.hooks]
        wan.disable_cache()
        return hooked

    assert of(hooks.TaylorSeerCacheConfig()) == []
    assert of(hooks.TextKVCacheConfig()) == []
    assert "proj_out" in of(hooks.TaylorSeerCacheConfig(use_lite_mode=True))
    assert of(hooks.FirstBlockCacheConfig()) == ["blocks.0", "blocks.1", "blocks.2"]
    level = {"current_timestep_callback": lambda: 500}
    attention = of(hooks.PyramidAttentionBroadcastConfig(spatial_attention_block_skip_range=2, **level))
    assert attention == [f"blocks.{i}.attn1" for i in range(3)]
    hook = PyramidAttentionBroadcastHook((0, 1000), 2, lambda: 500)  # remembers steps, but not whose: one call for both
    assert not any(isinstance(part, StateManager) for part in vars(hook).values())


MUTATIONS = [
    ("self.rate = size(v[-1:] - self.v[-1:])", "self.rate = size(v[:1] - self.v[:1])"),
    ("/ size(x - self.x)  # k", "/ size(x - self.before)  # k"),
    ("x + (self.v - self.x)", "x + (self.v - self.before)"),
    ("self.v if due or self.keep", "self.v if due and self.keep"),
    ("self.step == self.steps - 1 or", "self.step == self.steps or"),
    ("self.step < self.warmup", "self.step <= self.warmup"),
    ("size(x - self.before) / size(self.v[-1:])", "size(x - self.x) / size(self.v[-1:])"),
    ("/ size(self.v[-1:])\n        if self.error <", "/ size(self.v)\n        if self.error <"),
    ("            return False\n        self.error = 0.0", "            return False\n        self.error = self.error"),
    ("if self.error < self.threshold:  # also", "if not self.error >= self.threshold:  # also"),
    ("torch.lerp(untold, told, weight)", "torch.lerp(told, untold, weight)"),
    ("np.prod(1 + np.diff(", "np.prod(1 - np.diff("),
    ("rate * -leap(sigmas, start, t)", "rate * -leap(sigmas, start, t + 1)"),
    ("sigmas[start : stop + 1])) - 1", "sigmas[start:stop])) - 1"),
    ("x * (s - (1 - s) * spectrum)", "x * (s + (1 - s) * spectrum)"),
    ("spectrum / variance**1.5", "spectrum / variance**0.5"),
    ("np.linspace(warmup, steps - 1,", "np.linspace(warmup, steps,"),
    ("* (1 + scale) + shift", "* (1 + scale) - shift"),
    ("np.polyval(self.polynomial, rise)", "np.polyval(self.polynomial[::-1], rise)"),
    ("size(self.signal - before) / size(before)", "size(self.signal - before) / size(self.signal)"),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught("diffusion/easycache", old, new, tmp_path, monkeypatch)
