"""Parameters: what a notebook declares, and what is refused before a kernel starts, in one line."""

import json
import subprocess
import sys

import pytest

from workbook import paths
from workbook.notebook import ParameterError, check_parameters, read_parameters
from workbook.parameters import parse_parameters, read_assignments, read_profile, split_comment

DECLARED = parse_parameters(
    "decoding/spectr",
    """\
draft_length: int = 4  # tokens drafted per step, 1 to 16
temperature: float = 1.0  # sampling temperature, 0 < temperature <= 2
drafts: list[int] = [1, 2, 4]  # numbers of drafts, each 1 to 16
rates: list[float] = [0.5]  # learning rates, tried in turn, each 0 < rate < 1
device: str = "auto"  # where to compute, one of "auto", "cpu", "cuda"
model: str = "smollm2-135m-instruct"  # a name, or a folder, any text
verbose: bool = False  # print every step, true or false
seed: int = 0  # start, at least 0
""",
)


def check(**values):
    return check_parameters("decoding/spectr", DECLARED, values)


def test_defaults_fill_in_and_the_given_values_win():
    values = check(draft_length=8)
    assert values["draft_length"] == 8
    assert values["drafts"] == [1, 2, 4]
    assert list(values) == list(DECLARED)


def test_an_int_is_accepted_for_a_float_and_becomes_one():
    assert type(check(temperature=1)["temperature"]) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"draft_lenght": 4},
            "draft_lenght is not a parameter of this notebook. Did you mean draft_length? "
            "(all: make params N=decoding/spectr)",
        ),
        ({"zzz": 4}, "zzz is not a parameter of this notebook. (all: make params N=decoding/spectr)"),
        ({"temperature": -0.5}, "temperature = -0.5 is out of range: 0 < temperature <= 2."),
        ({"temperature": 0}, "temperature = 0.0 is out of range: 0 < temperature <= 2."),
        ({"temperature": float("nan")}, "temperature = nan is not a finite number: 0 < temperature <= 2."),
        ({"temperature": float("inf")}, "temperature = inf is not a finite number: 0 < temperature <= 2."),
        ({"temperature": "1"}, 'temperature = "1" is not of type float: 0 < temperature <= 2.'),
        ({"temperature": True}, "temperature = True is not of type float: 0 < temperature <= 2."),
        ({"draft_length": 17}, "draft_length = 17 is out of range: 1 to 16."),
        ({"draft_length": 4.0}, "draft_length = 4.0 is not of type int: 1 to 16."),
        ({"draft_length": True}, "draft_length = True is not of type int: 1 to 16."),
        ({"draft_length": None}, "draft_length = None is not of type int: 1 to 16."),
        ({"draft_length": 10**400}, f"draft_length = 1{'0' * 58}… is out of range: 1 to 16."),
        ({"temperature": 10**400}, f"temperature = 1{'0' * 58}… is too large: 0 < temperature <= 2."),
        ({"drafts": [1, 99]}, "drafts[1] = 99 is out of range: each 1 to 16."),
        ({"drafts": 3}, "drafts = 3 is not of type list[int]: each 1 to 16."),
        ({"rates": [0.5, float("nan")]}, "rates[1] = nan is not a finite number: each 0 < rate < 1."),
        ({"device": "gpu"}, 'device = "gpu" is not allowed: one of "auto", "cpu", "cuda".'),
        ({"model": 3}, "model = 3 is not of type str: any text."),
        ({"verbose": 1}, "verbose = 1 is not of type bool: true or false."),
        ({"seed": -1}, "seed = -1 is out of range: at least 0."),
    ],
)
def test_what_is_not_allowed_is_refused_in_one_line(values, message):
    with pytest.raises(ParameterError) as refused:
        check(**values)
    assert str(refused.value) == f"decoding/spectr: {message}"


@pytest.mark.parametrize(
    ("comment", "parts"),
    [
        ("# tokens, drafted per step, 1 to 16", ("tokens, drafted per step", "1 to 16")),
        ('# where, one of "auto", "cpu"', ("where", 'one of "auto", "cpu"')),
        ("# 1 to 16", ("", "1 to 16")),
        ("# rate, 0 < x <= 1e-1", ("rate", "0 < x <= 1e-1")),
        ("# size, -1.5 to +2", ("size", "-1.5 to +2")),
        ("# size, x >= 3", ("size", "x >= 3")),
        ("# size, between 1 and 3", ("size, between 1 and 3", "")),
    ],
)
def test_the_range_is_the_end_of_the_comment(comment, parts):
    assert split_comment(comment) == parts


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x = 3", "a parameter is written"),
        ("x: int = 3 + y", "the default of x is not a literal value"),
        ("x: dict = {}", "x has type dict"),
        ("x: int = 30  # size, 1 to 16", "x = 30 is out of range"),
        ("x: int = ", "line 1 of the parameters is not Python"),
    ],
)
def test_a_parameters_cell_that_cannot_be_read_is_refused(source, message):
    with pytest.raises(ParameterError, match=message):
        parse_parameters("a/b", source)


def test_a_command_line_is_read_by_the_declared_types():
    text = "draft_length=8 temperature=nan drafts=[1, 2] rivals=[\"iPNDM\", 'b c'] model=1e3 verbose=true device='a b'"
    values = read_assignments("decoding/spectr", DECLARED, text)
    assert values.pop("temperature") != 0
    assert values == {
        "draft_length": 8,
        "drafts": [1, 2],
        "rivals": ["iPNDM", "b c"],
        "model": "1e3",
        "verbose": True,
        "device": "a b",
    }
    for wrong in ("draft_length", "draft_length='8", "drafts=[1,2"):
        with pytest.raises(ParameterError):
            read_assignments("decoding/spectr", DECLARED, wrong)


def test_a_profile_is_read_strictly(tmp_path):
    path = tmp_path / "x.paper.yaml"
    path.write_text("rate: 1e-3\nsteps: 10\nname: a1e3\n")
    assert read_profile(path) == {"rate": 1e-3, "steps": 10, "name": "a1e3"}
    path.write_text("")
    assert read_profile(path) == {}
    for broken in ("- 1\n", "a: [1\n", "!!python/object/apply:os.getcwd []\n"):
        path.write_text(broken)
        with pytest.raises(ParameterError) as refused:
            read_profile(path)
        assert "\n" not in str(refused.value)
    with pytest.raises(ParameterError, match="is missing"):
        read_profile(tmp_path / "y.paper.yaml")


def test_a_broken_notebook_is_refused_in_one_line(tmp_path):
    for content in ("", "{", "[]", json.dumps({"cells": []})):
        path = tmp_path / "broken.ipynb"
        path.write_text(content)
        with pytest.raises(ParameterError) as refused:
            read_parameters(path)
        assert "\n" not in str(refused.value)


def test_reading_parameters_imports_nothing_heavy():
    code = "import sys, workbook.notebook; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True, cwd=paths.ROOT).stdout.split()
    assert not {"numpy", "torch", "nbformat", "papermill", "yaml", "pydantic"} & set(loaded)
