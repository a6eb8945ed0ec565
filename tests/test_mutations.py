"""One wrong sign or index in a method turns its tests red: each mutation is tried, and must be caught."""

import importlib
import inspect
import json

import pytest

from workbook import notebook, paths

MUTATIONS = [
    ("decoding/spectr", "1 - (1 - beta) ** k > rho * beta", "1 - (1 - beta) ** k < rho * beta"),
    ("decoding/spectr", "return high  #", "return 1.0  #"),
    ("decoding/spectr", "residual = target - accepted", "residual = target + accepted"),
    ("decoding/spectr", "target[token] / (rho * draft[token])", "target[token] / draft[token]"),
    ("decoding/spectr", "tokens = drafts.tokens[alive, depth]", "tokens = drafts.tokens[:, depth]"),
    ("decoding/spectr", "cut = 1 + t - np.power", "cut = 1 - t - np.power"),
]


def checks(module):
    """The tests of a module with the values of their parameters, as functions without arguments."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        marks = [mark for mark in getattr(function, "pytestmark", []) if mark.name == "parametrize"]
        cases = [{}]
        for mark in marks:
            names = mark.args[0] if isinstance(mark.args[0], tuple | list) else [mark.args[0]]
            values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
            cases = [case | dict(zip(names, value, strict=True)) for case in cases for value in values]
        if set(inspect.signature(function).parameters) <= {key for case in cases for key in case}:
            yield from (lambda f=function, c=case: f(**c) for case in cases)


@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS)
def test_changed_sign_is_caught(name, old, new, tmp_path, monkeypatch):
    source = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    hits = 0
    for cell in source["cells"]:
        text = "".join(cell["source"])
        if "method" in cell["metadata"].get("tags", []):
            hits += text.count(old)
            cell["source"] = text.replace(old, new)
    assert hits == 1, f"{old!r} stands {hits} times in the method of {name}"
    target = tmp_path / f"{name}.ipynb"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(source), encoding="utf-8")
    module = importlib.import_module(f"test_{name.rpartition('/')[2].replace('-', '_')}")
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    mutated = notebook.load_method(name)
    attribute = next(key for key, value in vars(module).items() if getattr(value, "__name__", "") == mutated.__name__)
    monkeypatch.setattr(module, attribute, mutated)
    failures = 0
    for check in checks(module):
        try:
            check()
        except Exception:  # whatever a wrong method leads to
            failures += 1
            break
    assert failures, f"{name}: nothing noticed that {old!r} became {new!r}"
