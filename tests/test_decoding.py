"""The lean Llama, its caches and the shared draft–verify loop, against transformers and against exact laws."""

import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from workbook import decoding, paths, verifiers
from workbook.acceptance import linear_program_acceptance, recursive_acceptance
from workbook.chance import Chance, ToyModel, enumerate_outcomes
from workbook.models import lm
from workbook.models.lm import Llama


def tiny(seed: int, vocabulary: int = 23) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def models():
    return tiny(0), tiny(1)


@pytest.fixture(scope="module")
def lean(models):
    return tuple(Llama.from_transformers(model) for model in models)


def test_lean_forward_equals_transformers(models, lean):
    tokens = torch.randint(23, (3, 11), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        reference = models[0](tokens).logits
    cache = lean[0].cache(3, 11)
    parts = [lean[0](tokens[:, :4], cache), lean[0](tokens[:, 4:5], cache), lean[0](tokens[:, 5:], cache)]
    torch.testing.assert_close(torch.cat(parts, 1), reference, rtol=1e-4, atol=1e-4)


def test_tree_pass_equals_separate_rows(models, lean):
    prompt, rows = [1, 2, 3, 4, 5], np.array([[6, 7, 8], [6, 7, 9], [10, 11, 12]])
    cache = lean[0].cache(1, 20)
    lean[0].hidden(torch.tensor([prompt[:-1]]), cache)
    nodes, parents, along = decoding._prefix_tree(rows)
    assert len(nodes) == 7, "two rows share two nodes"
    logits = decoding._score_tree(lean[0], cache, prompt[-1], nodes, parents)
    for row, path in zip(rows, along, strict=True):
        with torch.inference_mode():
            reference = models[0](torch.tensor([prompt + row.tolist()])).logits[0, 4:]
        np.testing.assert_allclose(logits[[0, *path]], reference, rtol=1e-4, atol=1e-4)


def test_cache_keeps_an_accepted_branch_without_recomputing(models, lean):
    prompt, rows = [1, 2, 3, 4, 5], np.array([[6, 7, 8], [10, 11, 12]])
    cache = lean[0].cache(1, 20)
    lean[0].hidden(torch.tensor([prompt[:-1]]), cache)
    nodes, parents, along = decoding._prefix_tree(rows)
    decoding._score_tree(lean[0], cache, prompt[-1], nodes, parents)
    cache.keep(4, [4, *(4 + node for node in along[1][:2])])
    logits = lean[0](torch.tensor([[13]]), cache)[0, -1]
    with torch.inference_mode():
        reference = models[0](torch.tensor([[*prompt, 10, 11, 13]])).logits[0, -1]
    torch.testing.assert_close(logits, reference, rtol=1e-4, atol=1e-4)


def test_cache_refuses_what_it_cannot_hold(lean):
    cache = lean[0].cache(1, 4)
    with pytest.raises(ValueError, match="holds 4 positions, 5 are needed"):
        lean[0](torch.zeros((1, 5), dtype=torch.long), cache)
    with pytest.raises(ValueError, match="cannot crop"):
        cache.crop(1)


VERIFIERS = [
    (verifiers.token_verification, 1),
    (verifiers.block_verification, 1),
    (verifiers.recursive_rejection, 2),
    (verifiers.recursive_rejection, 3),
]


@pytest.mark.parametrize(("verifier", "drafts"), VERIFIERS)
@pytest.mark.parametrize("length", [1, 2])
def test_every_verifier_keeps_the_targets_law(verifier, drafts, length):
    target, draft = ToyModel(3), ToyModel(4)
    law = verifiers.exact_law(verifier, target, draft, drafts=drafts, length=length, tokens=3)
    np.testing.assert_allclose(law, target.law(3), atol=1e-12)


def test_block_verification_accepts_at_least_as_many_tokens_as_token_verification():
    def expected_length(verifier, seed):
        target, draft = ToyModel(seed), ToyModel(seed + 100)

        def step(chance):
            rows = np.zeros((1, 3), dtype=int)
            for i in range(3):
                rows[0, i] = chance.draw(draft(rows[0, :i]))
            laws = [lambda r, i, m=m: m(rows[r, :i]) for m in (draft, target)]
            return len(verifier(verifiers.Drafts(rows, *laws), chance).tokens)

        return sum(p * n for p, n in enumerate_outcomes(step))

    gains = [
        expected_length(verifiers.block_verification, s) - expected_length(verifiers.token_verification, s)
        for s in range(6)
    ]
    assert min(gains) > -1e-12
    assert max(gains) > 1e-3


def test_loop_follows_the_targets_law(lean):
    """The real loop on real (tiny) models: law of the second new token over 3,000 runs, against the exact one."""
    target, draft = lean
    prompt = [1, 2, 3]
    cache = target.cache(23, 6)
    first = decoding.probabilities(target(torch.tensor([prompt]), target.cache(1, 3), last=True)[0, 0])
    tokens = torch.cat([torch.tensor([prompt]).expand(23, -1), torch.arange(23)[:, None]], 1)
    second = first @ decoding.probabilities(target(tokens, cache, last=True)[:, 0])
    counts = np.zeros(23)
    for seed in range(3000):
        trace = decoding.decode(
            target, draft, prompt, verifier=verifiers.recursive_rejection, drafts=2, length=2, new_tokens=2,
            chance=Chance(seed),
        )  # fmt: skip
        counts[trace.tokens[1]] += 1
    deviation = ((counts - 3000 * second) ** 2 / (3000 * second)).sum()
    assert deviation < 60, f"chi-square {deviation:.1f} with 22 degrees of freedom"


def test_equal_models_emit_every_draft(lean):
    trace = decoding.decode(
        lean[0], lean[0], [1, 2, 3], verifier=verifiers.token_verification, drafts=1, length=3, new_tokens=12,
        chance=Chance(0),
    )  # fmt: skip
    assert trace.emitted == [4, 4, 4]
    assert len(trace.tokens) == 12
    assert trace.draft_calls == 9


def test_restricted_draft_vocabulary_names_target_tokens(models, lean):
    kept = np.array([4, 8, 15, 16, 22])
    head = models[1].lm_head.weight.detach()[torch.from_numpy(kept)]
    draft = Llama.from_transformers(models[1], head=head, vocabulary=kept)
    seen = []
    decoding.decode(
        lean[0], draft, [1, 2, 3], verifier=verifiers.token_verification, drafts=1, length=2, new_tokens=8,
        chance=Chance(0), callback=lambda drafts, _: seen.append(drafts),
    )  # fmt: skip
    assert all(np.isin(drafts.tokens, kept).all() for drafts in seen)
    law = seen[0].draft(0, 0)
    assert law.shape == (23,)
    assert law.sum() == pytest.approx(1)
    assert np.flatnonzero(law).tolist() == kept.tolist()


def test_nucleus_keeps_the_fewest_tokens_that_reach_the_mass():
    p = decoding.probabilities(np.log([[0.5, 0.3, 0.15, 0.05]]), top_p=0.75)
    np.testing.assert_allclose(p, [[0.625, 0.375, 0, 0]], atol=1e-12)


def test_greedy_temperature_is_refused():
    with pytest.raises(ValueError, match="temperature = 0"):
        decoding.probabilities(np.zeros(3), temperature=0)


def test_recursive_rejection_never_beats_the_plan():
    rng = np.random.default_rng(0)
    for _ in range(5):
        t, d = rng.dirichlet(np.ones(4), 2)
        assert recursive_acceptance(t, d, 2) <= linear_program_acceptance(t, d, 2) + 1e-9


def test_weights_wanted_by_several_at_once_are_made_once_and_whole(tmp_path, monkeypatch):
    made = []

    def slowly(folder):
        made.append(folder)
        partial = folder.with_name("partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            time.sleep(0.02)
            (partial / name).touch()
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)

    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setattr(lm, "_dequantise", slowly)
    (tmp_path / lm.SMOLLM2).mkdir()  # what an interrupted copy leaves behind is not taken for the model
    (tmp_path / lm.SMOLLM2 / "tokenizer.json").touch()
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lm.model_folder, [lm.SMOLLM2] * 4))
    assert folders == {str(tmp_path / lm.SMOLLM2)}
    assert len(made) == 1
    assert lm.model_folder("another/model") == "another/model"
