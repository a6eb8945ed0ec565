"""The method cells of diffusion/re-ttention and the banded kernel against matrices, loops and the networks' own."""

import math

import pytest
import test_mutations
import torch
from torch.nn import functional

from workbook import bands, flow, notebook
from workbook.diffusion import noise, sample
from workbook.kernels import KernelError
from workbook.models.dit import DiT
from workbook.models.video import VideoDiT

name = "diffusion/re-ttention"
re_ttention = notebook.load_method(name)


def kernels():
    """Every build of the banded kernel that runs here, and the form of the notebook."""
    found = {}
    for build in ("AVX-512", "AVX2+FMA", "portable"):
        try:
            found[build] = bands.band_kernel(build)
        except KernelError:
            continue
    return found


KERNELS = kernels()
FORMS = ["gathered", *KERNELS]


def form(word):
    return KERNELS.get(word) or re_ttention.banded


def tensors(*shape, number=0, count=3):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(number))


def masked(q, k, v, half, frames=1):
    """Output and log-sum-exp with a mask of T × T, in float64."""
    place = torch.arange(q.shape[2] // frames).repeat(frames)
    hidden = (place - place[:, None]).abs() > half
    scores = (q.double() @ k.double().mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -torch.inf)
    return scores.softmax(-1) @ v.double(), scores.logsumexp(-1)


SHAPES = [(1, 256, 4), (4, 64, 1), (3, 37, 5), (1, 20, 30), (1, 5, 0), (2, 7, 3), (1, 33, 16), (16, 16, 0), (1, 1, 0)]


# -- banded attention -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", FORMS)
@pytest.mark.parametrize(("frames", "places", "half"), SHAPES)
def test_banded_attention_is_masked_attention(word, frames, places, half):
    q, k, v = tensors(2, 3, frames * places, 32)
    out, mass = form(word)(q, k, v, half, frames)
    expected, expected_mass = masked(q, k, v, half, frames)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.allclose(mass.double(), expected_mass, atol=1e-5)


@pytest.mark.parametrize("block", [1, 7, 32, 100])
def test_the_size_of_a_block_changes_nothing(block):
    q, k, v = tensors(1, 2, 3 * 21, 16)
    out, mass = re_ttention.banded(q, k, v, 4, 3, block=block)
    expected, expected_mass = masked(q, k, v, 4, 3)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.allclose(mass.double(), expected_mass, atol=1e-5)


@pytest.mark.parametrize("word", FORMS)
def test_large_scores_do_not_overflow(word):
    q, k, v = tensors(1, 1, 40, 32)
    out, mass = form(word)(200 * q, k, v, 6)
    expected, expected_mass = masked(200 * q, k, v, 6)
    assert torch.allclose(out.double(), expected, atol=2e-4)
    assert torch.allclose(mass.double(), expected_mass, rtol=1e-6)
    assert mass.max() > 500


@pytest.mark.parametrize("word", FORMS)
def test_keys_outside_the_band_are_not_touched(word):
    q, k, v = tensors(1, 1, 64, 32)
    usual = form(word)(q, k, v, 3)[0][:, :, :20]
    k[:, :, 40:], v[:, :, 40:] = torch.nan, torch.inf
    assert torch.equal(form(word)(q, k, v, 3)[0][:, :, :20], usual)


@pytest.mark.parametrize("word", list(KERNELS))
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_kernel_takes_strides_and_threads(word, threads):
    wide = tensors(2, 50, 3, 4, 64, count=1)[0]  # as a projection gives them: (batch, tokens, 3, heads, width)
    q, k, v = wide.permute(2, 0, 3, 1, 4)
    out, mass = KERNELS[word](q, k, v, 5, threads=threads)
    expected, expected_mass = masked(q, k, v, 5)
    assert torch.allclose(out.double(), expected, atol=1e-5)
    assert torch.allclose(mass.double(), expected_mass, atol=1e-5)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("word", list(KERNELS))
def test_the_kernel_refuses_what_it_cannot_do(word):
    kernel, (q, k, v) = KERNELS[word], tensors(1, 2, 12, 32)
    for wrong in ((q, k[:, :, :6], v), (q[..., :16], k[..., :16], v[..., :16])):
        with pytest.raises(ValueError, match="three equal shapes"):
            kernel(*wrong, 1)
    with pytest.raises(ValueError, match="three equal shapes"):
        kernel(q, k, v, 1, frames=5)
    with pytest.raises(ValueError, match="three equal shapes"):
        kernel(q, k, v, -1)
    with pytest.raises(ValueError, match=r"v is torch\.float64"):
        kernel(q, k, v.double(), 1)
    with pytest.raises(ValueError, match="last stride"):
        kernel(q, k.transpose(2, 3).contiguous().transpose(2, 3), v, 1)


def test_an_unknown_build_is_refused():
    with pytest.raises(KernelError, match="AVX-1024 is no build"):
        bands.band_kernel("AVX-1024")


def test_a_build_for_another_processor_is_refused(monkeypatch):
    monkeypatch.setattr(bands, "runs_here", lambda choice: False)
    with pytest.raises(KernelError, match="portable kernel does not run"):
        bands.BandKernel(bands.BUILDS[-1])


# -- standing in for a network's attention ----------------------------------------------------------------------------


def test_torchs_function_is_back_whatever_happens():
    dense = functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), bands.replaced(lambda layer, q, k, v: 1 / 0):
        functional.scaled_dot_product_attention(*tensors(1, 1, 4, 8))
    assert functional.scaled_dot_product_attention is dense


def test_attention_to_others_with_a_mask_or_causal_is_left_alone():
    q, k, v = tensors(1, 1, 4, 8)

    def call():
        functional.scaled_dot_product_attention(q[:, :, :2], k, v)
        functional.scaled_dot_product_attention(q, k, v, torch.ones(4, 4, dtype=torch.bool))
        functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    with pytest.raises(ValueError, match="nothing was replaced"), bands.replaced(lambda layer, q, k, v: 1 / 0):
        call()


def networks():
    """Both networks, small and with weights that hide nothing, and the shape of what they draw."""
    for network, shape, layers in (
        (DiT(layers=3), (1, 16, 16), 3),
        (VideoDiT(layers=2), (1, 4, 16, 16), 2),
    ):
        for number, weight in enumerate(network.eval().requires_grad_(False).parameters()):
            weight += 0.05 * tensors(*weight.shape, count=1, number=number)[0]
        yield network, shape, layers


def test_self_attention_of_both_networks_is_replaced_and_nothing_else():
    for network, shape, layers in networks():
        model, x, seen = flow.conditional(network, torch.tensor([1, 2]), guidance=2.0), noise(2, [0], shape=shape), []
        usual = model(x, 0.7)

        def attend(layer, q, k, v, seen=seen):
            seen.append((layer, *q.shape))
            return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v

        with bands.replaced(attend):
            found = model(x, 0.7)
        assert torch.allclose(found, usual, atol=1e-4)
        tokens = math.prod(shape[1:]) // (4 if len(shape) == 3 else 32)
        assert seen == [(layer, 4, 4, tokens, 32) for layer in range(layers)]


def test_each_layer_has_a_memory_of_its_own_over_the_steps():
    for network, shape, layers in networks():
        model, x, calls = flow.conditional(network, torch.tensor([1, 2]), guidance=2.0), noise(2, [0], shape=shape), []

        def attend(q, k, v, memory, kind, calls=calls):
            calls.append((id(memory), kind))
            return v

        mine = re_ttention.Plugged(model, re_ttention.plan(4, 1, 2), attend)
        for sigma in (1.0, 0.7, 0.5, 0.2):
            mine(x, sigma)
        assert len({memory for memory, _ in calls}) == layers == len(mine.memories)
        assert [memory for memory, _ in calls] == [memory for memory, _ in calls[:layers]] * 4
        assert [kind for _, kind in calls[::layers]] == ["full", "refresh", "sparse", "refresh"]
        with pytest.raises(ValueError, match="4 steps were planned"):
            mine(x, 0.1)


# -- the method -------------------------------------------------------------------------------------------------------


def near(half=4):
    return lambda q, k, v: re_ttention.banded(q, k, v, half)


def official(steps, half, drift, *, use_ratio=True):
    """Outputs of a layer as the official code computes them: whole matrices, a scaled denominator, in float64.

    steps: (q, k, v, kind); the mask is applied to the exponentials.
    """
    outs, ratio, far = [], None, None
    for q, k, v, kind in steps:
        q, k, v = q.double(), k.double(), v.double()
        place = torch.arange(q.shape[2])
        mask = ((place - place[:, None]).abs() <= half).double()
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        top = (scores - scores.amax(-1, keepdim=True)).exp()
        full = top / top.sum(-1, keepdim=True) @ v

        def window(ratio, scores=scores, mask=mask, v=v):
            kept = scores.masked_fill(mask == 0, -torch.inf)
            weights = (kept - kept.amax(-1, keepdim=True)).exp() * mask
            denominator = weights.sum(-1, keepdim=True) / (ratio if use_ratio else 1)
            return weights / denominator @ v

        if kind == "refresh":
            ratio = (top * mask).sum(-1, keepdim=True) / top.sum(-1, keepdim=True)
            far = full - window(ratio)
        outs.append(full if kind != "sparse" else window(ratio) + far)
        if kind == "sparse":
            ratio = ratio + drift
    return outs


def run_of(kinds, tokens=48):
    """Queries, keys and values that change a little from step to step."""
    base = tensors(2, 3, tokens, 32)
    return [(*(base + 0.3 * tensors(2, 3, tokens, 32, number=1 + i)), kind) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("drift", [0.0, 0.04, 0.3])
@pytest.mark.parametrize("use_ratio", [True, False])
def test_the_method_is_the_official_code_on_whole_matrices(drift, use_ratio):
    kinds = re_ttention.plan(12, 2, 4)
    memory, steps = re_ttention.Memory(), run_of(kinds)
    drift, share = (drift, None) if use_ratio else (0.0, 1.0)
    for (*qkv, kind), expected in zip(steps, official(steps, 4, drift, use_ratio=use_ratio), strict=True):
        out = re_ttention.re_ttention(*qkv, memory, kind, near=near(), drift=drift, share=share)
        assert torch.allclose(out.double(), expected, atol=2e-5), kind


@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
def test_it_is_the_remembered_output_and_a_share_of_what_changed(share):
    (q, k, v, _), (*new, _) = run_of(["refresh", "sparse"])
    memory = re_ttention.Memory()
    full = re_ttention.re_ttention(q, k, v, memory, "refresh", near=near(), drift=0.0, share=share)
    c = share
    if share is None:
        c = (masked(q, k, v, 4)[1] - masked(q, k, v, 100)[1]).exp()[..., None]
    expected = full + c * (masked(*new, 4)[0] - masked(q, k, v, 4)[0])
    out = re_ttention.re_ttention(*new, memory, "sparse", near=near(), drift=0.0)
    assert torch.allclose(out.double(), expected, atol=2e-5)


def test_without_a_residual_the_weights_sum_to_the_ratio_and_the_drift():
    q, k, v = tensors(1, 2, 40, 32)
    ones, memory = torch.ones_like(v), re_ttention.Memory()
    expected = (masked(q, k, v, 4)[1] - masked(q, k, v, 100)[1]).exp()
    assert expected.max() < 1
    for again in range(2):  # a refresh forgets what was added
        full = re_ttention.re_ttention(q, k, ones, memory, "refresh", near=near(), residual=False)
        assert torch.allclose(full, ones, atol=1e-5)
        for m in range(4):
            out = re_ttention.re_ttention(q, k, ones, memory, "sparse", near=near(), residual=False)
            assert torch.allclose(out[..., 0].double(), expected + 0.04 * m, atol=1e-5), (again, m)
    assert memory.far.abs().max() == 0


def test_the_window_alone_is_a_softmax_over_the_near_keys():
    (q, k, v, _), (*new, _) = run_of(["refresh", "sparse"])
    memory, options = re_ttention.Memory(), {"near": near(), "share": 1.0, "drift": 0.0, "residual": False}
    re_ttention.re_ttention(q, k, v, memory, "refresh", **options)
    out = re_ttention.re_ttention(*new, memory, "sparse", **options)
    assert torch.allclose(out.double(), masked(*new, 4)[0], atol=1e-5)


def test_a_full_step_leaves_the_memory_alone():
    q, k, v = tensors(1, 2, 40, 32)
    memory = re_ttention.Memory()
    out = re_ttention.re_ttention(q, k, v, memory, "full", near=near())
    assert memory == re_ttention.Memory()
    assert torch.allclose(out.double(), masked(q, k, v, 100)[0], atol=1e-5)


def test_a_sparse_step_needs_a_refresh_of_the_same_batch():
    q, k, v = tensors(2, 2, 40, 32)
    memory = re_ttention.Memory()
    with pytest.raises(ValueError, match="needs a refresh"):
        re_ttention.re_ttention(q, k, v, memory, "sparse", near=near())
    re_ttention.re_ttention(q, k, v, memory, "refresh", near=near())
    with pytest.raises(ValueError, match="same shape"):
        re_ttention.re_ttention(q[:1], k[:1], v[:1], memory, "sparse", near=near())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((20, 5, 5), {5, 10, 15}),
        ((50, 15, 5), {15, 20, 25, 30, 35, 40, 45}),
        ((50, 10, 5), {10, 15, 20, 25, 30, 35, 40, 45}),
        ((6, 0, 20), {0}),
        ((4, 9, 5), set()),
    ],
)
def test_the_plans_of_the_official_code(arguments, expected):
    steps, first, _ = arguments
    kinds = re_ttention.plan(*arguments)
    assert len(kinds) == steps
    assert {i for i, kind in enumerate(kinds) if kind == "refresh"} == expected
    assert kinds[:first] == ["full"] * min(first, steps)
    assert set(kinds[first:]) <= {"refresh", "sparse"}


def test_with_every_key_near_a_network_draws_what_it_draws():
    for network, shape, _ in networks():
        model, x = flow.conditional(network, torch.tensor([1, 2]), guidance=2.0), noise(2, [0], shape=shape)

        def attend(q, k, v, memory, kind):
            return re_ttention.re_ttention(q, k, v, memory, kind, near=near(64), drift=0.0)

        mine = re_ttention.Plugged(model, re_ttention.plan(5, 1, 2), attend)
        ends = [sample(m, x, flow.PATH, method=flow.euler, times=flow.grid(5)) for m in (model, mine)]
        assert torch.allclose(*ends, atol=1e-4)


# -- what may be gained -----------------------------------------------------------------------------------------------


def test_amdahls_law_with_three_kinds_of_steps():
    kinds, attention = re_ttention.plan(20, 5, 5), {"full": 3.0, "refresh": 3.5, "sparse": 0.25}
    seconds = sum(attention[kind] + 2.0 for kind in kinds)
    assert re_ttention.amdahl(kinds, attention, 2.0) == pytest.approx(1 - seconds / (20 * 5.0))
    assert re_ttention.amdahl(kinds, attention, 2.0) == pytest.approx((12 * 2.75 - 3 * 0.5) / 100)
    nothing = {"full": 3.0, "refresh": 3.0, "sparse": 3.0}
    assert re_ttention.amdahl(kinds, nothing, 1.0) == pytest.approx(0)


@pytest.mark.parametrize(
    ("arguments", "half"), [((256, 0.03125), 4), ((4096, 0.03125), 64), ((256, 0.03125, 4), 1), ((256, 0.125, 4), 4)]
)
def test_the_windows_of_the_official_code(arguments, half):
    assert bands.half_width(*arguments) == half


@pytest.mark.parametrize(("frames", "places", "half"), SHAPES)
def test_the_share_of_keys_seen_is_that_of_the_mask(frames, places, half):
    place = torch.arange(places).repeat(frames)
    seen = ((place - place[:, None]).abs() <= half).double().mean().item()
    assert bands.seen_share(frames * places, half, frames) == pytest.approx(seen)


MUTATIONS = [
    ("(near_mass - mass if share", "(mass - near_mass if share"),
    ("far = out - memory.ratio * found", "far = out - found"),
    ("torch.addcmul(memory.far, memory.ratio, found)", "torch.addcmul(memory.far, memory.ratio.clamp(max=1), found)"),
    ("memory.ratio = memory.ratio + drift", "memory.ratio = memory.ratio - drift"),
    ("memory.far = out - memory.ratio * found if residual", "memory.far = memory.ratio * found - out if residual"),
    ("if kind == \"full\":", "if kind == \"refresh\":"),
    ("(key - query).abs() <= half", "(key - query).abs() < half"),
    ("& (key >= 0) & (key < places)", "& (key >= 0) & (key <= places)"),
    ("query[:, :1] - half +", "query[:, :1] + half -"),
    ("masked_fill(~seen, -torch.inf)", "masked_fill(seen, -torch.inf)"),
    ("windows(q, 0), windows(k, half), windows(v, half)", "windows(q, 0), windows(v, half), windows(k, half)"),
    ("if i % refresh else", "if (i + 1) % refresh else"),
    ("range(steps - full_first)", "range(steps - full_first - 1)"),
    ("self.memories[layer], kind", "self.memories[0], kind"),
    ("(len(kinds) * (attention[\"full\"] + rest))", "(len(kinds) * (attention[\"full\"] - rest))"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught(name, old, new, tmp_path, monkeypatch)
