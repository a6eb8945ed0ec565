"""`python -m workbook run | verify | why | scorecard | list | params`: what the Makefile calls, one command each."""

from __future__ import annotations

import argparse
import signal
import sys
from typing import NoReturn

from workbook import notebook
from workbook.parameters import ParameterError
from workbook.plan import PROFILES, plan


def run(options: argparse.Namespace) -> int:
    """Run one notebook and move its figures into place."""
    from workbook.run import run

    chosen = plan(notebook.find(options.notebook), options.profile, options.set)
    return run(chosen, if_stale=options.if_stale)


def verify(options: argparse.Namespace) -> int:
    """Run the notebooks once more and compare their numbers with the committed ones."""
    from workbook.verify import verify

    return verify(_selected(options), run=not options.compare)


def why(options: argparse.Namespace) -> int:
    """Say which notebooks would run, and why."""
    from workbook.graph import stale

    code = 0
    for name in _selected(options):
        try:
            reasons = stale(plan(name, options.profile, options.set))
        except (ParameterError, notebook.NotebookError) as error:
            print(error, file=sys.stderr)
            code = 2
            continue
        print(f"{name}: up to date" if not reasons else f"{name} has to run:")
        for reason in reasons:
            print(f"  {reason}")
    return code


def listing(options: argparse.Namespace) -> int:
    """List the notebooks and whether their figures are up to date."""
    from workbook.graph import stale

    rows = []
    for name in [*notebook.names(), *notebook.names(checkpoints=True)]:
        try:
            state = "stale" if stale(plan(name)) else "up to date"
        except (ParameterError, notebook.NotebookError):
            state = "refused"
        rows.append((name, state, notebook.title(notebook.path_of(name))))
    width = max((len(name) for name, _, _ in rows), default=0)
    for name, state, title in rows:
        print(f"{name:<{width}}  {state:<10}  {title}")
    return 0


def params(options: argparse.Namespace) -> int:
    """List the parameters of a notebook: their values in both profiles, their ranges and what they mean."""
    if not options.notebook:
        raise ParameterError("Which notebook? For example: make params N=decoding/spectr")
    name = notebook.find(options.notebook)
    paper, quick = plan(name).parameters, plan(name, "quick").parameters
    rows = [("parameter", "type", "quick", "paper", "allowed", "what it is")]
    for key, item in notebook.read_parameters(notebook.path_of(name)).items():
        rows.append((key, item.type, repr(quick[key]), repr(paper[key]), item.range, item.description))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    for row in rows:
        print("  ".join([*(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)), row[5]]))
    return 0


def scorecard(options: argparse.Namespace) -> int:
    """Write the table of the README and figures/scorecard.svg from the records."""
    from workbook.scorecard import write

    return write()


def _selected(options: argparse.Namespace) -> list[str]:
    return [notebook.find(options.notebook)] if options.notebook else notebook.names()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m workbook", description=__doc__.partition(":")[2].strip())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for word, function in {
        "run": run, "verify": verify, "why": why, "scorecard": scorecard, "list": listing, "params": params,
    }.items():  # fmt: skip
        command = commands.add_parser(word, help=function.__doc__, description=function.__doc__)
        command.set_defaults(function=function)
        if word in ("run", "verify", "why", "params"):
            optional = {} if word == "run" else {"nargs": "?", "default": ""}
            command.add_argument("notebook", help="CHAPTER/NAME, for example decoding/spectr", **optional)
        if word in ("run", "why"):
            command.add_argument("--profile", choices=PROFILES, default="paper")
            command.add_argument("--set", default="", metavar="'NAME=VALUE …'", help="other parameters")
        if word == "verify":
            command.add_argument("--compare", action="store_true", help="compare the last second run, run nothing")
        if word == "run":
            command.add_argument("--if-stale", action="store_true", help="only if its figures are not up to date")
    return parser


def _on_terminate(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Run a command. What the user can put right is told in one line; its exit status is 2."""
    signal.signal(signal.SIGTERM, _on_terminate)
    options = _parser().parse_args(arguments)
    try:
        return options.function(options)
    except (ParameterError, notebook.NotebookError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `make list | head`
        return 1


if __name__ == "__main__":
    sys.exit(main())
