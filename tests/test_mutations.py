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
    ("diffusion/deis", "(points - other) / (own - other)", "(points - other) / (other - own)"),
    ("diffusion/deis", "signal[i + 1] * basis", "signal[i] * basis"),
    ("diffusion/deis", "return signal[1:] / signal[:-1], table", "return signal[:-1] / signal[1:], table"),
    ("diffusion/deis", "[23 / 12, -16 / 12, 5 / 12]", "[23 / 12, 16 / 12, 5 / 12]"),
    ("diffusion/deis", "[1 / 6, 4 / 6, 1 / 6]", "[1 / 6, 4 / 6, -1 / 6]"),
    ("test-time/kinetics", "prompt * free + free**2 / 2", "prompt * free - free**2 / 2"),
    ("test-time/kinetics", "flops + intensity * moved", "flops - intensity * moved"),
    ("test-time/kinetics", "linear**2 + 4 * square * budget", "linear**2 - 4 * square * budget"),
    ("test-time/kinetics", "return 1 - np.prod(", "return np.prod("),
    ("test-time/kinetics", "np.log2(parameters[new] / parameters[old])", "np.log2(parameters[old] / parameters[new])"),
]


def checks(module, given):
    """The tests of a module that need no fixture but `given`, with the values of their parameters, as functions."""
    for name, function in inspect.getmembers(module, inspect.isfunction):
        if not name.startswith("test_"):
            continue
        wanted = set(inspect.signature(function).parameters)
        cases = [{key: value for key, value in given.items() if key in wanted}]
        for mark in getattr(function, "pytestmark", []):
            if mark.name == "parametrize":
                names = mark.args[0] if isinstance(mark.args[0], tuple | list) else [mark.args[0]]
                values = [value if len(names) > 1 else (value,) for value in mark.args[1]]
                cases = [case | dict(zip(names, value, strict=True)) for case in cases for value in values]
        if all(set(case) == wanted for case in cases):
            yield from (lambda f=function, c=case: f(**c) for case in cases)


def mutate(name, old, new, folder, monkeypatch):
    """The method of a notebook in which `old`, which stands there exactly once, became `new`, as a module."""
    source = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))
    hits = 0
    for cell in source["cells"]:
        text = "".join(cell["source"])
        if "method" in cell["metadata"].get("tags", []):
            hits += text.count(old)
            cell["source"] = text.replace(old, new)
    assert hits == 1, f"{old!r} stands {hits} times in the method of {name}"
    target = folder / f"{name}.ipynb"
    target.parent.mkdir(parents=True)
    target.write_text(json.dumps(source), encoding="utf-8")
    with monkeypatch.context() as patch:
        patch.setattr(paths, "NOTEBOOKS", folder)
        return notebook.load_method(name)


def fails(check):
    """Whether a check raises."""
    try:
        check()
    except Exception:  # whatever a wrong method leads to
        return True
    return False


@pytest.mark.filterwarnings("ignore")  # a wrong method may well divide by zero
@pytest.mark.parametrize(("name", "old", "new"), MUTATIONS)
def test_changed_sign_is_caught(name, old, new, tmp_path, monkeypatch):
    short = name.rpartition("/")[2].replace("-", "_")
    module = importlib.import_module(f"test_{short}")
    mutated = mutate(name, old, new, tmp_path, monkeypatch)
    for key, value in list(vars(module).items()):
        if getattr(value, "__name__", "") == mutated.__name__:
            monkeypatch.setattr(module, key, mutated)
    assert any(map(fails, checks(module, {short: mutated}))), f"{name}: nothing noticed that {old!r} became {new!r}"
