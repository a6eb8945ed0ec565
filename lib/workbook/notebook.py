"""A notebook as this workbook reads it: its name, its cells by tag, its parameters, the method that tests import."""

from __future__ import annotations

import difflib
import json
import linecache
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from workbook import paths
from workbook.parameters import Parameter, ParameterError, check_parameters, read_parameters

__all__ = [
    "Cell", "NotebookError", "Parameter", "ParameterError", "check_parameters", "code_cells", "find", "is_timing",
    "load_method", "names", "path_of", "read_parameters", "settings", "title",
]  # fmt: skip

CHAPTERS = ("decoding", "diffusion", "test-time", "training", "bottlenecks", "systems")
CHECKPOINTS = "checkpoints"  # the chapter that trains what data/checkpoints/ ships; no part of `make figures`


class NotebookError(Exception):
    """A notebook that does not exist or cannot be read, told in one line."""


@dataclass(frozen=True)
class Cell:
    """A code cell: its number among all cells (from 1), its source and its tags."""

    number: int
    source: str
    tags: tuple[str, ...]

    def __str__(self) -> str:
        return f"cell {self.number}" + (f" ({', '.join(self.tags)})" if self.tags else "")


def path_of(name: str) -> Path:
    """Where the notebook CHAPTER/NAME stands."""
    return paths.NOTEBOOKS / f"{name}.ipynb"


def names(*, checkpoints: bool = False) -> list[str]:
    """Every notebook as CHAPTER/NAME, in the order of the course; or those that train the checkpoints."""
    found = sorted(
        f"{path.parent.name}/{path.stem}"
        for path in paths.NOTEBOOKS.glob("*/*.ipynb")
        if (path.parent.name == CHECKPOINTS) == checkpoints
    )
    rank = {chapter: i for i, chapter in enumerate(CHAPTERS)}
    return sorted(found, key=lambda name: rank.get(name.partition("/")[0], len(rank)))


def find(text: str) -> str:
    """The notebook that a user means by `decoding/spectr`, `spectr` or a path to it; NotebookError otherwise."""
    known = names() + names(checkpoints=True)
    wanted = text.removesuffix(".ipynb").strip("/")
    wanted = "/".join(wanted.split("/")[-2:])
    matches = [name for name in known if wanted in (name, name.partition("/")[2])]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise NotebookError(f"{text} names several notebooks: {', '.join(matches)}.")
    short = {name.partition("/")[2]: name for name in known}
    near = difflib.get_close_matches(wanted, known, n=1) or difflib.get_close_matches(wanted, short, n=1)
    hint = f" Did you mean {short.get(near[0], near[0])}?" if near else ""
    raise NotebookError(f"{text} is not a notebook of this workbook.{hint} (all: make list)")


def read(path: Path) -> dict:
    """The notebook's JSON; NotebookError if it is none."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        document["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise NotebookError(f"notebooks/{path.parent.name}/{path.name} cannot be read: {error}") from None
    return document


def code_cells(path: Path) -> Iterator[Cell]:
    """The notebook's code cells in order."""
    for number, cell in enumerate(read(path)["cells"], 1):
        if cell["cell_type"] == "code":
            yield Cell(number, "".join(cell["source"]), tuple(cell.get("metadata", {}).get("tags", ())))


def settings(path: Path) -> dict:
    """What the notebook says of itself to the runner, its metadata `workbook`: timing, timeout."""
    return read(path).get("metadata", {}).get("workbook", {})


def is_timing(path: Path) -> bool:
    """Whether the notebook measures time and so takes the cores alone."""
    return bool(settings(path).get("timing", False))


def title(path: Path) -> str:
    """The first heading of the notebook."""
    for cell in read(path)["cells"]:
        for line in "".join(cell["source"]).splitlines() if cell["cell_type"] == "markdown" else ():
            if line.startswith("# "):
                return line[2:].strip()
    return path.stem


def method_cells(name: str) -> list[Cell]:
    """The cells of the notebook CHAPTER/NAME that are tagged `imports` or `method`, in order."""
    return [cell for cell in code_cells(path_of(find(name))) if {"imports", "method"} & set(cell.tags)]


def load_method(name: str) -> types.ModuleType:
    """The method of the notebook CHAPTER/NAME as a module: its cells tagged `imports` and `method`, run in order.

    Tracebacks show the cell's own lines. Raises NotebookError if the notebook has no cell tagged `method`.
    """
    path, cells = path_of(find(name)), method_cells(name)
    if not any("method" in cell.tags for cell in cells):
        raise NotebookError(f"{name} has no cell tagged method.")
    module = types.ModuleType("workbook_method_" + "".join(c if c.isalnum() else "_" for c in name))
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses look their module up there
    for cell in cells:
        filename = f"{path}[cell {cell.number}]"
        linecache.cache[filename] = (len(cell.source), None, cell.source.splitlines(True), filename)
        exec(compile(cell.source, filename, "exec"), module.__dict__)
    return module
