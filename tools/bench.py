"""What the workbook itself costs, each beside its limit: `make bench`. Exit status 1 if a limit is passed.

The speeds that the notebooks measure are read from their committed records. A number that is not there yet shows as
"not measured" and passes no judgement.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from workbook import paths
from workbook.files import read_object

sys.path.insert(0, str(paths.ROOT / "tests"))


@dataclass(frozen=True)
class Cost:
    """One row: what, how it is measured, in which unit, and its limit ("<" or ">=" a number)."""

    what: str
    measure: Callable[[], float | None]
    unit: str
    limit: float
    at_least: bool = False

    def row(self) -> tuple[str, str, str, bool]:
        value = self.measure()
        bound = f"{'≥' if self.at_least else '<'} {self.limit:g} {self.unit}"
        if value is None:
            return self.what, "not measured", bound, True
        good = value >= self.limit if self.at_least else value < self.limit
        return self.what, f"{value:.3g} {self.unit}", bound, good


def best_of(count: int, action: Callable[[], None]) -> float:
    """The least of some timings in seconds: what the thing costs when nothing disturbs it."""
    times = []
    for _ in range(count):
        started = time.perf_counter()
        action()
        times.append(time.perf_counter() - started)
    return min(times)


def python(code: str) -> Callable[[], None]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, cwd=paths.ROOT)


def import_time() -> float:
    """What `import workbook` adds to an empty process."""
    return max(0.0, best_of(5, python("import workbook")) - best_of(5, python("pass")))


def timed_in_process(setup: str, code: str) -> float:
    """Seconds of a piece of code in a fresh process, least of three."""
    program = f"{setup}\nimport time; t = time.perf_counter()\n{code}\nprint(time.perf_counter() - t)"
    command = [sys.executable, "-c", program]
    runs = [subprocess.run(command, check=True, cwd=paths.ROOT, capture_output=True, text=True) for _ in range(3)]
    return min(float(run.stdout.split()[-1]) for run in runs)


def small_checkout() -> tuple[float, float]:
    """(seconds of a `make figures` that finds nothing to do, seconds that the runner adds to an empty notebook)."""
    from tiny import Checkout

    with tempfile.TemporaryDirectory() as folder:
        checkout = Checkout(Path(folder) / "checkout")
        overhead = best_of(2, lambda: checkout.make(N="decoding/one", FORCE="1"))
        checkout.make()
        return best_of(5, checkout.make), overhead


def make(target: str) -> float:
    return best_of(5, lambda: subprocess.run(["make", target], cwd=paths.ROOT, stdout=subprocess.DEVNULL, check=True))


def recorded(name: str, start: str) -> Callable[[], float | None]:
    """A number of a committed record: the quantity whose name starts so, or the claim of that id."""

    def read() -> float | None:
        record = read_object(paths.FIGURES / name / "record.json") or {"claims": [], "quantities": []}
        values = {q["name"]: q["value"] for q in record["quantities"]}
        values |= {c["id"]: c["measured"]["value"] for c in record["claims"]}
        return next((value for key, value in values.items() if key.startswith(start)), None)

    return read


LIBRARIES = "import transformers.models.llama.modeling_llama; from workbook.models import lm"
MNIST = 'data.fashion_mnist("train"); data.fashion_mnist("test")'
RECORDED = [  # what, notebook, start of the quantity's name or id of the claim, unit, limit, at least
    ("spectr: fastest against plain sampling", "decoding/spectr", "fastest decoder over plain", "×", 1.5, True),
    ("spectr: fastest against transformers", "decoding/spectr", "fastest decoder over the best", "×", 1.2, True),
    ("spectr: selection at a position, V = 49,152", "decoding/spectr", "selection, K = 4", "ms", 1, False),
    ("deis: solver overhead, share of the time", "diffusion/deis", "C5", "%", 3, False),
    ("deis: coefficient tables", "diffusion/deis", "coefficients, 20 steps", "ms", 50, False),
    ("kinetics: decode time, relative held-out error", "test-time/kinetics", "C4", "", 0.2, False),
    ("kinetics: block top-k against dense SDPA", "test-time/kinetics", "C6", "×", 2, True),
]


def costs() -> list[Cost]:
    """Every row, in the order of the table."""
    nothing, overhead = small_checkout()
    return [
        Cost("import workbook", import_time, "s", 0.2),
        Cost("make help", lambda: make("help"), "s", 1),
        Cost("make list, all notebooks", lambda: make("list"), "s", 1),
        Cost("make figures with nothing to do", lambda: nothing, "s", 1),
        Cost("runner, on top of a notebook", lambda: overhead, "s", 3),
        Cost("load Fashion-MNIST", lambda: timed_in_process("from workbook import data", MNIST), "s", 1),
        Cost(
            "load SmolLM2, second time and later, libraries imported",
            lambda: timed_in_process(LIBRARIES, "lm.load_lm()"),
            "s",
            3,
        ),
        *(Cost(what, recorded(name, start), unit, limit, least) for what, name, start, unit, limit, least in RECORDED),
    ]


def main() -> int:
    """Print the table; with --json FILE also write it."""
    rows = [cost.row() for cost in costs()]
    width = max(len(what) for what, *_ in rows)
    print(f"{'what':<{width}} | {'measured':>12} | limit")
    print(f"{'-' * width}-|-{'-' * 12}-|-{'-' * 12}")
    for what, measured, limit, good in rows:
        print(f"{what:<{width}} | {measured:>12} | {limit}" + ("" if good else "  PASSED OVER"))
    if sys.argv[1:2] == ["--json"]:
        Path(sys.argv[2]).write_text(json.dumps([row[:3] for row in rows], indent=1, ensure_ascii=False) + "\n")
    return 0 if all(good for *_, good in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
