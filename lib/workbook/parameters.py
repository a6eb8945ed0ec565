"""The parameters of a notebook: read from its cell tagged `parameters`, checked before a kernel starts.

One line a parameter, in the form that papermill reads; the range is the last part of the comment:

    draft_length: int = 4  # tokens drafted per step, 1 to 16
    temperature: float = 1.0  # sampling temperature, 0 < temperature <= 2
    drafts: list[int] = [1, 2, 4]  # numbers of drafts, each 1 to 16
    device: str = "auto"  # where to compute, one of "auto", "cpu", "cuda"
    model: str = "smollm2"  # name or folder, any text
    verbose: bool = False  # print every step
"""

from __future__ import annotations

import ast
import difflib
import io
import json
import math
import operator
import re
import shlex
import tokenize
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ParameterError(ValueError):
    """A parameter that the notebook does not have, or a value that it does not allow, told in one line."""


SCALARS = {"int": int, "float": float, "bool": bool, "str": str}
COMPARE = {"<": operator.lt, "<=": operator.le}
NUMBER = r"[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True)
class Parameter:
    """One knob of a notebook: its type as written, its default, what it means and which values it takes."""

    name: str
    type: str  # "int", "float", "bool", "str", or a list of one of them: "list[int]"
    default: Any
    description: str
    range: str  # as written, "" if the comment gives none
    allows: Callable[[Any], bool] | None = None  # of one value, or of one item of a list

    @property
    def item_type(self) -> str:
        """The type of one item for a list, the type itself otherwise."""
        return self.type.removeprefix("list[").removesuffix("]")

    def check(self, notebook: str, value: Any) -> Any:
        """The value in the declared type (an int becomes a float where one is declared), or a ParameterError."""
        if not self.type.startswith("list["):
            return self._check_item(notebook, self.name, value)
        if not isinstance(value, list | tuple):
            raise self._refusal(notebook, self.name, value, f"is not of type {self.type}")
        return [self._check_item(notebook, f"{self.name}[{i}]", item) for i, item in enumerate(value)]

    def _check_item(self, notebook: str, label: str, value: Any) -> Any:
        wanted = SCALARS[self.item_type]
        if wanted is float and type(value) is int:
            try:
                value = float(value)
            except OverflowError:
                raise self._refusal(notebook, label, value, "is too large") from None
        if type(value) is not wanted:
            raise self._refusal(notebook, label, value, f"is not of type {self.item_type}")
        if wanted is float and not math.isfinite(value):
            raise self._refusal(notebook, label, value, "is not a finite number")
        if self.allows is not None and not self.allows(value):
            raise self._refusal(notebook, label, value, "is not allowed" if wanted is str else "is out of range")
        return value

    def _refusal(self, notebook: str, label: str, value: Any, what: str) -> ParameterError:
        shown = json.dumps(value) if isinstance(value, str) else repr(value)
        shown = shown if len(shown) <= 60 else shown[:59] + "…"
        allowed = self.range or ("True or False" if self.type == "bool" else self.type)
        return ParameterError(f"{notebook}: {label} = {shown} {what}: {allowed}.")


def parse_range(text: str) -> Callable[[Any], bool] | None:
    """The test that a range stands for, or None if the text is no range.

    Understood: `1 to 16`, `0 < name <= 2`, `name > 0`, `at least 1`, `at most 5`, `one of "a", "b"`, `any text`,
    `any integer`, `any number`, `true or false`, each also after `each` for the items of a list.
    """
    text = re.sub(r"^each\s+", "", text.strip())
    if re.fullmatch(r"any (text|integer|number)|true or false", text, re.IGNORECASE):
        return lambda value: True
    if match := re.fullmatch(rf"({NUMBER}) to ({NUMBER})", text):
        low, high = map(float, match.groups())
        return lambda value: low <= value <= high
    if match := re.fullmatch(rf"at (least|most) ({NUMBER})", text):
        bound = float(match[2])
        return (lambda value: value >= bound) if match[1] == "least" else (lambda value: value <= bound)
    if match := re.fullmatch(rf"({NUMBER}) (<=?) \w+ (<=?) ({NUMBER})", text):
        low, lower, upper, high = float(match[1]), COMPARE[match[2]], COMPARE[match[3]], float(match[4])
        return lambda value: lower(low, value) and upper(value, high)
    if match := re.fullmatch(rf"[A-Za-z]\w* ([<>]=?) ({NUMBER})", text):
        compare = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}[match[1]]
        bound = float(match[2])
        return lambda value: compare(value, bound)
    if text.startswith("one of "):
        try:
            choices = ast.literal_eval(f"[{text.removeprefix('one of ')}]")
        except (SyntaxError, ValueError):
            return None
        return lambda value: value in choices
    return None


def split_comment(comment: str) -> tuple[str, str]:
    """A parameter's comment as (what it means, its range); the range is "" if no end of the comment is one."""
    text = comment.lstrip("# ").strip()
    for start in [0, *(match.end() for match in re.finditer(",", text))]:
        if parse_range(tail := text[start:].strip()) is not None:
            return text[:start].rstrip(", "), tail
    return text, ""


def read_parameters(path: Path) -> dict[str, Parameter]:
    """The parameters that a notebook declares, by name, in order.

    Raises ParameterError if the notebook cannot be read, has no cell tagged `parameters`, or has a line there
    that is not `name: type = literal`.
    """
    path = Path(path)
    notebook = f"{path.parent.name}/{path.stem}"
    try:
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParameterError(f"{notebook} cannot be read as a notebook: {error}") from None
    for cell in cells:
        if cell.get("cell_type") == "code" and "parameters" in cell.get("metadata", {}).get("tags", []):
            return parse_parameters(notebook, "".join(cell["source"]))
    raise ParameterError(f"{notebook} has no cell tagged parameters.")


def parse_parameters(notebook: str, source: str) -> dict[str, Parameter]:
    """The parameters declared by the source of a `parameters` cell."""
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"{notebook}: line {error.lineno} of the parameters is not Python.") from None
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    declared = {}
    for node in statements:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None):
            line = source.splitlines()[node.lineno - 1].strip()
            raise ParameterError(f"{notebook}: a parameter is written `name: type = value  # words, range`, not {line}")
        kind, name = ast.unparse(node.annotation), node.target.id
        if kind.removeprefix("list[").removesuffix("]") not in SCALARS:
            raise ParameterError(f"{notebook}: {name} has type {kind}; use int, float, bool, str or a list of one.")
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ParameterError(f"{notebook}: the default of {name} is not a literal value.") from None
        description, allowed = split_comment(comments.get(node.end_lineno, ""))
        parameter = Parameter(name, kind, default, description, allowed, parse_range(allowed))
        parameter.check(notebook, default)
        declared[name] = parameter
    return declared


def check_parameters(name: str, declared: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """Every declared parameter with its value: the given one where there is one, the default otherwise.

    name: the notebook, for the message. Raises ParameterError on the first name or value that is not allowed.
    """
    for given in values:
        if given not in declared:
            near = difflib.get_close_matches(str(given), declared, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise ParameterError(
                f"{name}: {given} is not a parameter of this notebook.{hint} (all: make params N={name})"
            )
    return {key: item.check(name, values.get(key, item.default)) for key, item in declared.items()}


def read_assignments(name: str, declared: Mapping[str, Parameter], text: str) -> dict[str, Any]:
    """Values from a command line, `draft_length=8 temperature=0.7 drafts=[1,2]`, unchecked."""
    word = r"""(?:[^\s\['"]|\[[^\]]*\]|'[^']*'|"[^"]*")+"""
    left = re.sub(word, "", text).strip()
    if left:
        raise ParameterError(f"{name}: the parameters {text!r} cannot be read: {left[0]} is not closed.")
    values = {}
    for assignment in re.findall(word, text):
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ParameterError(f"{name}: {assignment} is not of the form parameter=value.")
        if not value.startswith("["):  # quotes inside a list are Python's, others the shell's
            value = " ".join(shlex.split(value))
        values[key] = value if key in declared and declared[key].type == "str" else _literal(value)
    return values


def _literal(text: str) -> Any:
    """The Python value that a text spells, or the text itself."""
    if re.fullmatch(r"[-+]?(nan|inf(inity)?)", text, re.IGNORECASE):
        return float(text)
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return text


def read_profile(path: Path) -> dict[str, Any]:
    """The values of a profile, NAME.paper.yaml, unchecked; ParameterError if it is missing or no mapping."""
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML that reads 1e-3 as the number it looks like."""

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )
    name = f"{path.parent.name}/{path.name}"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        raise ParameterError(f"notebooks/{name} is missing: it holds the parameters of the full run.") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ParameterError(f"notebooks/{name} cannot be read: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ParameterError(f"notebooks/{name} is not a mapping of parameters to values.")
    return values
