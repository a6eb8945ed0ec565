"""The method cells of decoding/zipvl, its cache and its model against loops, dense attention and transformers."""

import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from test_mutations import fails, mutate

from workbook import longprompt, notebook
from workbook.kvcache import MixedCache, pack, unpack
from workbook.models import vlm
from workbook.models.lm import Llama

zipvl = notebook.load_method("decoding/zipvl")


def heads(seed=0, n=40, d=8, query=4, kv=2):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(h, n, d, generator=draw, dtype=torch.float64) for h in (query, kv, kv)]


def full_map(q, k):
    """The causal attention map averaged over heads, (n, n)."""
    logits = torch.einsum("hid,hjd->hij", q, k.repeat_interleave(len(q) // len(k), 0)) / q.shape[-1] ** 0.5
    future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


@dataclass
class Toy:
    """A small random vision-language model, an image, and the final states that transformers gives."""

    lean: Llama
    x: torch.Tensor
    states: torch.Tensor


@pytest.fixture(scope="module")
def toy():
    return make_toy()


def make_toy():
    torch.manual_seed(0)
    model = vlm.MosaicVLM(width=32, layers=3, heads=2).eval().requires_grad_(False)
    x = model.image_tokens(torch.randn(2, 2, 2, vlm.TILE, vlm.CHANNELS))
    return Toy(
        Llama.from_transformers(model.llama), x, model.llama.model(inputs_embeds=x, use_cache=False).last_hidden_state
    )


# -- the choice of tokens ---------------------------------------------------------------------------------------------


def test_probes_are_the_newest_and_some_others():
    rows = zipvl.probe_rows(100, torch.Generator().manual_seed(3))
    assert len(rows) == 10
    assert rows.tolist() == sorted({*rows.tolist()})
    assert rows[-5:].tolist() == [95, 96, 97, 98, 99]
    assert torch.equal(rows, zipvl.probe_rows(100, torch.Generator().manual_seed(3)))
    assert zipvl.probe_rows(7, torch.Generator(), recent=1.0, random=0.0).tolist() == [*range(7)]


@pytest.mark.parametrize("block", [1, 3, 64])
def test_accumulated_scores_are_column_sums_of_the_full_map(block):
    q, k, _ = heads()
    rows = zipvl.probe_rows(40, torch.Generator().manual_seed(0), recent=0.2, random=0.2)
    scores = zipvl.accumulated_scores(q[:, rows], k, rows, block=block)
    torch.testing.assert_close(scores, full_map(q, k).mean(0)[rows].sum(0), rtol=0, atol=1e-12)
    assert float(scores.sum()) == pytest.approx(len(rows))


@pytest.mark.parametrize("tau", [0.3, 0.8, 0.975])
def test_the_count_is_the_least_that_holds_tau(tau):
    q, k, _ = heads(seed=1)
    rows = torch.arange(40)
    scores = full_map(q, k).mean(0).sum(0)
    kept = zipvl.important_tokens(scores, rows, tau, anchors=0)
    ordered = scores.sort(descending=True).values
    assert ordered[: len(kept)].sum() >= tau * scores.sum() > ordered[: len(kept) - 1].sum()
    assert kept.tolist() == sorted(kept.tolist())


def test_the_choice_is_free_of_the_causal_bias():
    sums = torch.tensor([3.2, 0.7, 0.7, 0.7, 0.5, 0.2])
    kept = zipvl.important_tokens(sums, torch.arange(6), 0.8, anchors=0)
    assert kept.tolist() == [0, 3, 4, 5]  # four by accumulated scores; 0, 1, 2, 3 would be the biased choice
    sums = torch.tensor([3.2, 0.8, 0.7, 0.7, 0.5, 0.1])
    probed = zipvl.important_tokens(sums, torch.tensor([2, 5]), 0.8, anchors=0)
    assert probed.tolist() == [0, 1, 3, 4]  # seen by 2, 2, 2, 1, 1 and 1 probes


def test_anchors_and_fixed_counts():
    scores = torch.tensor([0.01, 5.0, 4.0, 3.0, 0.01])
    assert zipvl.important_tokens(scores, torch.arange(5), 1.0, count=3).tolist() == [0, 3, 4]
    assert len(zipvl.important_tokens(scores, torch.arange(5), 1.0)) == 5
    assert zipvl.important_tokens(scores, torch.arange(5), 1.0, count=3, anchors=2).tolist() == [0, 3, 4]
    assert zipvl.important_tokens(scores, torch.arange(5), 0.1, anchors=3).tolist() == [0, 2, 3, 4]
    assert zipvl.important_tokens(scores, torch.arange(5), 1.0, count=3, anchors=0).tolist() == [1, 2, 3]


# -- attention --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("all_queries", [False, True])
def test_sparse_attention_is_the_masked_softmax(all_queries):
    q, k, v = heads(seed=2)
    kept = torch.tensor([0, 2, 3, 17, 30, 39])
    logits = torch.einsum("hid,hjd->hij", q, k.repeat_interleave(2, 0)) / 8**0.5
    seen = torch.ones(40, 40, dtype=torch.bool).tril() & torch.isin(torch.arange(40), kept)
    expected = logits.masked_fill(~seen, -torch.inf).softmax(-1) @ v.repeat_interleave(2, 0)
    found = zipvl.sparse_attention(q, k, v, kept, all_queries=all_queries)
    rows = slice(None) if all_queries else kept
    torch.testing.assert_close(found[:, rows], expected[:, rows], rtol=0, atol=1e-12)
    if not all_queries:
        others = torch.tensor([i for i in range(40) if i not in kept.tolist()])
        assert found[:, others].abs().max() == 0


def test_queries_that_see_no_important_token_get_zeros():
    q, k, v = heads(seed=3, n=6)
    out = zipvl.sparse_attention(q, k, v, torch.tensor([3, 5]), all_queries=True)
    assert out[:, :3].abs().max() == 0
    assert out[:, 3:].abs().min() > 0


def test_tau_one_is_the_dense_model(toy):
    found = vlm.prefill(toy.lean, toy.x, zipvl.prefill_attention(zipvl.dynamic(1.0)))
    torch.testing.assert_close(found, toy.states, rtol=0, atol=1e-4)


def test_a_small_tau_is_not(toy):
    found = vlm.prefill(toy.lean, toy.x, zipvl.prefill_attention(zipvl.dynamic(0.5)))
    assert (found - toy.states).abs().max() > 1e-2


def test_decoding_from_a_full_cache_is_one_pass(toy):
    caches = [MixedCache(3, zipvl.quantise, (16, 16)) for _ in toy.x]
    vlm.prefill(toy.lean, toy.x[:, :50], zipvl.prefill_attention(zipvl.dynamic(1.0), caches=caches))
    for at in range(50, 64, 7):
        mix = zipvl.decode_attention(caches, 0, tau=1.0)
        found = vlm.prefill(toy.lean, toy.x[:, at : at + 7], mix, start=at)
        torch.testing.assert_close(found, toy.states[:, at : at + 7], rtol=0, atol=1e-4)


def test_the_tail_is_quantised_when_it_is_full(toy):
    caches = [MixedCache(3, zipvl.quantise, (8, 8)) for _ in toy.x]
    vlm.prefill(toy.lean, toy.x[:, :40], zipvl.prefill_attention(zipvl.dynamic(1.0), caches=caches))
    mix = zipvl.decode_attention(caches, 8, tau=0.5)
    first = vlm.prefill(toy.lean, toy.x[:, 40:46], mix, start=40)
    assert caches[0].tails[0].shape[2] == 6
    vlm.prefill(toy.lean, toy.x[:, 46:48], mix, start=46)
    assert caches[0].tails[0].shape[2] == 0
    assert len(caches[0].groups[0][0][0].packed) == 40
    assert sum(len(k.packed) for k, _ in caches[0].groups[0]) == 48
    assert len(caches[0].groups[0]) == 3  # the prompt, and two groups of the tail
    torch.testing.assert_close(first, toy.states[:, 40:46], rtol=0, atol=0.05)  # eight bits are nearly exact


# -- bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_undone_and_small(bits):
    codes = torch.randint(0, 2**bits, (5, 16), generator=torch.Generator().manual_seed(bits), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 16 * bits // 8)
    assert torch.equal(unpack(packed, bits), codes)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("keys", [True, False])
def test_no_code_is_further_than_half_a_step(bits, keys):
    x = torch.randn(30, 16, generator=torch.Generator().manual_seed(1)) * torch.logspace(-1, 1, 16)
    codes = zipvl.quantise(x, bits, keys)
    scale = torch.ones(16) if keys else x.abs().amax(0).sqrt()
    scaled = x / scale
    axis = 0 if keys else 1
    step = (scaled.amax(axis, keepdim=True) - scaled.amin(axis, keepdim=True)) / (2**bits - 1)
    error = ((codes.read() - x) / scale / step).abs()
    assert 0.3 < error.max() < 0.53  # half a step, and the rounding of 16-bit parameters
    assert codes.nbytes == 30 * 16 * bits // 8 + 2 * (2 * 16 if keys else 2 * 30 + 16)


def test_channel_scales_rescue_quiet_channels():
    x = torch.randn(256, 32, generator=torch.Generator().manual_seed(0))
    x[:, 0] *= 10
    error = (zipvl.quantise(x, 2, False).read() - x)[:, 1:].norm() / x[:, 1:].norm()
    plain = (zipvl.quantise(x.T, 2, True).read().T - x)[:, 1:].norm() / x[:, 1:].norm()
    assert error < 0.7 < 1.0 < plain


def test_a_constant_matrix_survives():
    x = torch.full((4, 8), 1.5)
    for keys in (True, False):
        torch.testing.assert_close(zipvl.quantise(x, 2, keys).read(), x, rtol=1e-3, atol=1e-3)


def test_the_cache_counts_its_bytes_and_keeps_its_tokens():
    _, k, v = (t.float() for t in heads(n=20, d=16))
    kept = torch.tensor([0, 5, 6, 19])
    full, mixed, evicting = (MixedCache(1, zipvl.quantise, bits) for bits in ((16, 16), (4, 2), (16, 0)))
    for cache in (full, mixed, evicting):
        cache.append(0, k, v)
        cache.compress(0, kept)
    assert full.nbytes == 2 * 2 * 20 * 32
    torch.testing.assert_close(full.read(0), torch.stack([k, v]))
    torch.testing.assert_close(evicting.read(0), torch.stack([k, v])[:, :, kept])
    codes = 2 * (4 * 32 * 4 + 16 * 32 * 2) // 8
    parameters = 2 * 2 * (2 * 32) + 2 * (2 * 4 + 32) + 2 * (2 * 16 + 32)  # keys by channel; values by token, and scales
    assert mixed.nbytes == codes + parameters
    order = torch.cat([kept, torch.tensor([i for i in range(20) if i not in kept.tolist()])])
    apart = (mixed.read(0) - torch.stack([k, v])[:, :, order]).abs().amax((0, 1, 3))
    assert apart[:4].max() < 0.5 < apart[4:].max()


# -- peers, bill and model --------------------------------------------------------------------------------------------


def test_the_bill_counts_pairs():
    n, kept, rows = 9, 4, [2, 8]
    pairs = sum(1 for i in range(kept) for j in range(i + 1))
    looks = sum(1 for row in rows for j in range(row + 1))
    assert longprompt.attention_work(n, kept, rows) == pytest.approx((4 * pairs + 2 * looks) / (4 * 45))
    assert longprompt.attention_work(n, n) == 1


def test_fastv_keeps_words_and_the_tokens_the_last_one_looks_at():
    q, k, _ = heads(n=20)
    select = longprompt.fastv(0.5, 4)
    assert len(select(0, 0, q, k)) == len(select(1, 0, q, k)) == 20
    kept = select(2, 0, q, k)
    best = full_map(q, k).mean(0)[-1, :16].topk(6).indices
    assert {*kept.tolist()} == {*best.tolist(), 16, 17, 18, 19}
    assert torch.equal(select(5, 0, q, k), kept)


def test_questions_have_the_right_answers():
    labels = np.arange(200) % 10
    asked = vlm.ask(labels, 30, 3, 12, np.random.default_rng(0))
    for tiles, words, answers in zip(asked.tiles, asked.words, asked.answers, strict=True):
        classes = labels[tiles.numpy()]
        for (kind, one, two, mark), answer in zip(words.tolist(), answers.tolist(), strict=True):
            assert mark == vlm.ANSWER
            if kind == 0:
                expected = vlm.CLASS + classes[one - vlm.ROW, two - vlm.COLUMN]
            elif kind == 1:
                expected = vlm.NUMBER + (classes == one - vlm.CLASS).sum()
            else:
                expected = vlm.ROW + next(i for i, row in enumerate(classes) if one - vlm.CLASS in row)
            assert answer == expected
            assert vlm.WORDS[answer] in (vlm.FASHION_MNIST_CLASSES[answer - vlm.CLASS] if kind == 0 else vlm.WORDS)


def test_many_questions_at_once_are_answered_as_one_by_one():
    torch.manual_seed(0)
    model = vlm.MosaicVLM(width=32, layers=2, heads=2).eval().requires_grad_(False)
    asked = vlm.ask(np.arange(50) % 10, 2, 2, 5, np.random.default_rng(1))
    shown = torch.randn(50, vlm.TILE, vlm.CHANNELS)
    together = model(shown[asked.tiles], asked.words)
    lean = Llama.from_transformers(model.llama)
    for number in range(5):
        x = model.prompts(shown[asked.tiles], asked.words[:, number])
        alone = lean.logits(vlm.prefill(lean, x, longprompt.dense)[:, -1])
        torch.testing.assert_close(alone, together[:, number], rtol=0, atol=1e-4)


MUTATIONS = [
    ("at[:, None], -torch.inf", "at[:, None] + 1, -torch.inf"),
    ("keys[:, :end].mT * d**-0.5", "keys[:, :end].mT * d**0.5"),
    ("return total / heads", "return total"),
    ("tau * mass[-1])) + 1", "tau * mass[-1])) + 2"),
    ("normalised = scores / watchers", "normalised = scores"),
    ("watchers = len(rows) - torch", "watchers = len(rows) + torch"),
    ("range(n - anchors, n)", "range(n - anchors, n - 1)"),
    ("out[:, kept] = F.scaled", "out[:, : len(kept)] = F.scaled"),
    ("/ (2**bits - 1)).half()", "/ 2**bits).half()"),
    ("x = x if keys else x / scale.float()", "x = x"),
    ("keys.shape[1] >= every", "keys.shape[1] > every"),
    ("cache.compress(layer, important_tokens(scores, last, tau))", "cache.tails[layer] = cache.tails[layer][:, :, :0]"),
]


@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "zipvl", mutate("decoding/zipvl", old, new, tmp_path, monkeypatch))
    assert any(fails(check) for check in checks(make_toy())), f"nothing noticed that {old!r} became {new!r}"


def checks(toy):
    """The tests above that judge the method, as functions without arguments."""
    yield from (lambda b=b: test_accumulated_scores_are_column_sums_of_the_full_map(b) for b in (1, 3))
    yield lambda: test_the_count_is_the_least_that_holds_tau(0.8)
    yield test_the_choice_is_free_of_the_causal_bias
    yield test_anchors_and_fixed_counts
    yield from (lambda a=a: test_sparse_attention_is_the_masked_softmax(a) for a in (False, True))
    yield from (lambda k=k: test_no_code_is_further_than_half_a_step(2, k) for k in (True, False))
    yield lambda: test_the_tail_is_quantised_when_it_is_full(toy)
