"""The promises of the build: what is stale, what runs, side by side, anywhere, offline."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from tiny import Checkout, code, text, write_notebook

from workbook.files import locked
from workbook.verify import compare


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A checkout whose figures were made once: in a path with spaces, accents and braces, under LC_ALL=C."""
    checkout = Checkout(tmp_path_factory.mktemp("a place") / "wörk bénch {x} $y #1")
    checkout.first = checkout.run("make", "figures", "JOBS=2", LC_ALL="C")
    return checkout


@pytest.fixture
def copy(built, tmp_path):
    """A copy of it, as fresh as the original: nothing in it depends on where it stands."""
    other = object.__new__(Checkout)
    other.root = tmp_path / "copy"
    shutil.copytree(built.root, other.root)
    return other


def edit(path: Path, old: str, new: str) -> None:
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))


def test_figures_are_made_in_a_path_with_spaces_and_accents_under_lc_all_c(built):
    assert built.first.returncode == 0, built.first.stderr
    assert "2 of 2 notebooks done" in built.first.stdout
    record = json.loads((built.root / "figures/decoding/one/record.json").read_text())
    assert record["parameters"]["count"] == 3  # the paper profile's
    assert (built.root / "build/executed/decoding/one.ipynb").exists()


def test_the_closing_table_names_oracles_and_verdicts(built):
    row = next(line for line in built.first.stdout.splitlines() if line.startswith("decoding/one "))
    assert row.split()[2:4] == ["1/1", "1"]


def test_second_make_figures_runs_nothing(copy):
    before = copy.times()
    result = copy.make()
    assert result.returncode == 0
    assert result.stdout == "2 notebooks up to date\n"
    assert copy.times() == before


def test_finding_nothing_to_do_imports_nothing_heavy(copy):
    imported = copy.run(sys.executable, "-X", "importtime", "-m", "doit", "figures").stderr
    names = {line.rpartition("|")[2].strip() for line in imported.splitlines()}
    assert "workbook.graph" in names
    assert not names & {"papermill", "nbformat", "numpy", "torch", "matplotlib", "pandas"}


def test_touch_and_a_skewed_clock_rerun_nothing(copy):
    before = {path: path.read_bytes() for path in copy.root.rglob("record.json")}
    for days, path in enumerate(sorted(copy.root.rglob("*"))):
        os.utime(path, (time.time() + 86400 * (days % 5 - 2),) * 2)
    times = copy.times()
    assert copy.make().stdout == "2 notebooks up to date\n"
    assert copy.times() == times
    assert {path: path.read_bytes() for path in before} == before


def test_one_changed_library_line_reruns_exactly_the_notebooks_that_import_it(copy):
    edit(copy.root / "lib/workbook/alone.py", "VALUE = 1", "VALUE = 2")  # imported through a module, in a function
    assert copy.make("why").stdout == (
        "decoding/one has to run:\n  lib/workbook/alone.py changed\ndiffusion/two: up to date\n"
    )
    before = copy.times()
    result = copy.make()
    assert result.returncode == 0, result.stderr
    assert [name for name, when in copy.times().items() if when != before[name]] == ["figures/decoding/one/record.json"]
    assert copy.make().stdout == "2 notebooks up to date\n"


def test_why_explains_each_ingredient(copy):
    notebook = copy.root / "notebooks/diffusion/two.ipynb"
    document = json.loads(notebook.read_text())
    document["cells"][0]["source"] = "# Other prose"
    notebook.write_text(json.dumps(document))
    assert copy.make("why", N="two").stdout == "diffusion/two: up to date\n"

    document["cells"][3]["source"] += "\n"
    notebook.write_text(json.dumps(document))
    notebook.with_name("two.paper.yaml").write_text("count: 4  # more\n")
    copy.write_data(b"other numbers")
    (copy.root / "requirements.lock").write_text("doit==0\n")
    (copy.root / "figures/diffusion/two/line.svg").unlink()
    (copy.root / "figures/diffusion/two/old.svg").write_text("<svg/>")
    assert copy.workbook("why", "two").stdout.splitlines() == [
        "diffusion/two has to run:",
        "  code of cell 4 changed",
        "  parameter count changed from 3 to 4",
        "  data/numbers.bin changed",
        "  requirements.lock changed",
        "  figures/diffusion/two/line.svg is missing",
        "  figures/diffusion/two/old.svg was made by no run",
    ]


@pytest.mark.parametrize("content", ["", '{"ingredients": {', "[]", '{"ingredients": 3}', "\x00\x01", '{"a": NaN}'])
def test_a_corrupt_stamp_counts_as_absent_with_at_most_one_warning(copy, content):
    (copy.root / "build/stamps/decoding/one.json").write_text(content)
    result = copy.workbook("why")
    assert result.returncode == 0
    assert result.stdout.startswith("decoding/one has to run:\n")
    assert result.stdout.endswith("diffusion/two: up to date\n")
    assert len(result.stderr.splitlines()) == (content != '{"ingredients": 3}')
    assert "Traceback" not in result.stderr


def test_a_corrupt_record_is_made_again_after_one_warning(copy):
    good = copy.products("decoding/one")
    (copy.root / "figures/decoding/one/record.json").write_text('{"notebook": ')
    result = copy.make()
    assert result.returncode == 0
    assert "1 of 1 notebooks done" in result.stdout
    warnings = [line for line in result.stderr.splitlines() if line.startswith("warning: figures/decoding/one/record")]
    assert warnings
    assert "Traceback" not in result.stderr
    for name, content in copy.products("decoding/one").items():
        assert name.endswith("one.ipynb") or content == good[name]


def test_a_changed_data_byte_is_refused_by_name_and_digest(copy):
    good = copy.products("diffusion/two")
    content = bytearray((copy.root / "data/numbers.bin").read_bytes())
    content[0] ^= 1
    (copy.root / "data/numbers.bin").write_bytes(content)
    result = copy.make()
    assert result.returncode != 0
    assert "data/numbers.bin has changed: expected sha256 " in result.stderr
    assert "Traceback" not in result.stderr
    log = (copy.root / "build/logs/diffusion/two.log").read_text()
    assert log.startswith("data/numbers.bin has changed")  # and nothing else: no kernel was started for it
    assert copy.products("diffusion/two") == good


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"P": "cuont=5"}, "decoding/one: cuont is not a parameter of this notebook. Did you mean count? "),
        ({"P": "scale=nan"}, "decoding/one: scale = nan is not a finite number: 0 < scale <= 10."),
        ({"P": "scale=inf"}, "decoding/one: scale = inf is not a finite number: 0 < scale <= 10."),
        ({"P": "scale=-0.5"}, "decoding/one: scale = -0.5 is out of range: 0 < scale <= 10."),
        ({"P": "count=four"}, 'decoding/one: count = "four" is not of type int: 1 to 16.'),
        ({"N": "decoding/onne"}, "decoding/onne is not a notebook of this workbook. Did you mean decoding/one? "),
        ({"PROFILE": "papr"}, "PROFILE=papr is not a profile: use quick or paper."),
        ({"JOBS": "many"}, "JOBS=many is not a number of notebooks to run side by side."),
    ],
)
def test_bad_input_is_refused_in_one_line_before_a_kernel_starts(built, settings, message):
    result = built.make(**({"N": "decoding/one"} | settings))
    assert result.returncode != 0
    lines = [line for line in result.stderr.splitlines() if not line.startswith("make: ")]
    assert len(lines) == 1
    assert lines[0].startswith(message)
    assert not (built.root / "build/custom").exists()


def test_another_notebook_runs_while_one_has_refused_parameters(copy):
    (copy.root / "notebooks/decoding/one.paper.yaml").write_text("count: 99\n")
    (copy.root / "figures/diffusion/two/line.csv").unlink()
    result = copy.make()
    assert result.returncode != 0
    assert "decoding/one: count = 99 is out of range: 1 to 16." in result.stderr
    assert "1 of 2 notebooks done" in result.stdout
    assert (copy.root / "figures/diffusion/two/line.csv").exists()


def test_custom_parameters_and_the_quick_profile_never_reach_figures(copy):
    good = copy.products("decoding/one")
    assert copy.make(N="decoding/one", P="count=5 mode='a b'").returncode == 0
    record = json.loads((copy.root / "build/custom/decoding/one/record.json").read_text())
    assert (record["parameters"]["count"], record["profile"]) == (5, "custom")
    assert copy.make("quick", N="one").returncode == 0
    record = json.loads((copy.root / "build/quick/decoding/one/record.json").read_text())
    assert (record["parameters"]["count"], record["profile"]) == (2, "quick")
    assert copy.products("decoding/one") == good
    assert copy.make().stdout == "2 notebooks up to date\n"


def test_a_foreign_kernel_and_a_missing_network_change_nothing(copy, tmp_path):
    kernel = tmp_path / "jupyter/kernels/python3/kernel.json"
    kernel.parent.mkdir(parents=True)
    kernel.write_text(json.dumps({"argv": ["/bin/false"], "display_name": "another", "language": "python"}))
    command = ["make", "figures", "FORCE=1", "N=decoding/one"]
    if copy.run("unshare", "-n", "true").returncode == 0:
        command = ["unshare", "-n", *command]
    result = copy.run(*command, JUPYTER_PATH=str(tmp_path / "jupyter"))
    assert result.returncode == 0, result.stderr
    assert "1 of 1 notebooks done" in result.stdout


def test_two_make_figures_at_once_tear_nothing(copy):
    edit(copy.root / "lib/workbook/alone.py", "VALUE = 1", "VALUE = 3")
    both = [copy.start("make", "figures") for _ in range(2)]
    outputs = [process.communicate(timeout=400) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert copy.make().stdout == "2 notebooks up to date\n"  # digests of all products are those of one run
    assert sum("oracles 1/1" in out for out, _ in outputs) == 1  # and it ran once
    assert list((copy.root / "figures").rglob(".*")) == []


def test_a_notebook_that_measures_time_takes_the_cores_alone(copy):
    write_notebook(copy.root, "systems/timed", settings={"timing": True})
    with locked(copy.root / "build/locks/cores", shared=True):  # another notebook runs
        process = copy.start("make", "figures", "JOBS=2")
        assert process.stderr.readline() == "systems/timed: waiting for the other notebooks, it measures time\n"
    process.communicate(timeout=400)
    assert process.returncode == 0


def test_run_is_the_prefix_of_each_command(copy):
    result = copy.make(FORCE="1", N="one", RUN="env TINY_MODE=oracle")
    assert result.returncode != 0
    assert "decoding/one: oracle failed: sum" in result.stderr


def test_verify_compares_with_the_committed_record(copy):
    result = copy.make("verify", N="decoding/one")
    assert result.returncode == 0, result.stderr
    assert "1 counted numbers, 0 differ; 1 timings, 0 differ" in result.stdout
    edit(copy.root / "figures/decoding/one/record.json", '"value": 3.0', '"value": 3.1')
    result = copy.workbook("verify", "--compare", "decoding/one")
    assert result.returncode == 1
    assert "DIFFERS  claim C1: committed 3.1, now 3" in result.stdout


def record(value=1.0, *, kind="counted", verdict="reproduced"):
    measured = {"value": value, "low": None, "high": None, "n": 1, "unit": "x", "kind": kind, "tolerance": 0.1}
    return {
        "parameters": {"seed": 0},
        "claims": [{"id": "C1", "measured": measured, "verdict": verdict}],
        "quantities": [{"name": "size", **measured}],
    }


def test_a_counted_number_outside_its_tolerance_is_a_difference_and_a_timed_one_is_not():
    assert compare(record(1.0), record(1.05)).differences == []
    assert len(compare(record(1.0), record(1.3)).differences) == 2
    timed = compare(record(1.0, kind="timed"), record(1.3, kind="timed", verdict="partly"))
    assert timed.differences == []
    assert len(timed.timings) == 3
    assert len(compare(record(), record(verdict="partly")).differences) == 1
    assert len(compare(record(), record() | {"quantities": []}).differences) == 1


def test_the_scorecard_shows_every_verdict_and_is_byte_stable(copy):
    (copy.root / "README.md").write_text("# Top\n<!-- scorecard:start -->\nold\n<!-- scorecard:end -->\nbottom\n")
    edit(copy.root / "figures/diffusion/two/record.json", '"reproduced"', '"not reproduced"')
    drawn = []
    for _ in range(2):
        result = copy.make("scorecard")
        assert result.returncode == 0, result.stderr
        drawn.append((copy.root / "figures/scorecard.svg").read_bytes())
    readme = (copy.root / "README.md").read_text()
    assert drawn[0] == drawn[1]
    assert readme.startswith("# Top\n<!-- scorecard:start -->\n2 claims of 2 papers: 1 reproduced, 0 partly, 1 not rep")
    assert "[diffusion/two](notebooks/diffusion/two.ipynb)" in readme
    assert "The sum is 3.0." in readme
    assert readme.endswith("<!-- scorecard:end -->\nbottom\n")


def test_a_checkpoint_notebook_is_no_figure_and_its_weights_are_its_products(copy):
    root = copy.root
    body = 'from pathlib import Path\nPath("../../data/weights.bin").write_bytes(b"w")\nprint("trained")'
    cells = [text("# Weights"), code("seed: int = 0  # start, 0 to 9", "parameters"), code(body)]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    document = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    (root / "notebooks/checkpoints").mkdir()
    (root / "notebooks/checkpoints/weights.ipynb").write_text(json.dumps(document))
    manifest = json.loads((root / "data/MANIFEST.json").read_text())
    manifest["files"]["weights.bin"] = {"sha256": "not yet", "made_by": "checkpoints/weights"}
    (root / "data/MANIFEST.json").write_text(json.dumps(manifest))
    assert copy.make().stdout == "2 notebooks up to date\n"
    result = copy.make("checkpoints", N="weights")
    assert result.returncode == 0, result.stderr
    assert copy.make("checkpoints").stdout == "1 notebook up to date\n"
    (root / "data/weights.bin").unlink()
    assert "data/weights.bin is missing" in copy.make("why", N="weights").stdout
