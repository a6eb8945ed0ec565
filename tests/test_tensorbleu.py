"""The method cells of decoding/tensorbleu against exact fractions, NLTK, sacrebleu and the official values."""

import logging
import math
import warnings
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import test_mutations
import torch
from nltk.translate.bleu_score import SmoothingFunction, corpus_bleu, sentence_bleu
from sacrebleu.metrics import BLEU

from workbook.notebook import load_method

tensorbleu = load_method("decoding/tensorbleu")
logging.getLogger("sacrebleu").setLevel("ERROR")
VARIANTS = ("A paper", "B compact", "C row sort")
WEIGHTS = (0.25,) * 4

# An empty candidate, one shorter than four tokens, no overlap, two references as near, a repeated token, two equal
# sentences, and a token 0 inside: (candidate, references).
EDGES = [
    ([], [[1, 2]]),
    ([1, 2, 3], [[1, 2, 3, 4, 5, 6, 7, 8]]),
    ([1, 2, 3, 4], [[5, 6, 7, 8]]),
    ([1, 2, 3, 4, 5, 6, 7], [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5]]),
    ([1, 1, 1, 1, 1, 1, 1], [[1, 2, 3, 4, 1, 5], [1, 1, 2]]),
    ([3, 1, 4, 1, 5, 9], [[3, 1, 4, 1, 5, 9]]),
    ([5, 6, 0, 7, 8, 9, 4], [[0, 5, 6, 0, 0, 7, 8, 9, 4]]),
]


# The official function pads with 0, which here also stands inside a candidate; ties, short and empty ones among them.
CANDIDATES = torch.tensor(
    [[1, 2, 3, 4, 5, 0, 0], [1, 2, 3, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7], [1] * 7, [1, 2, 0, 3, 4, 5, 0], [0] * 7,
     [5, 6, 7, 8, 0, 0, 0]]
)  # fmt: skip
REFERENCES = torch.tensor(
    [
        [[1, 2, 3, 4, 6, 0, 0, 0, 0], [1, 2, 9, 4, 5, 0, 0, 0, 0]],
        [[1, 2, 3, 4, 5, 6, 7, 8, 0], [3, 3, 3, 0, 0, 0, 0, 0, 0]],
        [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 4, 5, 0, 0, 0, 0]],
        [[1, 2, 3, 4, 1, 5, 0, 0, 0], [1, 1, 2, 0, 0, 0, 0, 0, 0]],
        [[1, 2, 3, 4, 5, 0, 0, 0, 0], [9, 9, 9, 0, 0, 0, 0, 0, 0]],
        [[1, 2, 0, 0, 0, 0, 0, 0, 0], [3, 0, 0, 0, 0, 0, 0, 0, 0]],
        [[1, 2, 3, 4, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0, 0]],
    ]
)
OFFICIAL = {
    "none": [0.7598357, 0.0009999999, 0.7514773, 4.67138e-07, 0.0009999999, 0, 9.999997e-13],
    "floor": [0.7598357, 0.5623413, 0.7514773, 0.06985343, 0.5623413, 0, 0.04518009],
    "add-k": [0.8408964, 1, 0.7514773, 0.2444615, 1, 0, 0.3021375],
    "exp": [0.7598357, 0.001189207, 0.7514773, 6.606331e-07, 0.001189207, 0, 2e-12],
}


def random_pairs(refs, count=40, vocabulary=5, longest=12):
    """Pairs (candidate, references) of lists over a few tokens, with lengths from 0."""
    rng = np.random.default_rng(refs)

    def draw():
        return rng.integers(0, vocabulary, rng.integers(0, longest + 1)).tolist()

    return [(draw(), [draw() for _ in range(refs)]) for _ in range(count)]


def padded(pairs, seed=0):
    """The pairs as a batch with lengths; behind an end stands anything, and a missing reference repeats the first."""
    rng, most = np.random.default_rng(seed), max(len(refs) for _, refs in pairs)
    filled = [(c, [*refs, *[refs[0]] * (most - len(refs))]) for c, refs in pairs]
    width = max(len(ids) for c, refs in filled for ids in (c, *refs))

    def fill(ids):
        return [*ids, *rng.integers(0, 9, width - len(ids)).tolist()]

    candidates, references = ([fill(c) for c, _ in filled], [[fill(r) for r in refs] for _, refs in filled])
    lengths = [len(c) for c, _ in filled], [[len(r) for r in refs] for _, refs in filled]
    return torch.tensor(candidates), torch.tensor(references), tuple(torch.tensor(n) for n in lengths)


def masks(batch):
    return [torch.arange(x.shape[-1]) < n[..., None] for x, n in zip(batch[:2], batch[2], strict=True)]


def ngrams(ids, n):
    return Counter(tuple(ids[i : i + n]) for i in range(len(ids) - n + 1))


def counted(candidate, references, n):
    """(matched, total) of order n, from dictionaries."""
    own, best = ngrams(candidate, n), Counter()
    for reference in references:
        best |= ngrams(reference, n)
    return sum((own & best).values()), max(len(candidate) - n + 1, 0)


def fraction_bleu(candidate, references, epsilon=Fraction(1, 10)):
    """BLEU of one sentence with NLTK's method1, the product of precisions as an exact fraction."""
    product = Fraction(1)
    for n in range(1, 5):
        matched, total = counted(candidate, references, n)
        if n == 1 and matched == 0:
            return 0.0
        product *= (Fraction(matched) if matched else epsilon) / max(total, 1)
    c = len(candidate)
    r = min((abs(len(reference) - c), len(reference)) for reference in references)[1]
    return float(product) ** 0.25 * (1 if c >= r else math.exp(1 - r / c))


ALL = [EDGES, random_pairs(1), random_pairs(2), random_pairs(3)]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("pairs", ALL)
def test_counts_are_those_of_dictionaries(pairs, name):
    batch = padded(pairs)
    matched, total, c, _ = tensorbleu.statistics(batch[:2], masks(batch), 4, tensorbleu.COUNTS[name])
    expected = [[counted(*pair, n) for n in range(1, 5)] for pair in pairs]
    assert torch.stack([matched, total], 2).tolist() == [[list(each) for each in row] for row in expected]
    assert c.tolist() == [len(candidate) for candidate, _ in pairs]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_agree_on_many_ids_and_other_orders(name):
    rng = np.random.default_rng(3)
    references = torch.from_numpy((49_000 * rng.random((9, 3, 200)) ** 6).astype(np.int64))
    candidates = references[:, 0].where(torch.from_numpy(rng.random((9, 200)) < 0.8), references[:, 1])
    keep = [torch.from_numpy(rng.random(x.shape) < 0.95) for x in (candidates, references)]  # holes, too
    for n in (1, 2, 4):
        found = [
            tensorbleu.statistics((candidates, references), keep, n, count)[0]
            for count in (tensorbleu.COUNTS[name], tensorbleu.compact_matches)
        ]
        assert torch.equal(*found)
        assert found[0].min() > 0


@pytest.mark.parametrize("pairs", ALL)
def test_score_is_the_exact_fractions(pairs):
    expected = [fraction_bleu(*pair) for pair in pairs]
    np.testing.assert_allclose(tensorbleu.token_bleu(*padded(pairs)).numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("smoothing", ["method0", "method1", "method2", "method3"])
@pytest.mark.parametrize("weights", [WEIGHTS, (0.5, 0.3, 0.2), (1.0,)])
def test_score_is_nltks(smoothing, weights):
    rule = getattr(SmoothingFunction(), smoothing)
    for pairs in ALL:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # method0 warns of every missing order
            expected = [sentence_bleu(refs, c, weights, rule) for c, refs in pairs]
        found = tensorbleu.token_bleu(*padded(pairs), smoothing=smoothing, weights=weights)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("smoothing", ["none", "floor", "add-k", "exp"])
def test_score_is_sacrebleus(smoothing):
    metric = BLEU(tokenize="none", smooth_method=smoothing)
    for pairs in ALL:
        text = [(" ".join(map(str, c)), [" ".join(map(str, r)) for r in refs]) for c, refs in pairs]
        expected = [metric.sentence_score(c, refs).score / 100 for c, refs in text]
        np.testing.assert_allclose(
            tensorbleu.token_bleu(*padded(pairs), smoothing=smoothing).numpy(), expected, atol=1e-12
        )


def test_corpus_score_adds_counts_up_before_it_divides():
    for pairs in ALL[1:]:
        expected = corpus_bleu([refs for _, refs in pairs], [c for c, _ in pairs], WEIGHTS, SmoothingFunction().method1)
        assert float(tensorbleu.token_bleu(*padded(pairs), corpus=True)) == pytest.approx(expected, abs=1e-12)
        text = [(" ".join(map(str, c)), [" ".join(map(str, r)) for r in refs]) for c, refs in pairs]
        peer = BLEU(tokenize="none", smooth_method="floor").corpus_score(
            [c for c, _ in text], list(zip(*(refs for _, refs in text), strict=True))
        )
        found = tensorbleu.token_bleu(*padded(pairs), smoothing="floor", corpus=True)
        assert float(found) == pytest.approx(peer.score / 100, abs=1e-12)


def test_official_values():
    """Values of the official tensor_sentence_bleu (repository RxAI-dev/rxlm), run once on these batches."""
    for smoothing, expected in OFFICIAL.items():
        found = tensorbleu.official_bleu(CANDIDATES, REFERENCES, smoothing_method=smoothing)
        np.testing.assert_allclose(found.numpy(), expected, rtol=2e-6, atol=1e-20)


def test_the_answers_of_the_exercises():
    pair = padded([([1] * 7, [[1, 2, 3, 4, 1, 5]])])
    matched, total, *_ = tensorbleu.statistics(pair[:2], masks(pair))
    assert Fraction(int(matched[0, 0]), int(total[0, 0])) == Fraction(2, 7)
    score = tensorbleu.token_bleu(*padded([([1, 2, 3], [[1, 2, 3, 4, 5, 6, 7, 8]])]))
    assert float(score) == pytest.approx(math.exp(-5 / 3) * 0.1**0.25)


def test_ranks_are_those_of_numpys_unique():
    keys = torch.from_numpy(np.random.default_rng(0).integers(0, 2**40, (6, 50)) // 2**35)
    expected = [np.unique(np.r_[0, row], return_inverse=True)[1][1:] for row in keys.numpy()]
    for offset in (1, 2**33):  # keys of 32 and of 64 bits
        ranks = tensorbleu.row_ranks(torch.where(keys > 0, keys * offset, 0))
        np.testing.assert_array_equal(ranks.numpy(), expected)


def test_windows_are_whole_or_not_at_all():
    keep = torch.tensor([[True, True, False, True, True, True]])
    assert tensorbleu.windows(keep, 2).tolist() == [[True, False, False, True, True]]
    assert tensorbleu.windows(keep, 3).tolist() == [[False, False, False, True]]
    assert tensorbleu.windows(keep, 7).shape == (1, 0)


def test_bad_input_is_refused_in_one_line():
    ids, lengths = (torch.ones(2, 5, dtype=torch.int64), torch.ones(2, 1, 5, dtype=torch.int64)), (5, 5)
    ends = tuple(torch.full(shape, n) for shape, n in zip(((2,), (2, 1)), lengths, strict=True))
    with pytest.raises(ValueError, match=r"ids \(2, 5\), \(2, 0, 5\): .* R > 0 wanted"):
        tensorbleu.token_bleu(ids[0], ids[1][:, :0], (ends[0], ends[1][:, :0]))
    with pytest.raises(ValueError, match=r"\(1, 1, 5\)"):
        tensorbleu.token_bleu(ids[0], ids[1][:1], (ends[0], ends[1][:1]))
    with pytest.raises(ValueError, match="token id -3 inside a sentence"):
        tensorbleu.token_bleu(-3 * ids[0], ids[1], ends)
    with pytest.raises(ValueError, match="smoothing = 'method9': one of method0"):
        tensorbleu.token_bleu(*ids, ends, smoothing="method9")
    wide = torch.zeros(1, 20_000, dtype=torch.int64)
    with pytest.raises(ValueError, match="do not fit into 63 bits"):
        tensorbleu.statistics((wide, wide[:, None]), (wide == 0, wide[:, None] == 0))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return torch.minimum(candidate, limit)", "return torch.maximum(candidate, limit)"),
        ("limit = torch.maximum(limit, ", "limit = torch.add(limit, "),
        ("ids + row * len(unique)", "ids"),
        ("owner[ids] = row", "owner[ids] = 0 * row"),
        (" * len(vocabulary) + ", " + "),
        ("clipped = torch.minimum(candidate,", "clipped = torch.maximum(candidate,"),
        ("reduce(torch.maximum, references)", "reduce(torch.add, references)"),
        ("prefix & (2**bits - 1) > 0", "prefix & (2**bits - 1) >= 0"),
        ("rank[:, n - 1 :] * windows", "rank[:, : width - n + 1] * windows"),
        ("total.clamp(min=1) if smoothing in NLTK", "total.clamp(min=0) if smoothing in NLTK"),
        ("r.amax()).amin(1)", "r.amin()).amax(1)"),
        ("torch.exp(1 - r / c.double())", "torch.exp(r / c.double() - 1)"),
        ("0.5 ** none.cumsum(1)", "0.5 ** none"),
        ("(total[:, 1:] + k)", "(total[:, 1:])"),
        ("abs().argmin(1, keepdim=True)", "abs().argmax(1, keepdim=True)"),
        ("torch.full_like(p, 1e-12)", "torch.full_like(p, 1e-6)"),
    ],
)
def test_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    test_mutations.test_changed_sign_is_caught("decoding/tensorbleu", old, new, tmp_path, monkeypatch)
