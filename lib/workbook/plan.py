"""What one run of one notebook is: its profile, its parameters, and where its products go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from workbook import notebook, paths
from workbook.parameters import ParameterError, check_parameters, read_assignments, read_parameters, read_profile

PROFILES = ("paper", "quick", "verify")  # verify: the paper profile once more, beside the committed one


@dataclass(frozen=True)
class Plan:
    """One notebook with checked parameters. Only the paper profile reaches figures/; all else stays under build/."""

    name: str
    profile: str  # paper, quick, verify or custom
    parameters: dict[str, Any]

    @property
    def notebook(self) -> Path:
        return notebook.path_of(self.name)

    @property
    def base(self) -> Path:
        """The part of build/ that belongs to the profile."""
        return paths.BUILD if self.profile == "paper" else paths.BUILD / self.profile

    @property
    def figures(self) -> Path:
        """The folder of figures, tables and record.json."""
        return (paths.FIGURES if self.profile == "paper" else self.base) / self.name

    @property
    def executed(self) -> Path:
        """The notebook with its outputs, of the last good run."""
        return self.base / "executed" / f"{self.name}.ipynb"

    @property
    def failed(self) -> Path:
        """The notebook as far as the last run came, if that failed."""
        return self.base / "failed" / f"{self.name}.ipynb"

    @property
    def log(self) -> Path:
        return self.base / "logs" / f"{self.name}.log"

    @property
    def outcome(self) -> Path:
        """How the last run ended, for the table that closes `make figures`."""
        return self.base / "logs" / f"{self.name}.json"

    @property
    def stamp(self) -> Path:
        """What went into the last good run and what came out, by digest."""
        return self.base / "stamps" / f"{self.name}.json"

    @property
    def lock(self) -> Path:
        return self.base / "locks" / f"{self.name}.lock"

    @property
    def work(self) -> Path:
        """The folder of the run under way."""
        return self.base / "running" / self.name


def plan(name: str, profile: str = "paper", assignments: str = "") -> Plan:
    """The run of CHAPTER/NAME in a profile, with extra parameters (`draft_length=8 …`) making it a custom one.

    Raises ParameterError or NotebookError in one line.
    """
    if profile not in PROFILES:
        raise ParameterError(f"PROFILE={profile} is not a profile: use quick or paper.")
    path = notebook.path_of(name)
    declared = read_parameters(path)
    full = path.with_name(path.stem + ".paper.yaml")
    alone = name.startswith(f"{notebook.CHECKPOINTS}/") and not full.exists()  # its defaults are the full run
    values = {} if profile == "quick" or alone else read_profile(full)
    extra = read_assignments(name, declared, assignments)
    return Plan(name, "custom" if extra else profile, check_parameters(name, declared, values | extra))
