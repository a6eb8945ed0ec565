"""The shared library's own promises: statistics, records, figures, training."""

import io
import json

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from scipy import stats

from workbook import checkpoints, measure, plotting, train
from workbook.study import Measured, OracleFailed, Published, Study, at_least, at_most, out_of_reach, reaches, within


def test_bootstrap_agrees_with_scipy():
    values = np.random.default_rng(0).exponential(size=40)
    ours = measure.bootstrap(values, draws=4000)
    theirs = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=1).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.03)
    assert ours.value == pytest.approx(values.mean())


def test_jackknife_of_a_mean_is_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    found = measure.jackknife(values, np.mean, groups=400)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(1.96 * values.std(ddof=1) / 20)
    with pytest.raises(ValueError, match="cannot be cut into 20 groups"):
        measure.jackknife(values[:19], np.mean)


def test_ratio_pairs_its_rows():
    b = np.random.default_rng(0).uniform(1, 100, 30)
    ratio = measure.ratio(3 * b, b)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((3, 3, 3))


def test_interleaved_times_every_function_in_every_round():
    calls = []
    table = measure.interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"], "the warm-up and every other round run in reverse"
    assert table.groupby("name").size().to_dict() == {"a": 3, "b": 3}


@pytest.mark.parametrize(
    ("rule", "measured", "verdict"),
    [
        (at_least(1), Measured(1.2, 1.1, 1.3), "reproduced"),
        (at_least(1), Measured(1.2, 0.9, 1.3), "partly"),
        (at_least(1), Measured(0.9, 0.8, 1.3), "not reproduced"),
        (at_most(1), Measured(0.9, 0.8, 0.95), "reproduced"),
        (at_most(1), Measured(0.9, 0.8, 1.1), "partly"),
        (at_most(1), Measured(1.2), "not reproduced"),
        (within(3, 0.1), Measured(3.05), "reproduced"),
        (within(3, 0.1), Measured(3.2), "not reproduced"),
        (reaches(2, floor=1), Measured(2.1, 1.5, 2.5), "reproduced"),
        (reaches(2, floor=1), Measured(1.5, 1.2, 1.8), "partly"),
        (reaches(2, floor=1), Measured(1.5, 0.9, 1.8), "not reproduced"),
        (out_of_reach(), Measured(1), "out of reach"),
    ],
)
def test_verdict_follows_from_the_interval(rule, measured, verdict):
    assert rule.verdict(measured) == verdict


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBOOK_OUT", str(tmp_path))
    monkeypatch.setattr("workbook.study.read_parameters", lambda path: {})
    monkeypatch.setattr("workbook.study.check_parameters", lambda name, declared, values: {"seed": 3})
    return Study("decoding/none", title="T", arxiv="0", year=2000, parameters={})


def test_failed_oracle_raises_and_stays_in_the_record(study):
    study.oracle("fine", value=1.0, expected=1.0)
    with pytest.raises(OracleFailed, match="'wrong': 2 is not = 1"):
        study.oracle("wrong", value=2.0, expected=1.0, tolerance=0.5)
    with pytest.raises(OracleFailed):
        study.oracle("not a number", value=float("nan"), at_most=1.0)
    with pytest.raises(TypeError):
        study.oracle("two bounds", value=1.0, at_most=1.0, at_least=1.0)
    record = json.loads(study.finish().read_text())
    assert [oracle["passed"] for oracle in record["oracles"]] == [True, False, False]


def test_oracle_table_names_no_number_of_this_machine(study, capsys):
    study.oracle("a", value=0.1234567, at_most=1.0, tolerance=1e-9)
    study.show_oracles()
    assert capsys.readouterr().out == "a  tolerance 1e-09    ok\n"


def test_unreproduced_claim_needs_a_reason(study):
    with pytest.raises(ValueError, match="give a note"):
        study.claim("C1", "s", measured=Measured(0.0), rule=at_least(1))
    verdict = study.claim(
        "C1", "s", measured=Measured(0.0), rule=at_least(1), note="why", paper=Published(2, "×", "p. 1")
    )
    assert verdict == "not reproduced"


def test_same_figure_gives_the_same_bytes(study):
    def draw():
        fig, ax = plotting.panel("x / s", "y")
        rows = pd.DataFrame({"x": [1, 2, 3], "y": [1.0, 2.0, 1.5], "low": [0.9, 1.8, 1.2], "high": [1.1, 2.2, 1.9]})
        plotting.line_with_interval(ax, rows, x="x", y="y", index=0, label="line")
        plotting.published(ax, y=1.7, text="somewhere")
        plotting.label_ends(ax)
        return fig, rows

    contents = []
    for name in ("one", "two"):
        fig, rows = draw()
        files = plotting.write(fig, study.folder / "figure", alt="A line.")
        contents.append([path.read_bytes() for path in files])
        study.figure(name, fig, data=rows, alt="A line.")
    assert contents[0] == contents[1]
    assert b"A line." in contents[0][0], "the SVG carries its alt text"
    assert Image.open(io.BytesIO(contents[0][1])).text["Description"] == "A line.", "and so does the PNG"


def test_smaller_pictures_keep_greys_exactly_and_few_colours():
    rng = np.random.default_rng(0)
    grey = Image.fromarray(rng.integers(0, 256, (40, 40), dtype=np.uint8))
    palette = rng.integers(0, 256, (60, 3), dtype=np.uint8)
    for picture in (grey.convert("RGBA"), Image.fromarray(palette[rng.integers(0, 60, (40, 40))])):
        data = io.BytesIO()
        picture.save(data, format="png")
        small = Image.open(io.BytesIO(plotting.smaller_png(data.getvalue())))
        np.testing.assert_array_equal(np.asarray(small.convert("RGB")), np.asarray(picture.convert("RGB")))


def test_smaller_pictures_keep_the_hue_of_a_rare_mark():
    fig, ax = plotting.panel("x", "y")
    for index, colour in enumerate(plotting.COLOURS[:5]):
        ax.plot([0, 1], [index, index + 0.5], color=colour)
        ax.fill_between([0, 1], [index - 0.6, index], [index + 0.6, index + 1], color=colour, alpha=0.2)
    ax.plot([1.5], [3], "P", color="#d55e00", markersize=5)
    data = io.BytesIO()
    fig.savefig(data, format="png")
    plotting.plt.close(fig)
    before, after = (
        np.asarray(Image.open(io.BytesIO(part)).convert("RGB")).astype(int)
        for part in (data.getvalue(), plotting.smaller_png(data.getvalue()))
    )
    mark = (before == [0xD5, 0x5E, 0]).all(2)
    assert mark.sum() > 9
    assert abs(after - before)[mark].max() < 30
    assert (after[0, 0] == 255).all()


def test_training_resumes_where_it_stopped(tmp_path):
    def loss(model, step):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (model(x) - x.sum(1, keepdim=True)).square().mean()

    def fit(model, steps, resume=None):
        return train.fit(model, loss, steps=steps, learning_rate=0.05, warmup=5, resume=resume, save_every=10)[0]

    class Stop(Exception):
        pass

    def stopping(model, step):
        if step == 25:
            raise Stop
        return loss(model, step)

    def new():
        torch.manual_seed(0)
        return torch.nn.Linear(3, 1)

    whole, file = fit(new(), 40), tmp_path / "resume.safetensors"
    with pytest.raises(Stop):
        train.fit(new(), stopping, steps=40, learning_rate=0.05, warmup=5, resume=file, save_every=10)
    assert file.exists()
    resumed = fit(new(), 40, resume=file)
    torch.testing.assert_close(resumed.weight, whole.weight)
    assert not file.exists()


@pytest.mark.parametrize("has_units", [False, True])
def test_sixteen_bits_train_the_network_itself_and_spare_attention(monkeypatch, has_units):
    seen, plain = [], torch.nn.functional.scaled_dot_product_attention

    class Attending(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.turn = torch.nn.Linear(16, 16)

        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(self.turn(x), x, x) + 0 * x[..., :1]

    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_units)
    torch.manual_seed(0)
    network, x = Attending(), torch.randn(2, 1, 8, 16)
    quick = train.sixteen_bits(network, compiled=False)
    assert (quick is network) is not has_units
    hook = network.turn.register_forward_hook(lambda module, _, out: seen.append(out))
    found = quick(x)
    found.square().sum().backward()
    hook.remove()
    torch.testing.assert_close(found, network(x), rtol=0.02, atol=0.02)
    assert found.dtype == torch.float32
    assert network.turn.weight.grad.abs().max() > 0
    assert seen[0].dtype == (torch.bfloat16 if has_units else torch.float32)
    # no rounding after the layer: autocast alone would multiply queries and keys in 16 bits
    torch.testing.assert_close(found, plain(seen[0].float(), x, x), rtol=1e-5, atol=1e-6)


def test_eight_bits_are_within_half_a_scale_and_survive_the_file(tmp_path):
    kernel = torch.randn(32, 16, 3, 3) * torch.logspace(-3, 2, 32)[:, None, None, None]
    small, whole = torch.randn(7, 5), torch.arange(9000).view(90, 100)
    tensors = {"kernel": kernel, "small": small, "whole": whole, "bias": torch.randn(9000)}
    saved = {"made_by": "checkpoints/x", "licence": "MIT", "facts": {}, "folder": tmp_path}
    plain = checkpoints.save("plain", {"kernel": kernel}, **saved).stat().st_size
    assert checkpoints.save("short", {"kernel": kernel}, dtype=torch.int8, **saved).stat().st_size < 0.6 * plain
    path = checkpoints.save("x", tensors, dtype=torch.int8, **saved)
    back = checkpoints.restored(load_file(path))
    scale = kernel.flatten(1).abs().amax(1) / 127
    assert ((back["kernel"] - kernel).flatten(1).abs().amax(1) <= 0.51 * scale).all()
    assert torch.equal(back["small"].float(), small.half().float())
    assert torch.equal(back["whole"], whole)
    assert back.keys() == tensors.keys()


def test_a_row_of_zeros_survives_eight_bits():
    rows = torch.cat([torch.zeros(1, 5000), torch.ones(1, 5000)])
    assert torch.allclose(checkpoints.restored(checkpoints.eight_bits({"w": rows}))["w"], rows, atol=1e-3)
