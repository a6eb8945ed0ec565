"""What `make figures` says: how far it is while it runs, and the table that closes it."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

from doit.exceptions import TaskFailed, UnmetDependency
from doit.reporter import ZeroReporter

from workbook.files import shown
from workbook.graph import stale
from workbook.plan import Plan
from workbook.run import read_outcome

VERDICTS = ("reproduced", "partly", "not reproduced", "out of reach")


class Session:
    """The notebooks of one `make figures`: it starts each in a process of its own, and passes signals on to them."""

    def __init__(self) -> None:
        self.total = self.started = 0
        self.force = False
        self.running: set[subprocess.Popen] = set()
        self.signal = 0
        self.lock = threading.Lock()

    def catch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def run(self, command: list[str], environment: dict[str, str]) -> TaskFailed | None:
        """Run a notebook's command to its end; a TaskFailed if it fails or the session is to stop."""
        with self.lock:
            if self.signal:
                return TaskFailed("stopped")
            self.started += 1
            environment = environment | {"WORKBOOK_COUNT": f"[{self.started}/{max(self.total, self.started)}] "}
            try:
                process = subprocess.Popen(command, env=environment)
            except OSError as error:
                print(f"{command[0]} cannot be started: {error.strerror}", file=sys.stderr)
                return TaskFailed(str(error))
            self.running.add(process)
        code = process.wait()
        self.running.discard(process)
        return TaskFailed(f"exit status {code}") if code else None

    def _on_signal(self, number: int, _frame: object) -> None:
        self.signal = number
        for process in list(self.running):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # Ctrl-C has reached it as well: a second signal changes nothing


session = Session()


class Report(ZeroReporter):
    """doit's reporter: silent on what is up to date, a table at the end if anything ran."""

    desc = "the table that closes make figures"

    def __init__(self, outstream, options) -> None:
        super().__init__(outstream, options)
        self.begun = time.monotonic()
        self.ended: list[tuple[str, Plan | None, bool]] = []
        self.fresh = 0

    def initialize(self, tasks, selected_tasks) -> None:
        session.catch_signals()
        chosen = [task for task in tasks.values() if task.meta and self._selected(task, selected_tasks)]
        plans = [task.meta["plan"] for task in chosen if task.meta["plan"]]
        session.total = len(plans) if session.force else sum(bool(stale(plan)) for plan in plans)

    @staticmethod
    def _selected(task, selected_tasks) -> bool:
        return task.name in selected_tasks or task.name.partition(":")[0] in selected_tasks

    def skip_uptodate(self, task) -> None:
        self.fresh += bool(task.meta)

    def add_success(self, task) -> None:
        if task.meta:
            self.ended.append((task.meta["name"], task.meta["plan"], True))

    def add_failure(self, task, fail) -> None:
        if task.meta and fail.message != "stopped":
            self.ended.append((task.meta["name"], task.meta["plan"], False))
        elif not isinstance(fail, TaskFailed | UnmetDependency):
            self.write(fail.get_msg() + "\n")

    def complete_run(self) -> None:
        if self.ended:
            self.write(table(self.ended, time.monotonic() - self.begun, self.fresh))
        elif not session.signal:
            self.write(f"{self.fresh} notebook{'s' * (self.fresh != 1)} up to date\n")
        if session.signal:
            sys.exit(128 + session.signal)
        if not all(good for _, _, good in self.ended):
            sys.exit(1)


def table(ended: list[tuple[str, Plan | None, bool]], seconds: float, fresh: int) -> str:
    """Notebook, seconds, oracles, verdicts, and for a failed one what failed and where its log is."""
    width = max(len("notebook"), *(len(name) for name, _, _ in ended))
    heads = " ".join(f"{word:>14}" for word in VERDICTS)
    lines = ["", f"{'notebook':<{width}} {'seconds':>8} {'oracles':>8} {heads}"]
    for name, plan, good in ended:
        outcome = (read_outcome(plan) if plan else None) or {}
        took = f"{outcome['seconds']:8.1f}" if "seconds" in outcome else f"{'':8}"
        if good and outcome.get("status") == "done":
            passed, total = outcome["oracles"]
            counts = " ".join(f"{outcome['verdicts'].get(word, 0) or '·':>14}" for word in VERDICTS)
            lines.append(f"{name:<{width}} {took} {f'{passed}/{total}':>8} {counts}")
        elif good:
            lines.append(f"{name:<{width}} {'':8} up to date by now: another process ran it, or finished the exchange")
        else:
            said = "its parameters are refused, see above" if plan is None else "it ended before it could say why"
            lines.append(f"{name:<{width}} {took}   FAILED  {outcome.get('error', said)}")
            lines.append(f"{'':<{width}} {'':>8}   log     {shown(plan.log) if plan else '–'}")
    failed = sum(not good for _, _, good in ended)
    closing = f"{len(ended) - failed} of {len(ended)} notebooks done in {seconds:.0f} s"
    lines.append(closing + (f", {fresh} up to date" if fresh else "") + (f", {failed} FAILED" if failed else ""))
    return "\n".join(lines) + "\n"
