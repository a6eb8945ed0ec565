"""Run every notebook once more and compare what it found with the committed record, number by number."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field

from workbook import paths
from workbook.files import read_object, shown
from workbook.plan import plan


@dataclass
class Comparison:
    """What differs between two records of one notebook."""

    counted: int = 0  # numbers that repeat exactly on one machine, compared within their tolerance
    timed: int = 0
    differences: list[str] = field(default_factory=list)  # of counted numbers and verdicts: they fail
    timings: list[str] = field(default_factory=list)  # of timed ones: they are reported


def verify(names: list[str], *, run: bool = True) -> int:
    """Run the notebooks into build/verify/ and compare each with figures/. Returns the exit status.

    run: False compares what the last `make verify` made.
    """
    code = 0
    if run:
        one = {"N": names[0]} if len(names) == 1 else {"N": ""}
        settings = os.environ | one | {"PROFILE": "verify", "FORCE": "1", "P": ""}
        code = subprocess.call([sys.executable, "-m", "doit", "figures"], cwd=paths.ROOT, env=settings)
        if code > 2:
            return code
    for name in names:
        committed, again = (plan(name, profile).figures / "record.json" for profile in ("paper", "verify"))
        missing = [path for path in (committed, again) if read_object(path) is None]
        if missing:
            print(f"{name}: no record to compare: {shown(missing[0])}", file=sys.stderr)
            code = 1
            continue
        result = compare(read_object(committed), read_object(again))
        print(
            f"{name}: {result.counted} counted numbers, {len(result.differences)} differ; "
            f"{result.timed} timings, {len(result.timings)} differ"
        )
        for line in result.differences:
            print(f"  DIFFERS  {line}")
        for line in result.timings:
            print(f"  timing   {line}")
        code = 1 if result.differences else code
    return code


def compare(committed: dict, again: dict) -> Comparison:
    """Compare the parameters, claims and quantities of two records, each number within the committed tolerance.

    Tolerances are relative. A verdict that differs counts as a difference, or as a timing if its claim is timed.
    """
    result = Comparison()
    if committed["parameters"] != again["parameters"]:
        result.differences.append("the parameters; the committed record is from another profile")
    before, after = _numbers(committed), _numbers(again)
    for name in [*before, *(name for name in after if name not in before)]:
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            result.differences.append(f"{name} is only in the {'new' if old is None else 'committed'} record")
            continue
        timed = old["kind"] == "timed"
        result.timed, result.counted = result.timed + timed, result.counted + (not timed)
        found = result.timings if timed else result.differences
        if not _close(old["value"], new["value"], old["tolerance"]):
            allowed = f"tolerance {old['tolerance']:.3g} relative"
            found.append(f"{name}: committed {_shown(old)}, now {_shown(new)} ({allowed})")
        if old.get("verdict") != new.get("verdict"):
            found.append(f"{name}: committed '{old.get('verdict')}', now '{new.get('verdict')}'")
    return result


def _numbers(record: dict) -> dict[str, dict]:
    claims = {f"claim {c['id']}": {**c["measured"], "verdict": c["verdict"]} for c in record["claims"]}
    return claims | {q["name"]: q for q in record["quantities"]}


def _close(old: float | None, new: float | None, tolerance: float) -> bool:
    if old is None or new is None:
        return old is new
    return abs(old - new) <= tolerance * max(abs(old), abs(new)) + 1e-12


def _shown(number: dict) -> str:
    return "nothing" if number["value"] is None else f"{number['value']:.6g} {number.get('unit', '')}".strip()
