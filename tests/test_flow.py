"""Flow matching: grids, steps and guidance against closed forms and diffusers, and what the transformer promises."""

import numpy as np
import pytest
import torch

from workbook import diffusion, flow
from workbook.models.dit import NO_LABEL, DiT, rotate, rotations

VARIANCE = 0.25


def gaussian(x, sigma):
    """The exact velocity n - x_0 for data N(0, 1/4): E[n - x_0 | x]."""
    total = (1 - sigma) ** 2 * VARIANCE + sigma**2
    return (sigma - (1 - sigma) * VARIANCE) / total * x


def drawn(method, steps, s=1.0):
    x = torch.randn(50, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return x, diffusion.sample(gaussian, x, flow.PATH, method=method, times=flow.grid(steps, s))


def test_shift_and_grid():
    assert flow.shift(0.8, 6) == pytest.approx(0.96)  # 4.8 / 5
    assert flow.shift([0.0, 0.3, 1.0], 1) == pytest.approx([0, 0.3, 1])
    assert flow.grid(4, 3) == pytest.approx([1, 0.9, 0.75, 0.5, 0])
    with pytest.raises(ValueError, match="at least one step"):
        flow.grid(0)
    with pytest.raises(ValueError, match="above 0"):
        flow.shift(0.5, -1)


def test_samples_of_a_gaussian_end_where_the_flow_map_says():
    # the flow keeps quantiles: x at sigma = 0 is the noise times the standard deviation of the data
    errors = []
    for method in (flow.euler, flow.heun):
        x, end = drawn(method, 64)
        errors.append((end - x * VARIANCE**0.5).abs().max().item())
    assert errors[0] < 0.05
    assert errors[1] < 0.005


@pytest.mark.parametrize(("method", "order"), [(flow.euler, 1), (flow.heun, 2)])
def test_order_of_the_steps(method, order):
    x, coarse = drawn(method, 32)
    _, fine = drawn(method, 64)
    exact = x * VARIANCE**0.5
    ratio = (coarse - exact).norm() / (fine - exact).norm()
    assert np.log2(ratio.item()) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("s", [1.0, 3.0])
def test_euler_is_diffusers(s):
    _, own = drawn(flow.euler, 12, s)
    _, peer = drawn(flow.diffusers_flow(), 12, s)
    assert (own - peer).abs().max() < 1e-6


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = DiT(width=32, layers=2, heads=2)
    for parameter in net.parameters():  # away from the zero start
        torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


def test_guidance(network):
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([1, 2, 3])
    told, untold = network(x, 0.5, labels), network(x, 0.5)
    assert torch.allclose(flow.conditional(network, labels)(x, 0.5), told, atol=1e-6)
    guided = flow.conditional(network, labels, guidance=3.0)(x, 0.5)
    assert torch.allclose(guided, untold + 3 * (told - untold), atol=1e-5)
    assert torch.equal(untold, network(x, 0.5, torch.full((3,), NO_LABEL)))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_large_batch_in_parts_is_the_batch(network, monkeypatch, guidance):
    x, labels = torch.randn(5, 1, 8, 8), torch.tensor([1, 2, 3, 4, 5])
    whole = flow.conditional(network, labels, guidance=guidance)(x, 0.5)
    sizes = []
    watch = network.register_forward_pre_hook(lambda _, inputs: sizes.append(len(inputs[0])))
    monkeypatch.setattr(flow, "AT_ONCE", 4 * 64)  # four pictures of 8 x 8, or two and their unguided twins
    parts = flow.conditional(network, labels, guidance=guidance)(x, 0.5)
    watch.remove()  # the network serves the other tests too
    assert max(sizes) == 4
    assert len(sizes) > 1
    assert torch.allclose(parts, whole, atol=1e-5)


def test_the_transformer_sees_what_it_is_told(network):
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([4, 4])
    base = network(x, 0.5, labels)
    assert base.shape == x.shape
    assert not torch.allclose(base, network(x, 0.6, labels))
    assert not torch.allclose(base, network(x, 0.5, labels + 1))
    assert torch.allclose(base[:1], network(x[:1], torch.tensor([0.5]), labels[:1]), atol=1e-6)  # row by row
    assert network(torch.randn(2, 1, 16, 16), 0.5, labels).shape == (2, 1, 16, 16)
    with pytest.raises(ValueError, match="a multiple of 2"):
        network(torch.randn(1, 1, 9, 9), 0.5)
    assert (DiT(width=32, layers=1, heads=2)(x, 0.5) == 0).all()  # starts at zero


def test_rotary_positions_are_relative():
    cos, sin = rotations(5, 8, torch.device("cpu"))
    q, k = torch.randn(8), torch.randn(8)
    turned = [rotate(v.expand(25, 8), cos, sin).view(5, 5, 8) for v in (q, k)]

    def product(a, b):
        return (turned[0][a] * turned[1][b]).sum()

    assert torch.isclose(product((0, 1), (2, 3)), product((2, 1), (4, 3)), atol=1e-5)
    assert not torch.isclose(product((0, 1), (2, 3)), product((0, 1), (3, 3)), atol=1e-3)
    assert not torch.isclose(product((0, 1), (2, 3)), product((0, 1), (2, 4)), atol=1e-3)


def test_training_loss_of_the_exact_velocity():
    # for data that are one picture, n - x_0 follows from x: the exact network has no loss
    picture = torch.full((1, 1, 4, 4), 0.3)

    def exact(x, sigma, labels):
        return (x - picture) / sigma[:, None, None, None]

    def wrong(x, sigma, labels):
        return -exact(x, sigma, labels)

    x, labels, seed = picture.expand(256, -1, -1, -1), torch.zeros(256, dtype=torch.long), torch.Generator
    assert flow.training_loss(exact, x, labels, seed().manual_seed(0)) < 1e-8
    assert flow.training_loss(wrong, x, labels, seed().manual_seed(0)) > 1


def test_training_loss_drops_labels_and_spreads_the_levels():
    seen = {}

    def network(x, sigma, labels):
        seen.update(sigma=sigma, labels=labels)
        return x

    labels = torch.full((4000,), 3)
    flow.training_loss(network, torch.zeros(4000, 1, 2, 2), labels, torch.Generator().manual_seed(0), dropped=0.25)
    assert (seen["labels"] == NO_LABEL).float().mean() == pytest.approx(0.25, abs=0.03)
    assert seen["sigma"].quantile(0.8413).logit() == pytest.approx(1, abs=0.02)  # one standard deviation


def test_unknown_checkpoint():
    with pytest.raises(ValueError, match="freeflow_teacher"):
        flow.load_dit("freeflow")
