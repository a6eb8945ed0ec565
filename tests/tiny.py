"""A small checkout of the workbook: the real library, graph and Makefile over notebooks that run in a second."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

PARAMETERS = """\
count: int = 2  # points in the table, 1 to 16
scale: float = 1.0  # factor on each point, 0 < scale <= 10
mode: str = "good"  # what the notebook does, any text
seed: int = 0  # start of the random numbers, 0 to 1000
device: str = "auto"  # where to compute, one of "auto", "cpu", "cuda"
threads: int = 1  # CPU threads, 1 to 64
"""

BODY = """\
import hashlib, json, os, signal, time
from pathlib import Path
out = Path(os.environ["WORKBOOK_OUT"])
mode = os.environ.get("TINY_MODE", mode)
if mode == "wait":
    (out.parents[3] / "waiting").write_text(str(os.getpid()))
    time.sleep(60)
if mode == "die":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "fill":
    (out / "big.bin").write_bytes(os.urandom(1 << 20))
if mode == "nan":
    from IPython.display import display
    display({"application/json": {"x": float("nan")}}, raw=True)
table = "x,y\\n" + "".join(f"{i},{i * scale}\\n" for i in range(count))
picture = f'<svg xmlns="http://www.w3.org/2000/svg"><title>{count} {scale}</title></svg>'
for name, text in {"line.csv": table, "line.svg": picture}.items():
    (out / name).write_text("" if mode == "empty" else text)
sha256 = {name: hashlib.sha256((out / name).read_bytes()).hexdigest() for name in ("line.csv", "line.svg")}
record = {
    "notebook": NAME, "paper": {"title": "A paper", "arxiv": "0000.00000", "year": 2026},
    "profile": os.environ["WORKBOOK_PROFILE"], "parameters": {"count": count, "scale": scale}, "seeds": [seed],
    "environment": {}, "finding": f"The sum is {sum(range(count)) * scale}.",
    "oracles": [{"name": "sum", "value": 1, "bound": 1, "tolerance": 0, "passed": mode != "oracle"}],
    "claims": [{
        "id": "C1", "statement": "More points, more sum", "paper": None, "rule": "at least 1", "note": "",
        "measured": {"value": sum(range(count)) * scale, "low": 0, "high": 9, "n": count, "unit": "",
                     "kind": "counted", "tolerance": 1e-6},
        "verdict": "reproduced" if sum(range(count)) * scale >= 1 else "not reproduced"}],
    "quantities": [{"name": "pid", "value": os.getpid() if mode == "noisy" else 1.0, "unit": "", "kind": "timed",
                    "tolerance": 0.5}],
    "figures": [{"file": "line.svg", "png": None, "alt": "A line.", "data": "line.csv", "sha256": sha256}],
    "seconds": 0.1, "peak_memory_mib": 1, "timing": False,
}
(out / "record.json").write_text(json.dumps(record))
print("done")
"""


def code(source, *tags):
    return {"cell_type": "code", "id": f"c{abs(hash(source)) % 10**8}", "execution_count": None, "outputs": [],
            "metadata": {"tags": list(tags)}, "source": source}  # fmt: skip


def text(source):
    return {"cell_type": "markdown", "id": f"m{abs(hash(source)) % 10**8}", "metadata": {}, "source": source}


def write_notebook(root, name, *, imports="import math", paper="count: 3\n", settings=None):
    """A notebook that draws one figure; `imports` is its cell tagged imports, `settings` its metadata workbook."""
    path = root / "notebooks" / f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    document = {
        "cells": [
            text(f"# {name}"), code(PARAMETERS, "parameters"), code(imports, "imports"),
            code('def double(x):\n    """Twice x."""\n    return 2 * x', "method"),
            code(BODY.replace("NAME", repr(name)), "experiment"),
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                     "language_info": {"name": "python"}, "workbook": settings or {}},
        "nbformat": 4, "nbformat_minor": 5,
    }  # fmt: skip
    path.write_text(json.dumps(document))
    path.with_name(path.stem + ".paper.yaml").write_text(paper)


class Checkout:
    """The small checkout: its files, and the commands that a user runs in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ROOT / "lib", root / "lib", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        for name in ("dodo.py", "Makefile", "pyproject.toml", "requirements.lock"):
            shutil.copy(ROOT / name, root / name)
        (root / "tools").mkdir()
        (root / "tools" / "setup.py").write_text(f"print({sys.executable!r})\n")
        (root / "lib" / "workbook" / "alone.py").write_text('"""A module."""\nVALUE = 1\n')
        through = "def value():\n    from workbook import alone\n    return alone.VALUE\n"
        (root / "lib" / "workbook" / "through.py").write_text(through)
        (root / "data").mkdir()
        self.write_data(b"numbers")
        write_notebook(root, "decoding/one", imports="from workbook import through")
        write_notebook(root, "diffusion/two", imports='import math\ntable = "numbers"')

    def write_data(self, content: bytes) -> None:
        """data/numbers.bin with its manifest."""
        (self.root / "data" / "numbers.bin").write_bytes(content)
        entry = {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content), "licence": "MIT"}
        (self.root / "data" / "MANIFEST.json").write_text(json.dumps({"files": {"numbers.bin": entry}}))

    def environment(self, **settings: str) -> dict[str, str]:
        ours = re.compile("N|P|PROFILE|JOBS|RUN|FORCE|MAKE.*|WORKBOOK_.*")
        kept = {key: value for key, value in os.environ.items() if not ours.fullmatch(key)}
        return kept | {"PYTHONPATH": "lib"} | settings

    def start(self, *command: str, **settings: str) -> subprocess.Popen:
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=self.root, env=self.environment(**settings), **pipes)

    def run(self, *command: str, **settings: str) -> subprocess.CompletedProcess:
        process = self.start(*command, **settings)
        out, err = process.communicate(timeout=400)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def make(self, target: str = "figures", **settings: str) -> subprocess.CompletedProcess:
        """`make target`, with settings as a user gives them: N="decoding/one"."""
        return self.run("make", target, *(f"{key}={value}" for key, value in settings.items()))

    def workbook(self, *arguments: str) -> subprocess.CompletedProcess:
        return self.run(sys.executable, "-m", "workbook", *arguments)

    def products(self, name: str) -> dict[str, bytes]:
        """Figures, tables, record and executed notebook of a notebook, byte by byte."""
        files = [*sorted((self.root / "figures" / name).iterdir()), self.root / "build" / "executed" / f"{name}.ipynb"]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in files}

    def times(self) -> dict[str, int]:
        """When each record was written."""
        return {str(p.relative_to(self.root)): p.stat().st_mtime_ns for p in self.root.glob("figures/*/*/record.json")}
