"""Run one notebook as a transaction: executed apart, verified, moved into place as the last step, under a lock.

Whatever happens on the way (a cell that raises, a killed kernel, a full disk, Ctrl-C), the figures, the record and the
executed notebook of the last good run stay as they are, and the next `make figures` runs the notebook again.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from workbook import graph, notebook, paths
from workbook.files import digest, locked, read_object, read_strict, shown, write_json
from workbook.plan import Plan

TIMEOUT, CHECKPOINT_TIMEOUT = 30 * 60, 24 * 60 * 60  # seconds for a whole notebook


class RunError(Exception):
    """A run that did not come to a good end, told in one line."""

    code = 1


def run(plan: Plan, *, if_stale: bool = False) -> int:
    """Run the notebook and move its products into place. Prints one line on how it went; returns the exit status.

    if_stale: do nothing if, once the lock is held, the figures are what their ingredients make.
    """
    waiting = f"{plan.name}: waiting for {{holder}}, which runs it now"
    with locked(plan.lock, waiting=waiting):
        recover(plan)
        if if_stale and not graph.stale(plan):
            return 0
        started = time.monotonic()
        plan.outcome.unlink(missing_ok=True)
        result: dict = {"status": "failed", "log": shown(plan.log)}
        try:
            record = _transaction(plan)
            result |= summary(record) | {"status": "done"}
            code = 0
        except Exception as error:
            result["error"], code = _explain(error)
        finally:
            shutil.rmtree(plan.work, ignore_errors=True)
        result["seconds"] = round(time.monotonic() - started, 1)
        with suppress(OSError):  # a full disk must not hide the reason
            write_json(plan.outcome, result)
        _say(plan, result)
        return code


def summary(record: dict) -> dict:
    """What the closing table says of a record: oracles passed of all, and how many claims have which verdict."""
    oracles, verdicts = record.get("oracles", []), [claim["verdict"] for claim in record.get("claims", [])]
    return {
        "oracles": [sum(bool(oracle["passed"]) for oracle in oracles), len(oracles)],
        "verdicts": {verdict: verdicts.count(verdict) for verdict in dict.fromkeys(verdicts)},
    }


def recover(plan: Plan) -> None:
    """Undo or finish the exchange of a run that was killed in the middle of it, and sweep what it left."""
    incoming, outgoing = _beside(plan)
    if outgoing.exists():
        if plan.figures.exists():
            shutil.rmtree(outgoing)
        else:
            outgoing.rename(plan.figures)
    for leftover in (incoming, plan.work):
        shutil.rmtree(leftover, ignore_errors=True)


def _transaction(plan: Plan) -> dict:
    made_from = graph.ingredients(plan)
    out = plan.work / "out"
    executed = plan.work / "executed.ipynb"
    for folder in (out, plan.log.parent, plan.executed.parent, plan.failed.parent):
        folder.mkdir(parents=True, exist_ok=True)
    plan.failed.unlink(missing_ok=True)
    with open(plan.log, "w", encoding="utf-8") as log:
        try:
            _check_data(made_from)
            with _cores(plan):
                _execute(plan, executed, out, log)
            check_executed(executed)
            record = check_products(plan, out)
        except Exception as error:
            with suppress(OSError):
                print(_explain(error)[0], file=log, flush=True)
            with suppress(OSError):
                executed.replace(plan.failed)
            raise
    _install(plan, out, executed)
    graph.write_stamp(plan, made_from, record.get("data", []))
    shutil.rmtree(_beside(plan)[1], ignore_errors=True)
    return record


def _check_data(made_from: dict[str, str]) -> None:
    """Refuse a data file that is not the one of the manifest, before any kernel starts."""
    named = [name.removeprefix("data/") for name in made_from if name.startswith("data/")]
    if named:
        from workbook import data

        for name in named:
            data.checked(name)


@contextmanager
def _cores(plan: Plan) -> Iterator[None]:
    """Take the cores: alone for a notebook that measures time, side by side for the others.

    With RUN every notebook is on a node of its own, and nothing has to wait.
    """
    if os.environ.get("RUN"):
        yield
        return
    alone = notebook.is_timing(plan.notebook)
    waiting = f"{plan.name}: waiting for " + (
        "the other notebooks, it measures time" if alone else "one that measures time"
    )
    with locked(paths.BUILD / "locks" / "cores", shared=not alone, waiting=waiting):
        yield


def _execute(plan: Plan, executed: Path, out: Path, log) -> None:
    cells = len(notebook.read(plan.notebook)["cells"])
    progress = Progress(plan.name, cells)
    # jsonschema would import a parser of IRIs that takes a second to build; a notebook's schema has no IRI
    sys.modules.setdefault("rfc3987_syntax", None)
    from workbook.kernel import Execution  # papermill, nbclient: a second or two

    os.environ.update(
        WORKBOOK_OUT=str(out.resolve()),
        WORKBOOK_PROFILE="paper" if plan.profile == "verify" else plan.profile,
        HF_HUB_OFFLINE="1",
        TRANSFORMERS_OFFLINE="1",
        MPLBACKEND="agg",
        PYTHONHASHSEED="0",
        GOMP_SPINCOUNT=os.environ.get("GOMP_SPINCOUNT", "1000"),  # waiting threads sleep: notebooks share cores
        PYTHONUTF8="1",
        SOURCE_DATE_EPOCH="0",
        IPYTHONDIR=str((plan.work / "ipython").resolve()),  # no start-up files of the user
        PYTHONPATH=os.pathsep.join([str(graph.LIBRARY), *filter(None, [os.environ.get("PYTHONPATH")])]),
    )
    count = sum(1 for _ in notebook.code_cells(plan.notebook))
    seconds = notebook.settings(plan.notebook).get(
        "timeout", CHECKPOINT_TIMEOUT if plan.name.startswith(f"{notebook.CHECKPOINTS}/") else TIMEOUT
    )
    print(f"{plan.name}, {plan.profile}, {count} code cells, parameters {plan.parameters}", file=log, flush=True)
    try:
        Execution(plan.notebook, executed, plan.parameters, log).run(timeout=seconds, tick=progress)
    finally:
        progress.clear()


def check_executed(path: Path) -> None:
    """Refuse an executed notebook that is not strict JSON, has a cell that did not run, or stores an error.

    The file alone is believed: papermill's own metadata call cells completed that never ran.
    """
    try:
        cells = read_strict(path)["cells"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"the executed notebook is not a whole one: {error}") from None
    for number, cell in enumerate(cells, 1):
        if cell["cell_type"] != "code" or not "".join(cell["source"]).strip():
            continue
        if any(output["output_type"] == "error" for output in cell["outputs"]):
            raise RunError(f"cell {number} of the executed notebook stores an error")
        if cell["execution_count"] is None:
            raise RunError(f"cell {number} of the executed notebook did not run")


def check_products(plan: Plan, out: Path) -> dict:
    """The record of the run, after it and the figures that it names were found whole and its oracles passed."""
    if plan.name.startswith(f"{notebook.CHECKPOINTS}/") and not (out / "record.json").exists():
        return {}  # what it makes is in data/checkpoints/
    try:
        record = read_strict(out / "record.json")
        oracles, figures, claims = record["oracles"], record["figures"], record["claims"]
        failed = [oracle["name"] for oracle in oracles if oracle["passed"] is not True]
        digests = {name: value for figure in figures for name, value in figure["sha256"].items()}
        drawn = [figure[kind] for figure in figures for kind in ("file", "png", "data") if figure.get(kind)]
        [claim["verdict"] for claim in claims]
    except FileNotFoundError:
        raise RunError("the notebook wrote no record.json (does it call study.finish?)") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"record.json is not a whole record: {error!r}") from None
    if record.get("notebook") != plan.name:
        raise RunError(f"record.json is that of {record.get('notebook')}")
    if failed:
        raise RunError(f"oracle failed: {failed[0]}" + (f" and {len(failed) - 1} more" if failed[1:] else ""))
    if folders := [path.name for path in out.iterdir() if path.is_dir()]:
        raise RunError(f"{folders[0]} is a folder; figures and tables stand side by side")
    for name in [*drawn, *digests]:
        if not (out / name).is_file() or (out / name).stat().st_size == 0:
            raise RunError(f"{name} is missing or empty")
        if name in digests and digest(out / name) != digests[name]:
            raise RunError(f"{name} is not the file that record.json describes")
    return record


def _beside(plan: Plan) -> tuple[Path, Path]:
    """The names beside the figures for the folder on its way in and the one on its way out."""
    return plan.figures.with_name(f".{plan.figures.name}.new"), plan.figures.with_name(f".{plan.figures.name}.old")


def _install(plan: Plan, out: Path, executed: Path) -> None:
    """Exchange the folders by renaming. The old one is deleted after the stamp is written; `recover` does the rest."""
    incoming, outgoing = _beside(plan)
    if any(out.iterdir()):
        plan.figures.parent.mkdir(parents=True, exist_ok=True)
        try:
            _move(out, incoming)
        except BaseException:
            shutil.rmtree(incoming, ignore_errors=True)
            raise
        if plan.figures.exists():
            plan.figures.rename(outgoing)
        incoming.rename(plan.figures)
    executed.replace(plan.executed)


def _move(out: Path, incoming: Path) -> None:
    """Move a folder of files by renaming it, by copying if figures/ is on another file system."""
    try:
        out.rename(incoming)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        incoming.mkdir()
        for path in out.iterdir():
            shutil.copyfile(path, incoming / path.name)


def _explain(error: Exception) -> tuple[str, int]:
    """A failure in one line, and the exit status that goes with it."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "no space left on the disk; the figures of the last good run are untouched", 1
    if isinstance(error, OSError):
        return f"{error.strerror or error}" + (f": {error.filename}" if error.filename else ""), 1
    text = " ".join(str(error).split()) or type(error).__name__
    return text, getattr(error, "code", 1) if isinstance(getattr(error, "code", 1), int) else 1


class Progress:
    """The line that shows which notebook runs, which cell, how far and for how long."""

    def __init__(self, name: str, cells: int) -> None:
        self.name, self.cells, self.started = name, cells, time.monotonic()
        self.bar = sys.stderr.isatty() and os.environ.get("JOBS", "1") in ("", "1")
        self.due = self.started if self.bar else self.started + 30
        self.count = os.environ.get("WORKBOOK_COUNT", "")
        if self.bar:
            print(f"{'╌' * 20} {self.count}{name} starting", end="", file=sys.stderr, flush=True)

    def __call__(self, execution) -> None:
        now = time.monotonic()
        if now < self.due:
            return
        done = int(20 * execution.cell / max(1, self.cells))
        line = f"{self.count}{self.name} {execution.where} of {self.cells}, {now - self.started:.0f} s"
        if self.bar:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\033[K{'━' * done}{'╌' * (20 - done)} {line}"[: width + 4], end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)
        self.due = now + (0.5 if self.bar else 30)

    def clear(self) -> None:
        if self.bar:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def _say(plan: Plan, result: dict) -> None:
    head = f"{os.environ.get('WORKBOOK_COUNT', '')}{plan.name}"
    if result["status"] == "done":
        passed, total = result["oracles"]
        counts = [f"oracles {passed}/{total}", *(f"{n} {verdict}" for verdict, n in result["verdicts"].items())]
        print(f"{head}: {result['seconds']:.1f} s, {', '.join(counts)}", flush=True)
    else:
        print(f"{head}: {result['error']}  (log: {result['log']})", file=sys.stderr, flush=True)


def read_outcome(plan: Plan) -> dict | None:
    """How the last run of the plan ended, None if it did not run."""
    return read_object(plan.outcome)
