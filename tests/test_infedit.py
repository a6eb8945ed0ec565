"""The method cells of diffusion/infedit, its peers and its canvases against formulas by hand and diffusers."""

from itertools import combinations

import diffusers
import numpy as np
import pytest
import test_mutations
import torch

from workbook import editing, images, notebook
from workbook.models import canvas

SCHEDULE = canvas.canvas_schedule()
POINTS = torch.linspace(-1, 1, 4, dtype=torch.float64)[:, None, None, None]
BRIGHT, DIM = (canvas.tokens(f"{word} plain bag and dim plain dress").repeat(4, 1) for word in ("bright", "dim"))


@pytest.fixture(scope="module")
def infedit():
    return notebook.load_method("diffusion/infedit")


def bent(x, t, numbers):
    """A model that is nonlinear in x and hears the caption, and the blank one too."""
    return torch.tanh(x * (1 + t)) + 0.3 * torch.cos(numbers.double().sum(1))[:, None, None, None]


def drawn(steps, seed=0, like=POINTS):
    return torch.randn(steps, *like.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(times, noise, *, scale, source_scale=1.0, eta=1.0):
    """Virtual inversion as the paper's box has it, one branch after the other."""
    a, s = SCHEDULE.signal(times), SCHEDULE.noise(times)

    def asked(z, t, numbers, weight):
        null = bent(z, t, canvas.null_tokens(len(z)))
        return null + weight * (bent(z, t, numbers) - null)

    source = target = noise[0]
    for i, t in enumerate(times):
        e_source, e_target = asked(source, t, BRIGHT, source_scale), asked(target, t, DIM, scale)
        consistent = (source - a[i] * POINTS) / s[i]
        clean = (target - s[i] * (e_target - e_source + consistent)) / a[i]
        if i + 1 < len(times):
            sigma = np.sqrt(eta) * s[i + 1]
            rest = np.sqrt(np.maximum(s[i + 1] ** 2 - sigma**2, 0))
            source = a[i + 1] * POINTS + rest * consistent + sigma * noise[i + 1]
            target = a[i + 1] * clean + rest * (e_target - e_source + consistent) + sigma * noise[i + 1]
    return clean


@pytest.mark.parametrize(
    ("steps", "scale", "source_scale", "eta"), [(1, 2.3, 1, 1), (5, 2.3, 1, 1), (5, 1, 1, 1), (6, 3, 2, 0.4)]
)
def test_virtual_inversion_is_the_box_of_the_paper(infedit, steps, scale, source_scale, eta):
    times, noise = editing.consistency_times(SCHEDULE, steps), drawn(steps)
    options = {"times": times, "noise": noise, "scale": scale, "source_scale": source_scale, "eta": eta}
    found = infedit.virtual_inversion(bent, POINTS, SCHEDULE, source=BRIGHT, target=DIM, **options)
    assert torch.allclose(found, by_hand(times, noise, scale=scale, source_scale=source_scale, eta=eta), atol=1e-9)
    assert (found - POINTS).abs().max() > 0.01


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_same_caption_gives_the_picture_back(infedit, steps):
    times, noise = editing.consistency_times(SCHEDULE, steps), drawn(steps, seed=steps)
    options = {"source": DIM, "target": DIM, "times": times, "noise": noise, "scale": 7.0, "source_scale": 7.0}
    assert torch.allclose(infedit.virtual_inversion(bent, POINTS, SCHEDULE, **options), POINTS, atol=1e-9)


@pytest.mark.parametrize("eta", [1.0, 0.3])
def test_cycle_diffusion_at_its_variance_is_virtual_inversion(infedit, eta):
    times, noise = editing.consistency_times(SCHEDULE, 6), drawn(6)
    options = {"source": BRIGHT, "target": DIM, "times": times, "noise": noise, "scale": 2.0}
    replayed = editing.cycle_diffusion(
        bent, POINTS, SCHEDULE, **options, variance=lambda t, s: eta * SCHEDULE.noise(s) ** 2
    )
    found = infedit.virtual_inversion(bent, POINTS, SCHEDULE, **options, eta=eta)
    assert torch.allclose(found, replayed, atol=1e-9)


def test_the_callback_sees_what_each_branch_stands_for(infedit):
    seen, times, noise = [], editing.consistency_times(SCHEDULE, 3), drawn(3)
    options = {"source": BRIGHT, "target": DIM, "times": times, "noise": noise}
    found = infedit.virtual_inversion(
        bent, POINTS, SCHEDULE, **options, callback=lambda i, t, clean: seen.append((i, t, clean))
    )
    assert [(i, t) for i, t, _ in seen] == list(enumerate(times))
    assert all(torch.allclose(clean["source"], POINTS, atol=1e-9) for _, _, clean in seen)
    assert torch.equal(seen[-1][2]["target"], found)


def common_length(one, other):
    """Length of the longest common subsequence, by trying all."""
    return max(
        k for k in range(min(len(one), len(other)) + 1)
        if {tuple(c) for c in combinations(one, k)} & {tuple(c) for c in combinations(other, k)}
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
def test_alignment_is_a_longest_common_subsequence(infedit, seed):
    random = np.random.default_rng(seed)
    source, target = random.integers(4, size=random.integers(1, 8)), random.integers(4, size=random.integers(1, 8))
    partner = infedit.align(source.tolist(), target.tolist())
    pairs = [(i, j) for j, i in enumerate(partner) if i >= 0]
    assert all(source[i] == target[j] for i, j in pairs)
    assert pairs == sorted(pairs)
    assert len({i for i, _ in pairs}) == len(pairs) == common_length(source.tolist(), target.tolist())


def test_a_replaced_word_has_no_partner(infedit):
    assert infedit.align(BRIGHT[0].tolist(), DIM[0].tolist()) == [0, -1, *range(2, 9)]


def control(infedit, share, branches=("source", "target", "mutual"), **options):
    """Attention control of two canvases for tests of its rules, at a share of the steps."""
    found = infedit.UnifiedAttention(None, BRIGHT[:2], DIM[:2], branches=branches, **options)
    found.begin(share)
    return found


def heads(seed, rows, tokens=3):
    return torch.randn(rows, 2, 1, 5, tokens, generator=torch.Generator().manual_seed(seed))


ROWS = ["source", "target", "mutual", "null"]


def test_rigid_self_attention_takes_layout_from_the_source(infedit):
    q, k, v = (heads(seed, 4) for seed in range(3))
    new_q, new_k, new_v = control(infedit, 0.5, self_replace=0.7).share_self(q, k, v, ROWS)
    for row in range(4):
        assert torch.equal(new_q[row], q[0])
        assert torch.equal(new_k[row], k[0])
        assert torch.equal(new_v[row], v[0 if row == 2 else row])


def test_free_self_attention_lets_the_mutual_branch_ask_for_the_target(infedit):
    q, k, v = (heads(seed, 4) for seed in range(3))
    for share in (0.7, 0.9):
        new_q, new_k, new_v = control(infedit, share, self_replace=0.7).share_self(q, k, v, ROWS)
        for row, (of_q, of_kv) in enumerate([(0, 0), (1, 1), (1, 0), (3, 3)]):
            assert torch.equal(new_q[row], q[of_q])
            assert torch.equal(new_k[row], k[of_kv])
            assert torch.equal(new_v[row], v[of_kv])


@pytest.mark.parametrize(("share", "shared"), [(0.6, True), (0.7, True), (0.71, False)])
def test_cross_attention_is_shared_word_by_word(infedit, share, shared):
    maps = heads(5, 4, tokens=9)
    found = control(infedit, share, cross_replace=0.7).share_cross(maps, ROWS)
    assert all(torch.equal(found[row], maps[row]) for row in (0, 2, 3))
    assert torch.equal(found[1][..., 1], maps[1][..., 1])  # the new word
    old = maps[0 if shared else 1]
    assert torch.equal(found[1][..., 2:], old[..., 2:])
    assert torch.equal(found[1][..., :1], old[..., :1])


@pytest.mark.parametrize(("signal", "bound"), [(0.9, 0.55), (0.2, 0.75), (0.1, 1.5)])
def test_the_blend_shows_the_target_where_its_new_words_look(infedit, signal, bound):
    words, kept = torch.zeros(2, 9, dtype=torch.bool), torch.zeros(2, 9, dtype=torch.bool)
    words[:, 1], kept[:, 7] = True, True
    shared = control(infedit, 0.5, words=words)
    draw = torch.Generator().manual_seed(0)
    shared.maps = [torch.rand(3, 2, 32, 9, generator=draw), torch.rand(3, 2, 128, 9, generator=draw)]

    def light(row, token):
        parts = [m[row, :, :, token].reshape(2, 1, *((4, 8) if m.shape[2] == 32 else (8, 16))) for m in shared.maps]
        total = sum(torch.nn.functional.interpolate(part, (32, 64), mode="bilinear") for part in parts)
        return total / total.flatten(1).max(1).values[:, None, None, None]

    z = {name: torch.full((2, 1, 32, 64), float(i)) for i, name in enumerate(("source", "target", "mutual"))}
    expected = torch.where(light(1, 1) > bound, 1.0, 2.0)
    assert torch.equal(shared.blend(z, signal)["target"], expected)
    assert torch.equal(shared.mask, light(1, 1) > bound)
    shared.kept = kept
    assert torch.equal(shared.blend(z, signal)["target"], torch.where(light(0, 7) > 0.6, 0.0, expected))
    shared.words = shared.kept = None
    assert torch.equal(shared.blend(z, signal)["target"], z["target"])


# -- the library ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def beta():
    """Stable Diffusion's noise rates; a fixture, so that mutations of the method need not repeat what takes it."""
    return {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.fixture(scope="module")
def pool():
    return canvas.Canvases("test")


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return canvas.CanvasUNet().eval().requires_grad_(False)


def test_attention_without_a_rule_is_that_of_diffusers(infedit, network, pool):
    eps = canvas.eps_model(network, SCHEDULE)
    x, numbers = pool.draw(2, torch.Generator().manual_seed(0))
    pair, captions = torch.cat([x, x]), torch.cat([numbers, numbers.flip(0)])
    plain = eps(pair, 0.5, captions)
    options = {"branches": ("source", "target"), "self_replace": 0.0, "cross_replace": 0.0}
    with infedit.UnifiedAttention(network.unet, numbers, numbers.flip(0), **options) as shared:
        shared.begin(0.5)
        assert torch.allclose(eps(pair, 0.5, captions), plain, atol=1e-5)
        assert {maps.shape[2] for maps in shared.maps} == {128, 32}
        shared.self_replace = 1.0
        assert (eps(pair, 0.5, captions) - plain)[2:].abs().max() > 1e-4
    assert torch.equal(eps(pair, 0.5, captions), plain)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 12, 25, 50])
def test_times_of_consistency_models_are_those_of_diffusers(steps):
    theirs = diffusers.LCMScheduler()
    theirs.set_timesteps(steps)
    assert 1000 * editing.consistency_times(SCHEDULE, steps) - 1 == pytest.approx(theirs.timesteps.numpy())
    with pytest.raises(ValueError, match="1 to 50"):
        editing.consistency_times(SCHEDULE, 51)


@pytest.mark.parametrize("steps", [10, 50])
def test_inversion_is_that_of_diffusers(beta, steps):
    peer, z = diffusers.DDIMInverseScheduler(**beta, clip_sample=False, timestep_spacing="trailing"), POINTS
    peer.set_timesteps(steps)
    for level in peer.timesteps.tolist():
        z = peer.step(bent(z, (level + 1) / 1000, BRIGHT), level, z).prev_sample
    found = editing.invert(bent, POINTS, SCHEDULE, source=BRIGHT, times=editing.even_times(SCHEDULE, steps))
    assert torch.allclose(found, z, atol=1e-4)


@pytest.mark.parametrize("steps", [10, 50])
def test_regeneration_is_ddim_of_diffusers(beta, steps):
    peer = diffusers.DDIMScheduler(**beta, clip_sample=False, timestep_spacing="trailing")
    peer.set_timesteps(steps)
    z = x = drawn(1)[0]
    for level in peer.timesteps.tolist():
        t = (level + 1) / 1000
        null, captioned = bent(x, t, canvas.null_tokens(4)), bent(x, t, DIM)
        x = peer.step(null + 2.0 * (captioned - null), level, x).prev_sample
    options = {"source": BRIGHT, "target": DIM, "times": editing.even_times(SCHEDULE, steps), "scale": 2.0}
    assert torch.allclose(editing.regenerate(bent, z, SCHEDULE, **options), x, atol=1e-4)


def test_sdedit_starts_where_its_strength_says():
    asked = []
    model = lambda x, t, numbers: asked.append((t, x)) or bent(x, t, numbers)  # noqa: E731
    times, noise = editing.even_times(SCHEDULE, 10), drawn(1)[0]
    options = {"source": BRIGHT, "target": DIM, "times": times, "noise": noise, "scale": 1.0}
    editing.sdedit(model, POINTS, SCHEDULE, strength=0.4, **options)
    assert [t for t, _ in asked] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert torch.allclose(asked[0][1], SCHEDULE.signal(0.4) * POINTS + SCHEDULE.noise(0.4) * noise)


def test_guidance_asks_for_the_blank_caption_only_where_it_is_needed():
    counted = editing.Evaluations(bent)
    states, captions = {"source": POINTS, "target": POINTS + 1}, {"source": BRIGHT, "target": DIM}
    found = editing.guided_noise(counted, states, 0.5, captions, {"source": 1.0, "target": 3.0})
    assert counted.count == 12
    null = bent(POINTS + 1, 0.5, canvas.null_tokens(4))
    assert torch.allclose(found["target"], null + 3 * (bent(POINTS + 1, 0.5, DIM) - null))
    assert torch.allclose(found["source"], bent(POINTS, 0.5, BRIGHT))


def test_captions_are_read_and_written():
    text = "dim mirrored ankle boot and bright plain T-shirt"
    assert canvas.caption(canvas.tokens(text)) == text
    for wrong in ("dim ankle boot and bright plain T-shirt", "plain dim bag and bright plain bag", ""):
        with pytest.raises(ValueError, match="is no caption"):
            canvas.tokens(wrong)


def test_canvases_show_what_their_captions_say(pool):
    x, numbers = pool.draw(12, torch.Generator().manual_seed(0))
    assert x.shape == (12, 1, 32, 64)
    again, _ = pool.draw(12, torch.Generator().manual_seed(0))
    assert torch.equal(x, again)
    for i in range(12):
        words = numbers[i].tolist()
        for side, place in enumerate((1, 5)):
            item = (x[i, 0, :, 32 * side : 32 * side + 32] + 1) / (canvas.DIM if words[place] == 5 else 1.0) - 1
            item = item.flip(1) if words[place + 1] == 7 else item
            same = (pool.items[:, 0] - item).abs().amax((1, 2)) < 1e-5
            assert (pool.labels[same] == words[place + 2] - 8).any()


@pytest.fixture(scope="module")
def judge():
    return canvas.Judge(images.load_classifier())


def test_judges_read_real_canvases(judge, pool):
    x, numbers = pool.draw(400, torch.Generator().manual_seed(1))
    for side in (0, 1):
        sides = torch.full((400,), side)
        right = judge(canvas.half(x, sides), canvas.item_words(numbers, sides))
        assert right["class"].mean() > 0.9
        assert right["bright"].mean() > 0.98
        assert right["mirrored"].mean() > 0.98
        wrong = canvas.item_words(numbers, sides)
        wrong[:, 0] = 9 - wrong[:, 0]
        assert judge(canvas.half(x, sides), wrong)["bright"].mean() < 0.02


def test_edits_change_one_word_and_are_scored(judge, pool):
    edits = editing.draw_edits(9, pool, judge, torch.Generator().manual_seed(2))
    assert ((edits.source != edits.target).sum(1) == 1).all()
    places = (edits.source != edits.target).int().argmax(1)
    for i, kind in enumerate(("class", "brightness", "direction") * 3):
        assert edits.kind[i] == kind
        assert places[i] == editing.KINDS[kind][edits.side[i]]
    turned = edits[edits.kind == "direction"]
    assert len(turned) == 3
    assert torch.isin(canvas.item_words(turned.source, turned.side)[:, 2] - 8, torch.tensor(canvas.SHOES)).all()
    still = editing.score(edits, edits.x, judge)
    assert (still.right == 0).all()
    assert (still.psnr == 60).all()
    assert still.ssim.to_numpy() == pytest.approx(1)
    assert still.structure.to_numpy() == pytest.approx(0)
    mirror = turned.x.clone()
    for i, side in enumerate(turned.side.tolist()):
        mirror[i, :, :, 32 * side : 32 * side + 32] = mirror[i, :, :, 32 * side : 32 * side + 32].flip(2)
    right = editing.score(turned, mirror, judge)
    assert (right.right == 100).all()
    assert (right.psnr == 60).all()
    noisy = editing.score(edits, edits.x + 0.2, judge)
    assert (noisy.psnr < 25).all()


def test_structural_similarity_of_windows_by_hand():
    one, other = torch.rand(2, 3, 1, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a, b = (x.flatten(1).numpy() for x in (one, other))
    mean, spread = a.mean(1) * b.mean(1), a.var(1) + b.var(1)
    shared = (a * b).mean(1) - mean
    top = (2 * mean + 0.0004) * (2 * shared + 0.0036)
    bottom = (a.mean(1) ** 2 + b.mean(1) ** 2 + 0.0004) * (spread + 0.0036)
    assert images.ssim(one, other) == pytest.approx(top / bottom)


def test_the_schedule_is_that_of_stable_diffusion(beta):
    theirs = diffusers.DDPMScheduler(**beta).alphas_cumprod.numpy()
    assert np.exp(SCHEDULE.log_alpha_bar(np.arange(1, 1001) / 1000)) == pytest.approx(theirs, rel=1e-5)


MUTATIONS = [
    ('e[b] - e["source"] + consistent', 'e[b] + e["source"] - consistent'),
    ('(z["source"] - signal[i] * x) / sigma[i]', '(z["target"] - signal[i] * x) / sigma[i]'),
    ("(z[b] - sigma[i] * e[b]) / signal[i]", "(z[b] + sigma[i] * e[b]) / signal[i]"),
    ("(1 - eta) ** 0.5", "(1 - eta)"),
    ("fresh * noise[i + 1]", "fresh * noise[i]"),
    ("scale if branch ==", "source_scale if branch =="),
    ('return clean["target"]', 'return z["target"]'),
    ("source[i] == target[j] else -1", "source[i] == target[j] else 1"),
    ("self.share < self.self_replace", "self.share > self.self_replace"),
    ("q[source if rigid else target], k[source], v[source]", "q[source if rigid else target], k[target], v[source]"),
    ("q[row], k[row] = q[source], k[source]", "q[row], k[row] = q[source], k[target]"),
    ("self.share > self.cross_replace", "self.share < self.cross_replace"),
    ("source.gather(-1", "target.gather(-1"),
    ("0.15 / signal", "0.15 * signal"),
    ('z["target"], z["mutual"])', 'z["mutual"], z["target"])'),
    ("self.highlight(0, self.kept)", "self.highlight(1, self.kept)"),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught("diffusion/infedit", old, new, tmp_path, monkeypatch)
