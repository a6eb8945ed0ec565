"""The graph (doit): one task a notebook, stale by the content of what it is made from (lib/workbook/graph.py).

`make figures` calls it. Its settings come as environment variables, the Makefile's own:
N (one notebook), PROFILE (paper, quick, verify), P (other parameters), JOBS, RUN (prefix of each notebook's command),
FORCE (run what is up to date as well).
"""

import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "lib"))

from workbook import notebook
from workbook.graph import stale
from workbook.parameters import ParameterError
from workbook.plan import Plan, plan
from workbook.report import Report, session

ONE, PROFILE, OTHER = (os.environ.get(name, "").strip() for name in ("N", "PROFILE", "P"))
PREFIX, FORCE = shlex.split(os.environ.get("RUN", "")), os.environ.get("FORCE", "") not in ("", "0")

JOBS = os.environ.get("JOBS", "").strip() or "1"
if not JOBS.isdecimal():
    sys.exit(f"JOBS={JOBS} is not a number of notebooks to run side by side.")
JOBS = int(JOBS)
session.force = FORCE

DOIT_CONFIG = {
    "default_tasks": ["figures"],
    "reporter": Report,
    "continue": True,  # past a failed notebook
    "always": FORCE,
    "num_process": JOBS if JOBS > 1 else 0,
    "par_type": "thread",
    "backend": "sqlite3",
    "dep_file": ":memory:",  # all state is in build/stamps/, one file a notebook
}


def execute(chosen: Plan):
    """Run one notebook in a process of its own."""
    command = [*PREFIX, sys.executable, "-m", "workbook", "run", chosen.name, "--profile", PROFILE or "paper"]
    command += ["--set", OTHER] if OTHER else []
    return session.run(command if FORCE else [*command, "--if-stale"], dict(os.environ))


def refuse(message: str):
    """Fail for a notebook whose parameters are refused, while the others run."""
    print(message, file=sys.stderr)
    return False


def notebook_tasks(names: list[str]):
    """A task for each notebook; those that measure time come last, so that they do not hold up the others."""
    if OTHER and not ONE:
        sys.exit("P= changes the parameters of one notebook: say which, for example N=decoding/spectr")
    for name in sorted(names, key=lambda name: notebook.is_timing(notebook.path_of(name))):
        try:
            chosen = plan(name, PROFILE or "paper", OTHER)
        except (ParameterError, notebook.NotebookError) as error:
            if ONE:
                sys.exit(str(error))
            yield {"name": name, "actions": [(refuse, [str(error)])], "meta": {"name": name, "plan": None}}
            continue
        yield {
            "name": name,
            "doc": f"run notebooks/{name}.ipynb",
            "actions": [(execute, [chosen])],
            "uptodate": [(lambda chosen: not stale(chosen), [chosen])],
            "meta": {"name": name, "plan": chosen},
            "verbosity": 2,
        }


def selected(*, checkpoints: bool) -> list[str]:
    """The notebook that N names if it is of that kind, every one if N is not given."""
    known = notebook.names(checkpoints=checkpoints)
    if not ONE:
        return known
    try:
        name = notebook.find(ONE)
    except notebook.NotebookError as error:
        sys.exit(str(error))
    return [name] if name in known else []


def task_figures():
    """Every figure of the workbook."""
    yield {"name": None, "doc": "run the notebooks whose figures are stale"}
    yield from notebook_tasks(selected(checkpoints=False))


def task_checkpoints():
    """The models that ship in data/checkpoints/."""
    yield {"name": None, "doc": "train the models that ship in data/checkpoints/"}
    yield from notebook_tasks(selected(checkpoints=True))
