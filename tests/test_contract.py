"""The notebook contract (CONTRIBUTING.md), as far as a program can check it."""

import ast
import json
import re

import pytest

from workbook import notebook, paths
from workbook.plan import plan

ORDER = ("parameters", "imports", "method", "oracle", "experiment", "figure", "claims", "explore")
CELL_LINES, NOTEBOOK_LINES = 60, 400
PROSE = ("arXiv", "bottleneck", "What you will learn", "What breaks it", "Exercise", "Where this stops", "<details")
SUSPECT = {
    r"\btime\.sleep\(": "sleeps",
    r"\b(TODO|FIXME|XXX)\b": "is unfinished",
    r"[\"'](/(root|home|work|tmp)/|\.\./)": "writes a path of its own",
    r"pickle|torch\.load\(": "reads pickles",
    r"^\s*[%!]": "uses a magic or a shell command",
}


def faults(path, *, checkpoint=False):
    """What departs from the contract, one line each."""
    document = json.loads(path.read_text(encoding="utf-8"))
    cells = [(n, c, "".join(c["source"]), c["metadata"].get("tags", [])) for n, c in enumerate(document["cells"], 1)]
    code = [cell for cell in cells if cell[1]["cell_type"] == "code"]
    prose = "\n".join(source for _, cell, source, _ in cells if cell["cell_type"] == "markdown")
    if document["metadata"].get("kernelspec", {}).get("name") != "python3":
        yield "its kernel is not python3"
    for number, cell, source, tags in code:
        yield from (f"cell {number} {fault}" for fault in cell_faults(cell, source, tags))
    if sum(lines(source) for _, _, source, _ in code) > NOTEBOOK_LINES:
        yield f"it has more than {NOTEBOOK_LINES} lines of code"
    if cells[0][1]["cell_type"] != "markdown" or not cells[0][2].startswith("# "):
        yield "its first cell is not a title"
    declared = notebook.read_parameters(path)
    yield from (f"parameter {p.name} has no range" for p in declared.values() if not p.range and p.type != "bool")
    yield from (f"parameter {p.name} has no comment" for p in declared.values() if not p.description)
    yield from (f"it has no parameter {name}" for name in ("seed", "device", "threads") if name not in declared)
    if checkpoint:
        return
    yield from order_faults([tag for _, _, _, tags in code for tag in tags if tag in ORDER])
    yield from (f"its text never says {word}" for word in PROSE if word.lower() not in prose.lower())
    if "NBVAL_CHECK_OUTPUT" not in "".join(source for _, _, source, _ in code):
        yield "no cell is compared by nbval (# NBVAL_CHECK_OUTPUT)"
    if not any({"method", "exercise"} <= set(tags) for _, _, _, tags in code):
        yield "no method cell is tagged exercise"
    if not path.with_name(path.stem + ".paper.yaml").exists():
        yield "it has no paper profile beside it"


def lines(source):
    return sum(bool(line.strip()) for line in source.splitlines())


def cell_faults(cell, source, tags):
    """What departs from the contract in one code cell."""
    if lines(source) > CELL_LINES:
        yield f"has {lines(source)} lines, more than {CELL_LINES}"
    if any(output["output_type"] == "error" for output in cell["outputs"]):
        yield "stores an error"
    if cell["outputs"] and not {"keep_output", "oracle"} & set(tags):
        yield "stores an output and is tagged neither keep_output nor oracle"
    if "NBVAL_CHECK_OUTPUT" in source and (not cell["outputs"] or cell["execution_count"] is None):
        yield "is to be compared by nbval, which skips it: it stores no output or no execution count"
    for pattern, word in SUSPECT.items():
        if re.search(pattern, source, re.MULTILINE):
            yield word
    if "method" in tags:
        yield from method_faults(source)


def method_faults(source):
    """Functions without a docstring, and what a method cell must not do."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Global):
            yield "uses a global"
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "display"):
            yield "prints"
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not ast.get_docstring(node):
            yield f"has {node.name} without a docstring"


def order_faults(tags):
    """Missing tags, and tags whose first cell comes before the first cell of the tag that precedes it."""
    yield from (f"no cell is tagged {tag}" for tag in ORDER if tag not in tags)
    first = [tags.index(tag) for tag in ORDER if tag in tags]
    if first != sorted(first):
        yield f"its tags are out of order: {' '.join(dict.fromkeys(tags))}"


@pytest.mark.parametrize("name", notebook.names())
def test_the_notebook_keeps_the_contract(name):
    assert list(faults(notebook.path_of(name))) == []


@pytest.mark.parametrize("name", notebook.names(checkpoints=True))
def test_the_checkpoint_notebook_keeps_its_part_of_the_contract(name):
    assert list(faults(notebook.path_of(name), checkpoint=True)) == []


@pytest.mark.parametrize("name", notebook.names())
def test_both_profiles_are_allowed_by_the_declared_ranges(name):
    assert plan(name, "quick").parameters.keys() == plan(name, "paper").parameters.keys()


def test_every_committed_record_belongs_to_a_notebook():
    recorded = {f"{path.parent.parent.name}/{path.parent.name}" for path in paths.FIGURES.glob("*/*/record.json")}
    assert recorded <= {*notebook.names(), *notebook.names(checkpoints=True)}


def test_the_checker_sees_what_departs_from_the_contract(tmp_path):
    """So that a notebook that passes has been looked at."""
    cells = [
        ("parameters", "x: int = 3  # size, large\nseed: int = 0  # start, 0 to 9"),
        ("method", "import pickle\ndef f(x):\n    print(x)"),
        ("imports", "import time\ntime.sleep(1)  # TODO"),
        ("claims", "# NBVAL_CHECK_OUTPUT"),
    ]
    document = {
        "cells": [
            {"cell_type": "code", "metadata": {"tags": [tag]}, "source": source, "execution_count": None,
             "outputs": [{"output_type": "stream", "name": "stdout", "text": "x"}] if tag == "method" else []}
            for tag, source in cells
        ],
        "metadata": {},
    }  # fmt: skip
    path = tmp_path / "bad.ipynb"
    path.write_text(json.dumps(document))
    found = "\n".join(faults(path))
    for expected in (
        "its kernel is not python3", "cell 2 stores an output", "cell 2 reads pickles", "cell 2 prints",
        "cell 2 has f without a docstring", "cell 3 sleeps", "cell 3 is unfinished", "which skips it",
        "parameter x has no range", "it has no parameter device", "its tags are out of order",
        "no cell is tagged oracle",
        "its text never says arXiv", "no method cell is tagged exercise", "it has no paper profile",
    ):  # fmt: skip
        assert expected in found
