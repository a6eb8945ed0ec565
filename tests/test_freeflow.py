"""The method cells of diffusion/freeflow against a Gaussian whose flow map is known, and against formulas by hand."""

from functools import partial

import pytest
import test_mutations
import torch

from workbook import notebook
from workbook.models.dit import NO_LABEL, DiT

MEAN, SPREAD = torch.tensor([0.5, -0.3], dtype=torch.float64), torch.tensor([0.4, 1.7], dtype=torch.float64)


@pytest.fixture(scope="module")
def freeflow():
    return notebook.load_method("diffusion/freeflow")


def drawn(count, *shape, seed=0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def times(count, seed=0):
    return 0.05 + 0.95 * torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def variance(t):
    return (1 - t) ** 2 * SPREAD**2 + t**2


def velocity(x, t, labels=None):
    """u(x, t) of N(MEAN, SPREAD²): it points to the data."""
    t = t[:, None]
    return MEAN + ((1 - t) * SPREAD**2 - t) / variance(t) * (x - (1 - t) * MEAN)


def average(z, delta, labels=None, push=0.0):
    """The exact F(z, δ), or that plus a constant."""
    delta = delta[:, None]
    return MEAN + (variance(1 - delta).sqrt() - 1) / delta * z + push


def test_the_mixture_is_data_at_zero_and_noise_at_one(freeflow):
    x, n = drawn(3, 2, 2), drawn(3, 2, 2, seed=1)
    r = torch.tensor([0.0, 1.0, 0.25], dtype=torch.float64)
    expected = torch.stack([x[0], n[1], 0.75 * x[2] + 0.25 * n[2]])
    assert torch.allclose(freeflow.mixed(x, n, r), expected)


def test_a_jump_of_no_length_goes_nowhere(freeflow):
    z = drawn(4, 3)
    assert torch.equal(freeflow.flow_map(lambda z, d: z + 7, z, torch.zeros(4, dtype=torch.float64)), z)
    half = torch.full((4,), 0.5, dtype=torch.float64)
    assert torch.allclose(freeflow.flow_map(lambda z, d: z + 7, z, half), 1.5 * z + 3.5)


@pytest.mark.parametrize("difference", [0.0, 1e-5])
def test_the_gap_of_a_pushed_student_is_what_the_pencil_finds(freeflow, difference):
    z, delta, push = drawn(50, 2), times(50), torch.tensor([0.2, -0.1], dtype=torch.float64)
    own, gap = freeflow.prediction_gap(partial(average, push=push), velocity, z, delta, difference=difference)
    d = delta[:, None]
    slope = (d * SPREAD**2 - (1 - d)) / variance(1 - d)
    assert torch.allclose(gap, push - d * slope * push, atol=1e-12 if difference == 0 else 1e-3)
    assert torch.allclose(own, average(z, delta, push=push))


def test_the_teacher_is_asked_where_the_student_is(freeflow):
    asked = []

    def teacher(x, t):
        asked.append((x, t))
        return torch.zeros_like(x)

    z, delta = drawn(5, 2), times(5)
    freeflow.prediction_gap(average, teacher, z, delta)
    assert torch.allclose(asked[0][0], delta[:, None] * MEAN + variance(1 - delta[:, None]).sqrt() * z)
    assert torch.allclose(asked[0][1], 1 - delta)


def test_gaps_have_no_graph_and_averages_have_one(freeflow):
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    student = lambda z, d: w * average(z, d)  # noqa: E731
    for difference in (0.0, 0.1):
        own, gap = freeflow.prediction_gap(student, velocity, drawn(5, 2), times(5), difference=difference)
        assert own.requires_grad
        assert not gap.requires_grad
    critic = lambda x, r: w * x  # noqa: E731
    own, gap = freeflow.correction_gap(student, critic, velocity, drawn(5, 2), drawn(5, 2, seed=1), times(5))
    assert own.requires_grad
    assert not gap.requires_grad


def test_the_correction_compares_two_velocities_at_the_blurred_picture(freeflow):
    z, n, r = drawn(6, 2), drawn(6, 2, seed=1), times(6)
    _, gap = freeflow.correction_gap(average, lambda x, r: 3 * x, velocity, z, n, r)
    y = MEAN + SPREAD * z
    x = (1 - r[:, None]) * y + r[:, None] * n
    assert torch.allclose(gap, 3 * x - velocity(x, r))
    _, gap = freeflow.correction_gap(average, velocity, velocity, z, n, r)
    assert gap.abs().max() == 0


def test_the_critic_learns_data_minus_noise(freeflow):
    y, n, r = drawn(6, 2), drawn(6, 2, seed=1), times(6)
    assert freeflow.noising_loss(lambda x, t: y - n, y, n, r) == 0
    found = freeflow.noising_loss(lambda x, t: y - n + (x - (1 - r[:, None]) * y), y, n, r)
    assert found == pytest.approx(float((r[:, None] * n).square().mean()))


@pytest.mark.parametrize("power", [0.0, 1.0])
def test_the_balanced_gradient_by_hand(freeflow, power):
    first, second = (torch.zeros(n, 2, dtype=torch.float64, requires_grad=True) for n in (3, 2))
    gap_g, gap_n = drawn(3, 2, seed=2), drawn(2, 2, seed=3)
    total = freeflow.balanced_loss((first, gap_g), (second, gap_n), power=power, floor=0.1, alpha=0.5)
    total.backward()
    weighted = gap_g / (gap_g.square().mean(1, keepdim=True) + 0.1) ** power
    size = lambda gap: gap.square().mean(1).sqrt().mean()  # noqa: E731
    share = 0.5 * size(weighted) / (size(gap_n) + 1e-6)
    assert torch.allclose(first.grad, weighted / 2 / 5)  # the mean of two dimensions, and of five items
    assert torch.allclose(second.grad, share * gap_n / 2 / 5)
    alone = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    freeflow.balanced_loss(None, (alone, gap_n), alpha=0.5).backward()
    assert torch.allclose(alone.grad, 0.5 / (size(gap_n) + 1e-6) * gap_n / 2 / 2)


class Line(torch.nn.Module):
    """a + b x, the student, teacher and critic of the tests below, which keeps what it is asked."""

    def __init__(self, a=0.0):
        super().__init__()
        self.a, self.b, self.asked = torch.nn.Parameter(torch.full((2,), a)), torch.nn.Parameter(torch.zeros(())), []

    def forward(self, x, t, labels):
        self.asked.append((x.detach(), t, labels))
        return self.a + self.b * x


def one_step(freeflow, step, **changes):
    """The networks after one loss of FreeFlow, and that loss."""
    student, critic, teacher, corrector = Line(1.0), Line(), Line(), Line(-0.5)
    recipe = freeflow.Recipe(batch=8, **({"split": 0.5, "lead": 2, "whole": 0.0} | changes))
    call = lambda network, *asked, **labels: network(*asked, **labels)  # noqa: E731
    make = freeflow.freeflow(call, teacher, call, critic, recipe, shape=(2,), seed=3, corrector=corrector)
    return make(student, step), student, critic, teacher, corrector


def test_a_step_splits_the_batch_and_moves_the_critic(freeflow):
    loss, student, critic, teacher, corrector = one_step(freeflow, 2)
    assert [len(x) for x, _, _ in student.asked] == [4, 4]
    assert (student.asked[1][1] == 1).all()
    assert (student.asked[0][1] > 0).all()
    assert torch.allclose(teacher.asked[0][1], 1 - student.asked[0][1])
    assert len(teacher.asked) == len(corrector.asked) == 1
    assert torch.equal(corrector.asked[0][2], student.asked[1][2])
    assert critic.a.abs().max() > 0
    loss.backward()
    assert student.a.grad is not None
    assert critic.asked[0][0].shape == (4, 2)


def test_the_correction_waits_for_its_critic(freeflow):
    early, late = (one_step(freeflow, step, alpha=alpha)[0] for step, alpha in ((1, 1.0), (1, 100.0)))
    assert early == late  # before `lead` the correction has no part in it
    _, _, critic, *_ = one_step(freeflow, 1)
    assert critic.a.abs().max() > 0  # but its critic learns
    gradients = []
    for step, alpha in ((2, 1.0), (2, 100.0)):
        loss, student, *_ = one_step(freeflow, step, alpha=alpha)
        loss.backward()
        gradients.append(student.a.grad)
    assert not torch.allclose(*gradients)


def test_one_signal_alone(freeflow):
    _, student, critic, _, corrector = one_step(freeflow, 5, split=1.0)
    assert [len(x) for x, _, _ in student.asked] == [8]
    assert not critic.asked
    assert not corrector.asked
    _, student, _, teacher, corrector = one_step(freeflow, 0, split=0.0)
    assert [len(x) for x, _, _ in student.asked] == [8]
    assert not teacher.asked
    assert len(corrector.asked) == 1


def test_levels_stay_below_the_top_and_whole_jumps_are_made(freeflow):
    *_, corrector = one_step(freeflow, 4, split=0.0, top=0.3)
    assert corrector.asked[0][1].max() < 0.3
    _, student, *_ = one_step(freeflow, 4, split=1.0, whole=1.0)
    assert (student.asked[0][1] == 1).all()


def test_the_transformer_points_to_the_data(freeflow):
    torch.manual_seed(0)
    network = DiT(patch=4, width=32, layers=1, heads=2)
    for parameter in network.parameters():  # it starts deaf to labels and levels
        torch.nn.init.normal_(parameter, std=0.2)
    x, t, labels = torch.randn(3, 1, 8, 8), torch.tensor([0.2, 0.5, 0.9]), torch.tensor([1, 2, 3])
    told, untold = network(x, t, labels), network(x, t, torch.full((3,), NO_LABEL))
    assert torch.allclose(freeflow.level_velocity(network, x, t, labels), -told, atol=1e-6)
    guided = freeflow.level_velocity(network, x, t, labels, guidance=3.0)
    assert (told - untold).abs().max() > 1e-2
    assert torch.allclose(guided, -(untold + 3 * (told - untold)), atol=1e-4)
    partly = freeflow.level_velocity(network, x, t, labels, guidance=3.0, below=0.5)
    assert torch.allclose(partly[:2], guided[:2], atol=1e-4)
    assert torch.allclose(partly[2], -told[2], atol=1e-4), "no guidance above the level"
    expected = -network(x, 1 - t / 4, labels)
    assert torch.allclose(freeflow.level_average(network, x, t, labels), expected, atol=1e-6)


def test_silenced_waves_stay_silent(freeflow):
    torch.manual_seed(0)
    network = freeflow.without_fast_waves(DiT(patch=4, width=32, layers=1, heads=2))
    fast = 1000 * torch.logspace(0, -3, 16) > 30
    silent = network.level[0].weight[:, torch.cat([fast, fast])]
    assert silent.abs().max() == 0
    network.level(torch.randn(4, 32)).sum().backward()
    gradient = network.level[0].weight.grad
    assert gradient[:, torch.cat([fast, fast])].abs().max() == 0
    assert gradient[:, ~torch.cat([fast, fast])].abs().min() > 0


MUTATIONS = [
    ("torch.lerp(x, n, along(r, x))", "torch.lerp(n, x, along(r, x))"),
    ("generating = own + along", "generating = own - along"),
    ("generating - velocity(", "generating + velocity("),
    ("* own, 1 - delta)", "* own, delta)"),
    ("velocity(z + along(delta, z) * own,", "velocity(z,"),
    ("noising(x, r) - velocity(x, r)", "velocity(x, r) - noising(x, r)"),
    ("x = mixed(z + own, n, r)", "x = mixed(own, n, r)"),
    ("- (y - n)).square()", "- (n - y)).square()"),
    ("(mean_square(gap) + floor) ** power", "(mean_square(gap) + floor) ** -power"),
    ("alpha * size /", "alpha / size /"),
    ("if step >= recipe.lead", "if step < recipe.lead"),
    ("-torch.lerp(untold, told, along", "-torch.lerp(told, untold, along"),
    ("t <= below", "t >= below"),
    ("1 - delta / slow", "1 - delta * slow"),
    ("(rates <= fastest)", "(rates > fastest)"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught("diffusion/freeflow", old, new, tmp_path, monkeypatch)
