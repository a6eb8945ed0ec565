"""The method cells of decoding/marlin against double precision, the optimal brain quantiser and least squares."""

import importlib
import itertools
import subprocess
import threading

import numpy as np
import pytest
import torch
from test_mutations import checks, fails, mutate

from workbook import graph, kernels, linears, paths, quantisation
from workbook.notebook import load_method

NAME = "decoding/marlin"
marlin = load_method(NAME)
try:
    KERNELS = [kernels.Int4Kernel(build) for build in kernels.BUILDS if kernels.runs_here(build)]
except kernels.KernelError:
    KERNELS = []
SHAPES = [(160, 384, 128), (960, 576, 64), (32, 96, 32), (96, 1152, 576)]


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(n, k, group, *, kernel=None, sparse=False):
    """An Int4Linear and its weight in double precision."""
    weight = numbers(n, k, seed=n)
    codes, scales = marlin.round_to_nearest(weight, group)
    kept = marlin.two_of_four(weight) if sparse else None
    exact = marlin.dequantise(codes, scales.double())
    return marlin.Int4Linear(codes, scales, kernel=kernel, kept=kept), exact * kept if sparse else exact


# -- the grid ----------------------------------------------------------------------------------------------------------


def test_grid_has_sixteen_levels_and_the_largest_weight_is_off_by_half_a_step():
    weight = numbers(8, 256)
    codes, scales = marlin.round_to_nearest(weight, 128)
    assert codes.min() >= 0
    assert codes.max() <= 15
    error = (marlin.dequantise(codes, scales) - weight).abs().view(8, 2, 128)
    widest = weight.abs().view(8, 2, 128).argmax(2, keepdim=True)
    # with a scale that fp16 rounds up or down by at most 2^-11
    torch.testing.assert_close(error.gather(2, widest)[..., 0] / scales, torch.full((8, 2), 0.5), atol=0.01, rtol=0)
    assert (error <= 0.51 * scales[..., None]).all()


def test_codes_follow_the_formula_of_the_paper():
    weight = np.array([[7.5, -7.5, 0.5, 1.5, -1.5, 2.4, 0.0, -3.6] * 4])
    codes, scales = marlin.round_to_nearest(torch.from_numpy(weight), 32)
    assert scales.item() == 1.0
    assert codes[0, :8].tolist() == [15, 0, 8, 10, 6, 10, 8, 4]  # clamped, and halves to even


def test_group_of_zeros_stays_zero():
    codes, scales = marlin.round_to_nearest(torch.zeros(32, 64), 32)
    assert (marlin.dequantise(codes, scales) == 0).all()


def test_bits_and_ideals():
    assert marlin.bits_per_weight(128) == 4.125
    assert marlin.bits_per_weight(128, sparse=True) == 3.125
    assert 16 / marlin.bits_per_weight(64) == pytest.approx(3.7647, abs=1e-4)
    dense, sparse = layer(64, 256, 128)[0], layer(64, 256, 128, sparse=True)[0]
    assert dense.bytes * 8 == 4.125 * 64 * 256
    assert sparse.bytes * 8 == 3.125 * 64 * 256


# -- the layout --------------------------------------------------------------------------------------------------------


def test_packing_keeps_every_code_and_the_paper_s_order():
    codes = torch.randint(0, 16, (64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    words = marlin.pack(codes)
    assert (marlin.unpack(words) == codes).all()
    word = int(words[1, 3, 5]) & 0xFFFFFFFF  # column 32 + 5, inputs 24 to 31
    expected = [int(codes[37, 24 + k]) for k in (0, 2, 4, 6, 1, 3, 5, 7)]
    assert [word >> 4 * p & 15 for p in range(8)] == expected


def test_sparse_packing_keeps_two_of_four():
    weight = numbers(64, 96)
    kept = marlin.two_of_four(weight)
    assert (kept.view(-1, 4).sum(1) == 2).all()
    fours = weight.abs().view(-1, 4)
    assert (fours[kept.view(-1, 4)].view(-1, 2).amin(1) >= fours[~kept.view(-1, 4)].view(-1, 2).amax(1)).all()
    codes, _ = marlin.round_to_nearest(weight, 32)
    assert (kernels.unpack_sparse(kernels.pack_sparse(codes, kept)) == torch.where(kept, codes, 8)).all()


def test_scales_come_back():
    scales = torch.rand(96, 3).half().float()
    assert (marlin.unpack_scales(marlin.pack_scales(scales)) == scales).all()


def test_what_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="multiples of 32"):
        marlin.pack(torch.zeros(33, 64, dtype=torch.uint8))
    with pytest.raises(ValueError, match="exactly two kept"):
        kernels.pack_sparse(torch.zeros(32, 32, dtype=torch.uint8), torch.ones(32, 32, dtype=torch.bool))


# -- the product -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_product_in_torch_is_the_exact_product(shape, sparse):
    linear, exact = layer(*shape, sparse=sparse)
    x = numbers(3, 2, shape[1])
    y = linear(x)
    assert y.shape == (3, 2, shape[0])
    torch.testing.assert_close(y.double(), x.double() @ exact.T, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_every_build_that_runs_here_gives_the_exact_product(kernel, shape, sparse):
    linear, exact = layer(*shape, kernel=kernel, sparse=sparse)
    for m, threads, reuse in itertools.product((1, 2, 3, 4, 5, 13, 16, 17, 33), (1, 2, 5), (True, False)):
        x = numbers(m, shape[1], seed=m).bfloat16().float()
        truth = x.double() @ exact.T
        error = (linear(x, threads=threads, reuse=reuse) - truth).abs().mean() / truth.abs().mean()
        single = not sparse and (m == 1 or not reuse)  # the AVX2 build rounds single rows to 15 bits
        assert error < (5e-5 if single else 1e-5), (m, threads, reuse)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_kernel_refuses_what_does_not_fit(kernel):
    linear, _ = layer(64, 256, 128, kernel=kernel)
    with pytest.raises(ValueError, match="do not belong together"):
        kernel(torch.zeros(1, 192), linear.words, linear.scales, group=128)
    with pytest.raises(ValueError, match=r"contiguous torch\.float32"):
        kernel(torch.zeros(1, 256, dtype=torch.float64), linear.words, linear.scales, group=128)
    assert kernel(torch.zeros(0, 256), linear.words, linear.scales, group=128).shape == (0, 64)


@pytest.mark.skipif(not KERNELS, reason="no C compiler")
def test_stream_reads_every_number_once():
    data = torch.arange(256 * 12, dtype=torch.float32)
    for threads in (1, 2, 5):
        assert KERNELS[0].read(data, threads) == data.double().sum()


@pytest.mark.parametrize("name", ["torch bf16", "torch fp32", "torch int4", "torch int8"])
def test_peers_multiply_with_the_same_weight(name):
    weight = numbers(64, 256)
    codes, scales = marlin.round_to_nearest(weight, 128)
    scales = scales.bfloat16().float()  # torch's INT4 kernel keeps them in bf16
    weight = marlin.dequantise(codes, scales)
    x = numbers(2, 256, seed=2)
    y = linears.torch_products(weight, codes, scales, total=1)[name](x)()
    assert (y.float() - x @ weight.T).norm() / (x @ weight.T).norm() < 0.02


# -- GPTQ --------------------------------------------------------------------------------------------------------------


def problem(k=24, n=40, seed=3):
    x = numbers(400, k, seed=seed, dtype=torch.float64) @ numbers(k, k, seed=seed + 1, dtype=torch.float64)
    hessian = 2 / 400 * x.T @ x
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    return numbers(n, k, seed=seed + 2, dtype=torch.float64), hessian, damped


def test_factor_is_the_upper_factor_of_the_damped_inverse():
    _, hessian, damped = problem()
    factor = marlin.inverse_factor(hessian)
    assert (factor.tril(-1) == 0).all()
    torch.testing.assert_close(factor.T @ factor @ damped, torch.eye(24, dtype=torch.float64), atol=1e-8, rtol=0)


@pytest.mark.parametrize(("k", "group"), [(24, 8), (24, 24), (192, 32), (288, 96)])
def test_gptq_is_the_optimal_brain_quantiser(k, group):
    weight, hessian, damped = problem(k)
    codes, scales = marlin.gptq(weight, marlin.inverse_factor(hessian), group)
    grid = {"scale": marlin.grid_scale, "quantise": marlin.quantise}
    assert (codes == quantisation.optimal_brain_quantiser(weight, damped, group, **grid)).all()
    assert scales.shape == (40, k // group)


def test_gptq_without_correlations_is_plain_rounding():
    weight, *_ = problem()
    codes, scales = marlin.gptq(weight, marlin.inverse_factor(torch.eye(24, dtype=torch.float64)), 8)
    expected = marlin.round_to_nearest(weight, 8)
    assert (codes == expected[0]).all()
    assert (scales == expected[1]).all()


def test_clipping_minimises_what_later_weights_cannot_repair():
    """For each shrink the loss is that of the best later weights, by explicit least squares; the best shrink wins."""
    weight, hessian, damped = problem()
    factor, group = marlin.inverse_factor(hessian), slice(8, 16)
    cross, rest = damped[group, 16:], damped[16:, 16:]
    widest, shrinks, losses = weight[:, group].abs().amax(1), [1 - i / 100 for i in range(0, 76, 5)], []
    for shrink in shrinks:
        scale = marlin.grid_scale(shrink * widest)[:, None]
        delta = (marlin.quantise(weight[:, group], scale) - 8) * scale - weight[:, group]
        free = -torch.linalg.solve(rest, cross.T @ delta.T).T
        change = torch.cat([torch.zeros_like(weight[:, :8]), delta, free], 1)
        losses.append(torch.stack([torch.tensor(marlin.output_loss(row[None], damped)) for row in change]))
    best = torch.stack(losses).argmin(0)
    expected = torch.stack([marlin.grid_scale(shrink * widest) for shrink in shrinks])[best, torch.arange(40)]
    found = marlin.clipped_scale(weight[:, group].T, factor[group, group], shrinks)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(set(best.tolist())) > 1


def test_gptq_and_clipping_lower_the_output_error():
    weight, hessian, _ = problem(192, 64)
    factor = marlin.inverse_factor(hessian)
    results = [
        marlin.round_to_nearest(weight, 64),
        marlin.gptq(weight, factor, 64),
        marlin.gptq(weight, factor, 64, [1 - i / 100 for i in range(0, 76, 5)]),
    ]
    plain, spread, clipped = (marlin.output_loss(marlin.dequantise(*r) - weight, hessian) for r in results)
    assert clipped < spread < 0.9 * plain


def test_output_loss_is_the_squared_change_of_the_outputs():
    x, change = numbers(50, 6, dtype=torch.float64), numbers(4, 6, seed=1, dtype=torch.float64)
    hessian = 2 / 50 * x.T @ x
    assert marlin.output_loss(change, hessian) == pytest.approx(2 / 50 * (x @ change.T).square().sum().item())


# -- the roofline ------------------------------------------------------------------------------------------------------


def test_roofline_by_hand():
    """600 GB/s and 120 TFLOP/s: 2 GB of 16-bit weights in 1/300 s, the full gain up to 51 rows."""
    machine = {"bandwidth": 600e9, "rate": 120e12}
    assert marlin.dense_seconds(1, 1e9, **machine) == pytest.approx(1 / 300)
    assert marlin.dense_seconds(200, 1e9, **machine) == pytest.approx(1 / 300)
    assert marlin.dense_seconds(400, 1e9, **machine) == pytest.approx(400 * 2e9 / 120e12)
    assert marlin.int4_seconds(1, 1e9, **machine) == pytest.approx(0.515625 / 600)
    assert marlin.int4_seconds(400, 1e9, **machine, dequantised=1e12) == pytest.approx(1e-3 + 400 * 2e9 / 120e12)
    assert marlin.int4_seconds(400, 1e9, **machine, sparse=True) == pytest.approx(400 * 1e9 / 120e12)
    edge = marlin.largest_ideal_batch(200, 128)
    assert edge == pytest.approx(51.5625)
    full = [marlin.dense_seconds(m, 1e9, **machine) / marlin.int4_seconds(m, 1e9, **machine) for m in (1, 51, 52)]
    assert full[0] == full[1] == pytest.approx(16 / 4.125)
    assert full[2] < full[1]


# -- building ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not KERNELS, reason="no C compiler")
@pytest.mark.parametrize("choice", kernels.BUILDS, ids=lambda b: b.name)
def test_every_build_compiles_or_says_that_the_compiler_is_too_old(choice, tmp_path, monkeypatch):
    if kernels.platform.machine() != "x86_64" and choice.flags:
        pytest.skip("flags of another architecture")
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    if choice.name in ("portable", "AVX2+FMA"):
        assert kernels.build("int4.c", choice.flags).exists()
        return
    try:  # flags that are younger than some compilers still in use
        kernels.build("int4.c", choice.flags)
    except kernels.KernelError as error:
        if "unrecognized" not in str(error) and "unsupported" not in str(error):
            raise


@pytest.mark.skipif(not KERNELS, reason="no C compiler")
def test_second_build_compiles_nothing_and_concurrent_ones_agree(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    found = []
    workers = [threading.Thread(target=lambda: found.append(kernels.build("int4.c"))) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len({*found}) == 1
    assert list((tmp_path / "kernels").iterdir()) == found[:1]

    def refuse(command, **options):
        if "--version" not in command:
            raise AssertionError("compiled again")
        return subprocess.CompletedProcess(command, 0, b"", b"")

    monkeypatch.setattr(kernels.subprocess, "run", refuse)
    assert kernels.build("int4.c") == found[0]


def test_without_a_compiler_one_line_says_so(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(kernels.KernelError, match=r"^no C compiler: .* Install gcc, or set CC\.$"):
        kernels.int4_kernel("portable")
    monkeypatch.setenv("CC", "no-such-compiler")
    with pytest.raises(kernels.KernelError, match="is not a program"):
        kernels.int4_kernel("portable")


def test_unknown_or_impossible_builds_are_refused(monkeypatch):
    with pytest.raises(kernels.KernelError, match="SSE9 is no build"):
        kernels.int4_kernel("SSE9")
    monkeypatch.setattr(kernels, "processor_flags", frozenset)
    with pytest.raises(kernels.KernelError, match="lacks avx2 fma"):
        kernels.int4_kernel("AVX2+FMA")


# -- a model, block by block -------------------------------------------------------------------------------------------


def tiny_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=50, num_key_value_heads=1, tie_word_embeddings=False, **shape)
    return LlamaForCausalLM(config).eval().requires_grad_(False)


def test_walk_sees_the_inputs_of_the_whole_model_and_restores_them():
    model = tiny_llama()
    texts = [torch.arange(n) % 50 for n in (7, 11)]
    seen, inputs = {}, {}
    hooks = [
        model.model.layers[i].mlp.down_proj.register_forward_pre_hook(
            lambda _m, args, i=i: inputs.setdefault(i, []).append(args[0][0])
        )
        for i in range(2)
    ]
    for text in texts:
        model(input_ids=text[None])
    for hook in hooks:
        hook.remove()

    def keep(key, weight, hessian):
        seen[key] = hessian
        return weight

    originals = quantisation.walk(model, texts, keep, blocks=2)
    for i in range(2):
        x = torch.cat(inputs[i])
        torch.testing.assert_close(seen[i, "down"], 2 / 18 * x.T @ x)
    assert originals.keys() == seen.keys() == {(i, name) for i in range(2) for name in quantisation.MATRICES}
    assert originals[0, "qkv"].shape == (128, 64)


def test_later_blocks_see_rounded_weights():
    model, hessians = tiny_llama(), {}
    texts = [torch.arange(9)]

    def zero_first(key, weight, hessian):
        hessians[key] = hessian
        return weight * 0 if key == (0, "down") else weight

    quantisation.walk(model, texts, zero_first, blocks=2)
    again = {}

    def keep(key, weight, hessian):
        again[key] = hessian
        return weight

    quantisation.walk(tiny_llama(), texts, keep, blocks=2)
    torch.testing.assert_close(hessians[0, "down"], again[0, "down"])
    assert not torch.allclose(hessians[1, "qkv"], again[1, "qkv"])


def test_packed_llama_says_what_the_dequantised_one_says():
    from workbook.models.lm import Llama

    model = tiny_llama()
    packed = {}
    for number, matrix in itertools.product(range(2), quantisation.MATRICES):
        packed[number, matrix] = marlin.round_to_nearest(
            quantisation.fused_weight(model.model.layers[number], matrix), 32
        )
    lean = quantisation.with_linears(
        Llama.from_transformers(model), lambda key: marlin.Int4Linear(*packed[key], kernel=None)
    )
    quantisation.install_all(model, {key: marlin.dequantise(*codes) for key, codes in packed.items()})
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        torch.testing.assert_close(lean(tokens, lean.cache(1, 12)), model(tokens).logits, rtol=1e-3, atol=1e-4)


# -- one wrong sign ----------------------------------------------------------------------------------------------------

MUTATIONS = [
    ("2 * widest / 15", "2 * widest / 16"),
    ("(weight / scale).round().add(8)", "(weight / scale).round().add(7)"),
    ("return (3 if sparse else 4) + 16 / group", "return (3 if sparse else 4) + 8 / group"),
    ("ORDER = (0, 2, 4, 6, 1, 3, 5, 7)", "ORDER = (0, 1, 2, 3, 4, 5, 6, 7)"),
    ("fours.topk(2).indices, True", "fours.topk(2, largest=False).indices, True"),
    ("hessian + damp * hessian", "hessian - damp * hessian"),
    ("torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True", "damped, upper=True"),
    ("torch.linalg.inv(factor).T", "torch.linalg.inv(factor)"),
    ("loss < best", "loss > best"),
    ("(code - 8) * scale) / factor[i, i]", "(code - 8) * scale) * factor[i, i]"),
    ("error, alpha=-1", "error, alpha=1"),
    ("w[stop:] -= factor[start:stop, stop:].T @ errors", "w[stop:] += factor[start:stop, stop:].T @ errors"),
    ("block = group * max(1, 128 // group)", "block = 128"),
    ("weights / dequantised + ", "weights * dequantised + "),
    (
        "return operations_per_byte * bits_per_weight(group) / 16",
        "return operations_per_byte * bits_per_weight(group) / 8",
    ),
]


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("old", "new"), MUTATIONS)
def test_a_changed_sign_is_caught(old, new, tmp_path, monkeypatch):
    """As tests/test_mutations.py does, with the tests of this module that need no fixture and no C kernel."""
    module = importlib.import_module(__name__)
    monkeypatch.setattr(module, "marlin", mutate(NAME, old, new, tmp_path, monkeypatch))
    judges = (check for check in checks(module, {}) if "build" not in check.__defaults__[0].__name__)
    assert any(map(fails, judges)), f"nothing noticed that {old!r} became {new!r}"


def test_a_changed_kernel_makes_the_notebook_stale():
    names = graph.modules([graph.parse("from workbook import kernels")])
    assert [path.name for path in graph.sources(names)] == ["int4.c"]
