"""A Study is one run of one notebook: its seeds, device and style, and what it found."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from workbook import paths
from workbook.data import sha256
from workbook.notebook import check_parameters, read_parameters


class OracleFailed(AssertionError):
    """An independent check disagrees with the implementation."""


@dataclass(frozen=True)
class Published:
    """A value that the paper states, its unit, and where it stands there."""

    value: float
    unit: str
    where: str


@dataclass(frozen=True)
class Measured:
    """A value of this run with its interval.

    n: number of independent units (prompts, seeds, questions) behind the interval; timed: whether it is a timing;
    tolerance: relative difference from the committed record that `make verify` accepts on another machine.
    """

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None
    unit: str = ""
    timed: bool = False
    tolerance: float | None = None

    def __str__(self) -> str:
        text = f"{self.value:.4g}"
        if self.low is not None and self.high is not None:
            text += f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{text} {self.unit}".strip()


@dataclass(frozen=True)
class Rule:
    """How a verdict follows from a measurement: the rule in words, and the function that applies it."""

    words: str
    verdict: Callable[[Measured], str]


def at_least(bound: float) -> Rule:
    """Reproduced when the whole interval is at or above `bound`; partly when only the value is."""

    def verdict(m: Measured) -> str:
        low = m.value if m.low is None else m.low
        return "reproduced" if low >= bound else "partly" if m.value >= bound else "not reproduced"

    return Rule(f"interval ≥ {bound:g}", verdict)


def at_most(bound: float) -> Rule:
    """Reproduced when the whole interval is at or below `bound`; partly when only the value is."""

    def verdict(m: Measured) -> str:
        high = m.value if m.high is None else m.high
        return "reproduced" if high <= bound else "partly" if m.value <= bound else "not reproduced"

    return Rule(f"interval ≤ {bound:g}", verdict)


def within(target: float, tolerance: float) -> Rule:
    """Reproduced when the value is within `tolerance` of `target`."""
    return Rule(
        f"{target:g} ± {tolerance:g}",
        lambda m: "reproduced" if abs(m.value - target) <= tolerance else "not reproduced",
    )


def reaches(goal: float, floor: float) -> Rule:
    """Reproduced when the value is at least `goal`, the paper's own; partly when only the interval is above `floor`."""

    def verdict(m: Measured) -> str:
        low = m.value if m.low is None else m.low
        return "reproduced" if m.value >= goal else "partly" if low > floor else "not reproduced"

    return Rule(f"value ≥ {goal:g}; partly if interval > {floor:g}", verdict)


def out_of_reach() -> Rule:
    """For a claim that this machine cannot decide; the claim's note says why and what it would take."""
    return Rule("not decidable here", lambda m: "out of reach")


class Study:
    """One run of one notebook.

    name: "chapter/notebook". parameters: the notebook's `globals()`; what its parameters cell declares is read from
    there, checked against the declared types and ranges, and kept in the record.
    Sets the seed of random, numpy and torch, the number of torch threads, the device and the plotting style.
    """

    def __init__(self, name: str, *, title: str, arxiv: str, year: int, parameters: Mapping[str, Any]):
        self.name = name
        self.paper = {"title": title, "arxiv": arxiv, "year": year}
        declared = read_parameters(paths.NOTEBOOKS / f"{name}.ipynb")
        self.parameters = check_parameters(
            name, declared, {key: parameters[key] for key in declared if key in parameters}
        )
        self.profile = os.environ.get("WORKBOOK_PROFILE", "interactive")
        self.folder = Path(os.environ.get("WORKBOOK_OUT") or paths.BUILD / "interactive" / name)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._started = time.perf_counter()
        self._oracles: list[dict] = []
        self._claims: list[dict] = []
        self._quantities: list[dict] = []
        self._figures: list[dict] = []
        self._finding = ""
        self.seed = int(self.parameters.get("seed", 0))
        random.seed(self.seed)
        np.random.seed(self.seed)  # noqa: NPY002  for libraries that still draw from the global generator
        self.threads = int(self.parameters.get("threads", 2))
        self.device = self._start_torch(self.parameters.get("device", "auto"))
        from workbook import plotting

        plotting.use_style()

    def _start_torch(self, device: str) -> str:
        if "torch" not in sys.modules:
            return "cpu"
        import torch

        torch.manual_seed(self.seed)
        torch.set_num_threads(self.threads)
        if device == "auto":
            return "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f'{self.name}: device = "cuda", but torch sees no CUDA device. Use "cpu" or "auto".')
        return device

    # -- what a notebook reports ------------------------------------------------------------------------------------

    def oracle(
        self,
        name: str,
        *,
        value: float,
        expected: float | None = None,
        at_most: float | None = None,
        at_least: float | None = None,
        tolerance: float = 0.0,
    ) -> None:
        """Compare `value` with an independent answer; raise OracleFailed when it is outside.

        Exactly one of expected, at_most, at_least; tolerance is absolute.
        """
        bounds = {"=": expected, "≤": at_most, "≥": at_least}
        given = [(sign, float(bound)) for sign, bound in bounds.items() if bound is not None]
        if len(given) != 1:
            raise TypeError("an oracle takes exactly one of expected, at_most and at_least.")
        (sign, bound), value = given[0], float(value)
        passed = {
            "=": abs(value - bound) <= tolerance,
            "≤": value <= bound + tolerance,
            "≥": value >= bound - tolerance,
        }[sign]
        passed = bool(passed and math.isfinite(value))
        stored = value if math.isfinite(value) else None  # JSON has no NaN
        self._oracles.append(
            {"name": name, "value": stored, "bound": f"{sign} {bound:.12g}", "tolerance": tolerance, "passed": passed}
        )
        if not passed:
            raise OracleFailed(
                f"{self.name}: oracle '{name}': {value:.12g} is not {sign} {bound:.12g} (tolerance {tolerance:g})."
            )

    def show_oracles(self) -> None:
        """Print the oracles so far as a table that is the same on every machine."""
        width = max(len(o["name"]) for o in self._oracles)
        for o in self._oracles:
            print(f"{o['name']:<{width}}  tolerance {o['tolerance']:<8g} {'ok' if o['passed'] else 'FAILED'}")

    def claim(
        self, id: str, statement: str, *, measured: Measured, rule: Rule, paper: Published | None = None, note: str = ""
    ) -> str:
        """Record one claim of the paper and return the verdict, which the rule computes and nothing else."""
        verdict = rule.verdict(measured)
        if verdict != "reproduced" and not note:
            raise ValueError(f"{self.name}: claim {id} is '{verdict}': give a note that says why.")
        self._claims.append(
            {
                "id": id,
                "statement": statement,
                "paper": asdict(paper) if paper else None,
                "measured": _measured(measured),
                "rule": rule.words,
                "verdict": verdict,
                "note": note,
            }
        )
        return verdict

    def quantity(self, name: str, measured: Measured) -> None:
        """Record a number that is no claim of the paper: a load time, an overhead, a size."""
        self._quantities.append({"name": name, **_measured(measured)})

    def figure(self, name: str, fig, *, data, alt: str) -> None:
        """Write NAME.svg, NAME.png and NAME.csv (the tidy table that was drawn), and show the figure.

        alt: the sentence that the figure says, with numbers of this run.
        """
        from workbook import plotting

        files = [*plotting.write(fig, self.folder / name, alt=alt), self.folder / f"{name}.csv"]
        data.to_csv(files[-1], index=False, float_format="%.8g", lineterminator="\n")
        self._figures.append(
            {
                "file": f"{name}.svg",
                "png": f"{name}.png",
                "data": f"{name}.csv",
                "alt": alt,
                "sha256": {path.name: sha256(path) for path in files},
            }
        )
        plotting.show(fig)

    def finding(self, text: str) -> None:
        """The notebook's one-line answer, with its number; it stands in the scorecard."""
        self._finding = text

    def show_claims(self):
        """The claims as a table (a pandas Styler) for the reader."""
        import pandas as pd

        rows = [
            {
                "claim": f"{c['id']}: {c['statement']}",
                "paper": f"{c['paper']['value']:g} {c['paper']['unit']} ({c['paper']['where']})" if c["paper"] else "–",
                "measured here": str(Measured(**{k: c["measured"][k] for k in ("value", "low", "high", "unit")})),
                "rule": c["rule"],
                "verdict": c["verdict"],
                "note": c["note"],
            }
            for c in self._claims
        ]
        return pd.DataFrame(rows).style.hide().set_properties(**{"text-align": "left", "white-space": "pre-wrap"})

    def finish(self) -> Path:
        """Write record.json and return its path."""
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
        seeds = self.parameters.get("seeds", self.seed)
        record = {
            "notebook": self.name,
            "paper": self.paper,
            "finding": self._finding,
            "profile": self.profile,
            "parameters": self.parameters,
            "seeds": list(range(self.seed, self.seed + seeds))
            if isinstance(seeds, int) and "seeds" in self.parameters
            else [self.seed],
            "environment": environment(self.threads, self.device),
            "oracles": self._oracles,
            "claims": self._claims,
            "quantities": self._quantities,
            "figures": self._figures,
            "seconds": round(time.perf_counter() - self._started, 1),
            "peak_memory_mib": round(peak),
            "timing": any(c["measured"]["kind"] == "timed" for c in self._claims),
        }
        path = self.folder / "record.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
        return path


def _measured(m: Measured) -> dict:
    tolerance = m.tolerance if m.tolerance is not None else (0.5 if m.timed else 0.02)
    numbers = {k: None if v is None else float(v) for k, v in (("value", m.value), ("low", m.low), ("high", m.high))}
    return {**numbers, "n": m.n, "unit": m.unit, "kind": "timed" if m.timed else "counted", "tolerance": tolerance}


def environment(threads: int, device: str) -> dict:
    """Versions and hardware that a number may depend on."""
    from importlib.metadata import PackageNotFoundError, version

    packages = {}
    for name in ("torch", "transformers", "diffusers", "numpy", "scipy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cpu_flags": cpu_flags(),
        "cores": os.cpu_count(),
        "threads": threads,
        "device": device,
        **packages,
    }


def cpu_model() -> str:
    """The processor's name, as the system gives it."""
    return _cpuinfo().get("model name") or platform.processor() or "unknown"


def cpu_flags() -> list[str]:
    """Those instruction sets of the processor that decide which kernels torch picks."""
    flags = set(_cpuinfo().get("flags", "").split())
    return [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_int8") if f in flags]


def _cpuinfo() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
