"""TarFlow and the method cells of diffusion/gs-jacobi against formulas by hand, a loop without a cache and autograd."""

import math
from itertools import pairwise

import pytest
import test_mutations
import torch
from torch.nn import functional as F

from workbook import notebook
from workbook.models import tarflow

SHAPE = tarflow.Shape(side=6, patch=2, blocks=3, layers=2, width=8, heads=2)  # T = 9, D = 4
KINDS = torch.tensor([3, 0])


def random_flow(shape=SHAPE, size=0.3):
    """A flow with random weights everywhere, in double precision."""
    generator = torch.Generator().manual_seed(5)
    flow = tarflow.TarFlow(shape).double().requires_grad_(False)
    for weight in flow.parameters():
        weight.add_(size * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return flow


FLOW = random_flow()
BLOCK = FLOW.blocks[1]
X = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
Z = BLOCK(X, KINDS)[0]


@pytest.fixture(scope="module")
def gs_jacobi():
    return notebook.load_method("diffusion/gs-jacobi")


def by_hand(block, x, kinds):
    """(s, u) of every position from the transformer's definition: one head and one position at a time, no cache."""
    heads, width = block.shape.heads, block.shape.width // block.shape.heads
    out = torch.zeros(*x.shape[:2], 2 * x.shape[2], dtype=x.dtype)
    norm = lambda h, n: F.layer_norm(h, (h.shape[-1],), n.weight, n.bias)  # noqa: E731
    for b, sequence in enumerate(x):
        h = sequence @ block.into.weight.T + block.into.bias + block.place + block.kind[kinds[b]]
        for layer in block.layers:
            q, k, v = (norm(h, layer.norm_1) @ layer.qkv.weight.T + layer.qkv.bias).chunk(3, dim=-1)
            seen = torch.zeros_like(q)
            for t in range(len(h)):
                for part in (slice(i * width, (i + 1) * width) for i in range(heads)):
                    weights = (k[: t + 1, part] @ q[t, part] / math.sqrt(width)).softmax(0)
                    seen[t, part] = weights @ v[: t + 1, part]
            h = h + seen @ layer.out.weight.T + layer.out.bias
            inner = norm(h, layer.norm_2) @ layer.up.weight.T + layer.up.bias
            h = h + (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2) @ layer.down.weight.T + layer.down.bias
        out[b, 1:] = (norm(h, block.norm) @ block.onto.weight.T + block.onto.bias)[:-1]
    return out.chunk(2, dim=-1)


def sequential(block, z, kinds):
    """The inverse of a block, patch by patch, the whole network from scratch for each."""
    x = z.clone()
    for t in range(1, z.shape[1]):
        s, u = by_hand(block, x, kinds)
        x[:, t] = torch.exp(s[:, t]) * z[:, t] + u[:, t]
    return x


def one_sweep(block, x, z, kinds):
    s, u = by_hand(block, x, kinds)
    return torch.cat([z[:, :1], (torch.exp(s) * z + u)[:, 1:]], dim=1)


def close(one, other, tolerance=1e-10):
    return torch.allclose(one, other, rtol=0, atol=tolerance)


# -- the flow ---------------------------------------------------------------------------------------------------------


def test_a_block_is_the_transformer_by_hand():
    s, u = by_hand(BLOCK, X, KINDS)
    z, log_scale = BLOCK(X, KINDS)
    assert close(log_scale, s)
    assert close(z, torch.exp(-s) * (X - u))


def test_the_sequential_inverse_is_the_loop_from_scratch():
    found = BLOCK.inverse(Z, KINDS)
    assert close(found, X)
    assert close(found, sequential(BLOCK, Z, KINDS))


def test_the_flow_turns_the_order_of_every_second_block():
    z0 = FLOW.blocks[0](X, KINDS)[0]
    z1 = FLOW.blocks[1](z0.flip(1), KINDS)[0].flip(1)
    z2 = FLOW.blocks[2](z1, KINDS)[0]
    z, _ = FLOW(X, KINDS)
    assert close(z, z2)
    assert close(FLOW.inverse(z, KINDS), X, 1e-8)


def test_the_log_determinant_is_that_of_the_jacobian():
    _, found = FLOW(X, KINDS)
    jacobian = torch.autograd.functional.jacobian(lambda x: FLOW(x, KINDS[:1])[0], X[:1]).reshape(36, 36)
    assert found[0].item() == pytest.approx(torch.linalg.slogdet(jacobian).logabsdet.item() / 36)


def test_the_loss_is_the_likelihood_of_a_gaussian():
    z, log_determinant = FLOW(X, KINDS)
    law = torch.distributions.Normal(0.0, 1.0)
    expected = -(law.log_prob(z).mean((1, 2)) + log_determinant) - 0.5 * math.log(2 * math.pi)
    assert close(FLOW.loss(X, KINDS), expected)


def test_segments_with_cached_keys_are_the_whole_network():
    cache, condition = BLOCK.cache(2), BLOCK.condition(KINDS)
    for start, stop in ((0, 4), (4, 5), (5, 8)):
        BLOCK.advance(torch.zeros_like(X[:, start:stop]), condition, cache, start)  # replaced by the second run
        s, u = BLOCK.advance(X[:, start:stop], condition, cache, start)
        whole = by_hand(BLOCK, X, KINDS)
        assert close(s, whole[0][:, start + 1 : stop + 1])
        assert close(u, whole[1][:, start + 1 : stop + 1])


def test_denoising_is_exact_for_a_gaussian():
    """With scale and shift that depend on nothing, pixels are Gaussian and the mean of the clean one is known."""
    flow = tarflow.TarFlow(tarflow.Shape(side=6, patch=2, blocks=1, layers=1, width=8, heads=2)).double()
    with torch.no_grad():
        flow.blocks[0].onto.bias.copy_(torch.tensor([math.log(0.5)] * 4 + [0.3] * 4, dtype=torch.float64))
    found = flow.denoise(X, KINDS, 0.2)
    expected = X - 0.2**2 * (X - 0.3) / 0.5**2
    assert close(found[:, 1:], expected[:, 1:])
    assert close(found[:, 0], X[:, 0] * (1 - 0.2**2))  # the first patch is not changed by the flow


def test_pictures_are_cut_row_by_row_and_put_together():
    pictures = torch.arange(72.0).reshape(2, 1, 6, 6)
    patches = FLOW.patches(pictures)
    assert patches[0, 1].tolist() == [2, 3, 8, 9]
    assert torch.equal(FLOW.pictures(patches), pictures)
    assert FLOW.draw(patches / 100).shape == (2, 1, 32, 32)


# -- GS-Jacobi --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("positions", "segments"), [(9, 1), (9, 3), (9, 4), (9, 8), (196, 8)])
def test_segments_cover_every_unknown_position_once(gs_jacobi, positions, segments):
    edges = gs_jacobi.segment_edges(positions, segments)
    lengths = [b - a for a, b in pairwise(edges)]
    assert (edges[0], edges[-1], len(lengths)) == (0, positions - 1, segments)
    assert max(lengths) <= math.ceil(positions / segments)
    assert min(lengths) >= positions // segments - 1
    with pytest.raises(ValueError, match="positions has 1 to"):
        gs_jacobi.segment_edges(positions, positions)


@pytest.mark.parametrize("guess", ["noise", "zero"])
@pytest.mark.parametrize("sweeps", [1, 2, 5])
def test_jacobi_is_the_sweep_by_hand(gs_jacobi, guess, sweeps):
    x = Z.clone()
    if guess == "zero":
        x[:, 1:] = 0
    for _ in range(sweeps):
        x = one_sweep(BLOCK, x, Z, KINDS)
    found, taken = gs_jacobi.gs_jacobi(BLOCK, Z, KINDS, sweeps=sweeps, guess=guess)
    assert taken == [sweeps]
    assert close(found, x)
    assert close(found[:, : sweeps + 1], X[:, : sweeps + 1])
    assert not close(found[:, sweeps + 1], X[:, sweeps + 1], 1e-6)


@pytest.mark.parametrize("guess", ["noise", "zero"])
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8])
def test_full_sweeps_are_the_sequential_solution(gs_jacobi, guess, segments):
    found, taken = gs_jacobi.gs_jacobi(BLOCK, Z, KINDS, segments=segments, guess=guess)
    assert close(found, X)
    assert sum(taken) == 8
    assert len(taken) == segments


def test_segments_are_solved_one_after_the_other(gs_jacobi):
    """Two sweeps a segment, by hand: a segment starts from earlier values; old keys are those of the last input."""
    found, _ = gs_jacobi.gs_jacobi(BLOCK, Z, KINDS, segments=3, sweeps=3, guess="zero")
    assert close(found, X)  # three sweeps solve segments of three
    seen = []
    gs_jacobi.gs_jacobi(BLOCK, Z, KINDS, segments=3, sweeps=2, guess="zero", watch=lambda x: seen.append(x.clone()))
    assert len(seen) == 6
    x = torch.cat([Z[:, :1], torch.zeros_like(Z[:, 1:])], dim=1)
    for count in range(2):
        x = torch.cat([x[:, :1], one_sweep(BLOCK, x, Z, KINDS)[:, 1:4], x[:, 4:]], dim=1)
        assert close(seen[count], x)
    assert close(seen[3][:, :4], x[:, :4])  # a finished segment stays
    assert close(seen[1][:, 4:], torch.zeros_like(x[:, 4:]))  # a later one has not begun


def test_a_tolerance_ends_a_segment_early(gs_jacobi):
    changes, before = [], [torch.cat([Z[:, :1], torch.zeros_like(Z[:, 1:])], dim=1)]

    def watch(x):
        changes.append((x - before[0])[:, 1:].square().mean().sqrt().item())
        before[0] = x.clone()

    gs_jacobi.gs_jacobi(BLOCK, Z, KINDS, guess="zero", watch=watch)
    for limit in (changes[1] * 1.001, changes[3] * 1.001):
        first = next(n for n, change in enumerate(changes, 1) if change < limit)
        assert gs_jacobi.gs_jacobi(BLOCK, Z, KINDS, guess="zero", tolerance=limit)[1] == [first]


def test_the_bound_clamps_every_sweep(gs_jacobi):
    x = Z.clone()
    for _ in range(3):
        x = torch.cat([Z[:, :1], one_sweep(BLOCK, x, Z, KINDS)[:, 1:].clamp(-0.7, 0.7)], dim=1)
    assert close(gs_jacobi.gs_jacobi(BLOCK, Z, KINDS, sweeps=3, bound=0.7)[0], x)
    with pytest.raises(KeyError):
        gs_jacobi.first_guess(Z, "one")


def test_a_strategy_is_stack_segments_sweeps_else(gs_jacobi):
    plans = gs_jacobi.strategy([1], 8, 32, [10] * 3, ["noise", "zero", "noise"])
    easy = {"segments": 1, "sweeps": 10, "guess": "noise"}
    assert plans == [easy, {"segments": 8, "sweeps": 32, "guess": "zero"}, easy]
    assert [p["sweeps"] for p in gs_jacobi.strategy([0], 2, 9, [4, 5, 6], ["zero"] * 3)] == [9, 5, 6]


def test_the_sampler_inverts_the_flow_and_counts(gs_jacobi):
    z, _ = FLOW(X, KINDS)
    plans = [{"segments": 0}, {"segments": 3, "sweeps": 3, "guess": "noise"}]
    plans.append({"segments": 1, "sweeps": None, "guess": "zero"})
    order = []
    found, taken = gs_jacobi.invert(FLOW, z, KINDS, plans, watch=lambda number, x: order.append((number, x)))
    assert close(found, X, 1e-8)
    assert [number for number, _ in order] == [2, 1, 0]
    assert taken == {2: [8], 1: [3, 3, 2], 0: [8]}
    assert close(order[1][1], FLOW.blocks[0](X, KINDS)[0], 1e-8)


# -- the metrics ------------------------------------------------------------------------------------------------------


def test_the_guessing_metric_is_the_first_residual(gs_jacobi):
    found = gs_jacobi.initial_guessing(BLOCK, X, KINDS)
    for guess, start in (("noise", Z), ("zero", torch.cat([Z[:, :1], torch.zeros_like(Z[:, 1:])], dim=1))):
        residual = (one_sweep(BLOCK, start, Z, KINDS) - X).mean(0)
        assert found[guess] == pytest.approx(torch.linalg.svdvals(residual).max().item())


def test_the_ranking_metric_is_its_formula(gs_jacobi):
    s, u = by_hand(BLOCK, X, KINDS)
    largest = lambda matrix: torch.linalg.svdvals(matrix).max()  # noqa: E731
    w_s, w_u = BLOCK.onto.weight[:4], BLOCK.onto.weight[4:]
    expected = largest((torch.exp(-s) * X).mean(0)) * largest(w_s) + largest(w_u)
    assert gs_jacobi.convergence_ranking(BLOCK, X, KINDS) == pytest.approx(expected.item())
    expected = largest((X - u).mean(0)) * largest(w_s) + largest(w_u)
    assert gs_jacobi.convergence_ranking(BLOCK, X, KINDS, linearised=True) == pytest.approx(expected.item())


@pytest.mark.parametrize("guess", ["noise", "zero"])
@pytest.mark.parametrize("target", [0.3, 0.03, 1e-9])
def test_the_rehearsal_finds_the_fewest_sweeps(gs_jacobi, guess, target):
    found = gs_jacobi.rehearse(BLOCK, X, KINDS, target, guess)

    def error(sweeps):
        x, _ = gs_jacobi.gs_jacobi(BLOCK, Z, KINDS, sweeps=sweeps, guess=guess)
        return (x - X).square().mean().sqrt().item()

    assert error(found) <= target
    assert all(error(fewer) > target for fewer in range(1, found))


MUTATIONS = [
    ("g * positions // segments for g", "g * positions // segments + 1 for g"),
    ("block.advance(x[:, start:stop]", "block.advance(x[:, start + 1:stop + 1]"),
    ("torch.addcmul(u, s.exp()", "torch.addcmul(u, (-s).exp()"),
    ("z[:, start + 1 : stop + 1])", "z[:, start:stop])"),
    ("x.shape[1] - 1 if stop is None", "x.shape[1] - 2 if stop is None"),
    ("min(sweeps or limit, limit)", "max(sweeps or limit, limit)"),
    ("if change < tolerance", "if change > tolerance"),
    ("clamp_(-bound, bound)", "clamp_(-bound, 2 * bound)"),
    ("if k in stack else (1", "if k not in stack else (1"),
    ("in reversed(range(len(flow.blocks)))", "in range(len(flow.blocks))"),
    ("z = flow.turn(x, number)", "z = x"),
    ("(new - x[:, 1:]).mean(0)", "(new + x[:, 1:]).mean(0)"),
    ("s.exp() * z if linearised else (-s).exp() * x", "(-s).exp() * x if linearised else s.exp() * z"),
    ("size * w_s + w_u", "size * w_u + w_s"),
    ("if error <= target)", "if error >= target)"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well overflow
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught("diffusion/gs-jacobi", old, new, tmp_path, monkeypatch)
