"""What a notebook's figures are made from, and whether they are still made from that: by content, never by time.

The ingredients of a run:
- the source of each code cell (prose may change freely);
- the value of each parameter;
- each `workbook` module that the notebook imports, directly or through other modules, at the top or in a function,
  and each C file that such a module names;
- the method of each other notebook that it names (`load_method("diffusion/deis")`);
- each data file that it names. A file of data/MANIFEST.json is named by a string in the notebook's code or parameters
  or in an imported module: the whole key ("fashion-mnist/fashion-mnist.zip"), the file's name, or its stem
  (`checkpoints.load("eps_unet_fmnist")`). In the notebook an f-string names all that it can spell (f"gpt_chain_{i}").
  What a run reads beyond that, it may list under "data" in its record; it counts from then on. A file that the
  notebook itself makes ("made_by" in the manifest) is a product, not an ingredient;
- requirements.lock.
"""

from __future__ import annotations

import ast
import fnmatch
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

from workbook import notebook, paths
from workbook.files import digest, digest_text, read_object, shown, write_json
from workbook.plan import Plan

LIBRARY = paths.ROOT / "lib"
LOCK = paths.ROOT / "requirements.lock"


@cache
def module_file(name: str) -> Path | None:
    """The file of the dotted module name, if it is one of the workbook's."""
    stem = LIBRARY.joinpath(*name.split("."))
    if name.partition(".")[0] != "workbook":
        return None
    for path in (stem.with_suffix(".py"), stem / "__init__.py"):
        if path.is_file():
            return path
    return None


def imported(tree: ast.AST, package: str = "") -> Iterator[str]:
    """The workbook modules that a piece of code imports anywhere in it, a text that is a module's name included."""
    for node in ast.walk(tree):
        candidates: list[str] = []
        if isinstance(node, ast.Import):
            candidates = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            candidates = [base, *(f"{base}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("workbook."):
            candidates = [node.value]  # importlib.import_module("workbook.models.lm")
        for candidate in candidates:
            parts = candidate.split(".")
            for length in range(1, len(parts) + 1):  # importing a.b.c runs a and a.b first
                if module_file(prefix := ".".join(parts[:length])):
                    yield prefix


def strings(tree: ast.AST) -> Iterator[str]:
    """The texts in a piece of code; an f-string gives a pattern with * for what it fills in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield _literal(node.value)
        elif isinstance(node, ast.JoinedStr):
            parts = [_literal(v.value) if isinstance(v, ast.Constant) else "*" for v in node.values]
            if len("".join(part for part in parts if part != "*")) >= 4:  # a bare f"{name}" names nothing
                yield "".join(parts)


def _literal(text: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in text)


def parse(source: str) -> ast.AST:
    """The syntax tree of a cell or a file; an empty one for what is not Python, which its own run reports."""
    lines = (("" if line.lstrip().startswith(("%", "!")) else line) for line in source.splitlines())
    try:
        return ast.parse("\n".join(lines))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


@cache
def _module(name: str) -> tuple[frozenset[str], frozenset[str]]:
    """What a workbook module imports, and the texts it holds (whole ones, no patterns)."""
    path = module_file(name)
    tree = parse(path.read_text(encoding="utf-8"))
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    literals = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
    return frozenset(imported(tree, package)), frozenset(map(_literal, literals))


def modules(trees: Iterable[ast.AST]) -> list[str]:
    """The workbook modules that code imports, and those that these import, and so on."""
    found: set[str] = set()
    waiting = [name for tree in trees for name in imported(tree)]
    while waiting:
        if (name := waiting.pop()) not in found:
            found.add(name)
            waiting += _module(name)[0]
    return sorted(found)


def sources(names: Iterable[str]) -> list[Path]:
    """The C files beside a module that its text names: workbook.kernels names int4.c."""
    beside = {module_file(name).with_name(text) for name in names for text in _module(name)[1] if text.endswith(".c")}
    return sorted(path for path in beside if path.is_file())


def _read_manifest() -> dict[str, dict]:
    return (read_object(paths.DATA / "MANIFEST.json") or {}).get("files", {})


_manifest = cache(_read_manifest)


def _maker(key: str) -> str:
    return _manifest()[key].get("made_by", "")


def made_by(name: str) -> list[Path]:
    """The files of data/ that the notebook makes."""
    return [paths.DATA / key for key, entry in _read_manifest().items() if entry.get("made_by") == name]


def data_files(patterns: Iterable[str]) -> list[str]:
    """The files of the manifest that texts or patterns name: by key, by file name or by stem."""
    known = {name: {key for key in _manifest() if name in _names(key)} for key in _manifest() for name in _names(key)}
    found: set[str] = set()
    for pattern in patterns:
        if "*" in pattern or "[" in pattern:
            for name in fnmatch.filter(known, pattern):
                found |= known[name]
        else:
            found |= known.get(pattern, set())
    return sorted(found)


def _names(key: str) -> set[str]:
    path = Path(key)
    return {key, path.name, path.stem}


def ingredients(plan: Plan) -> dict[str, str]:
    """Everything that a run is made from: what it is, as a reader would say it, and its digest or value."""
    cells = list(notebook.code_cells(plan.notebook))
    trees = [parse(cell.source) for cell in cells]
    used = modules(trees)
    texts = {text for tree in trees for text in strings(tree)}
    others = [name for name in notebook.names() if name in texts and name != plan.name]
    texts |= {text for name in used for text in _module(name)[1]}
    for value in plan.parameters.values():
        texts |= {_literal(item) for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)}
    return (
        {f"code of cell {cell.number}": digest_text(cell.source) for cell in cells}
        | {f"parameter {name}": repr(value) for name, value in plan.parameters.items()}
        | {shown(module_file(name)): digest(module_file(name)) for name in used}
        | {shown(path): digest(path) for path in sources(used)}
        | {
            f"the method of {name}": digest_text("\n".join(cell.source for cell in notebook.method_cells(name)))
            for name in others
        }
        | {f"data/{name}": digest(paths.DATA / name) for name in data_files(texts) if _maker(name) != plan.name}
        | {shown(LOCK): digest(LOCK)}
    )


def stale(plan: Plan) -> list[str]:
    """Why the notebook has to run, one reason a line; empty if its figures are what its ingredients make."""
    stamp = read_object(plan.stamp)
    if stamp is None:
        return ["it has not run here yet"]
    try:
        before, outputs, observed = dict(stamp["ingredients"]), dict(stamp["outputs"]), list(stamp["observed"])
    except (KeyError, TypeError, ValueError):
        return [f"{shown(plan.stamp)} is incomplete"]
    now = ingredients(plan) | {f"data/{name}": digest(paths.DATA / name) for name in observed}
    return [*_changes(before, now), *_output_changes(plan, outputs)]


def _changes(before: dict[str, str], now: dict[str, str]) -> Iterator[str]:
    for name in [*now, *(name for name in before if name not in now)]:
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if name.startswith("parameter ") and old and new:
            yield f"{name} changed from {old} to {new}"
        elif new == "":
            yield f"{name} is missing"
        else:
            yield f"{name} " + ("is new" if old is None else "is gone" if new is None else "changed")


def _output_changes(plan: Plan, outputs: dict[str, str]) -> Iterator[str]:
    for name, expected in outputs.items():
        path = paths.ROOT / name
        found = digest(path)
        if found == expected:
            continue
        if path == plan.figures / "record.json":
            read_object(path)  # says so if it is corrupt
        yield f"{name} is missing" if not found else f"{name} is not what the last run made"
    if plan.figures.is_dir():
        for path in sorted(plan.figures.iterdir()):
            if shown(path) not in outputs:
                yield f"{shown(path)} was made by no run"


def write_stamp(plan: Plan, made_from: dict[str, str], observed: Iterable[str]) -> None:
    """Record what the products now in place were made from."""
    figures = sorted(plan.figures.iterdir()) if plan.figures.is_dir() else []
    files = [*figures, plan.executed, *made_by(plan.name)]
    observed = sorted(set(observed))
    write_json(
        plan.stamp,
        {
            "ingredients": made_from | {f"data/{name}": digest(paths.DATA / name) for name in observed},
            "outputs": {shown(path): digest(path) for path in files},
            "observed": observed,
        },
    )
