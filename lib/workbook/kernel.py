"""Run a notebook in a kernel of this very environment, and end that kernel when told to."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import papermill
from ipykernel.kernelspec import get_kernel_dict
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it warns of is checked here, or told in one line


class CellFailed(Exception):
    """A cell raised, or the kernel died in it; the text says which cell and what happened, in one line."""


class Stopped(Exception):
    """The run was told to stop: by a signal, or because its time was up."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)
        self.code = code


class Execution:
    """One execution of one notebook: what it is doing, and the way to stop it."""

    def __init__(self, source: Path, target: Path, parameters: dict[str, Any], log: TextIO) -> None:
        self.source, self.target, self.parameters, self.log = source, target, parameters, log
        self.cell = 0  # index of the cell under way, from 0
        self.tags: list[str] = []
        self.kernels: list[int] = []  # process groups
        self._injected = 0
        self.error: Exception | None = None
        self.stop: Stopped | None = None

    def run(self, *, timeout: float, tick: Callable[[Execution], None]) -> None:
        """Execute the notebook; `tick` is called a few times a second. Raises CellFailed, Stopped or OSError.

        papermill runs in a thread, so that signals and the clock are handled here, in the main one.
        """
        sockets = tempfile.mkdtemp(prefix="workbook-")  # a short path: a Unix socket's name holds 100 bytes
        worker = threading.Thread(target=self._execute, args=(sockets,), daemon=True)
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        deadline = time.monotonic() + timeout
        try:
            worker.start()
            while worker.is_alive():
                worker.join(0.1)
                tick(self)
                if self.stop is None and time.monotonic() > deadline:
                    self.stop = Stopped(f"took longer than {timeout:g} s, in {self.where}", 1)
                if self.stop is not None:
                    self._end_kernels()
                    worker.join(10)
                    raise self.stop
        finally:
            self._end_kernels()
            shutil.rmtree(sockets, ignore_errors=True)
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.error is not None:
            raise self.error

    @property
    def where(self) -> str:
        """The cell under way, as a reader counts: from 1, in the notebook as it is written."""
        return f"cell {self.cell + 1}" + (f" ({', '.join(self.tags)})" if self.tags else "")

    def _on_signal(self, number: int, _frame: object) -> None:
        self.stop = Stopped(f"stopped by {signal.Signals(number).name} in {self.where}", 128 + number)

    def _end_kernels(self) -> None:
        for group in self.kernels:
            try:
                os.killpg(group, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue

    def _on_cell_start(self, cell: Any, cell_index: int) -> None:
        tags = cell.metadata.get("tags", [])
        if "injected-parameters" in tags:
            self._injected = 1  # papermill's own cell, which the reader does not count
        else:
            self.cell, self.tags = cell_index - self._injected, list(tags)

    def _execute(self, sockets: str) -> None:
        execution = self

        class Kernel(AsyncKernelManager):
            """This environment's interpreter whatever kernels the user has installed, over sockets of its own."""

            transport = "ipc"  # no port that another run could take, and no network

            def __init__(self, **options: Any) -> None:
                super().__init__(**options)
                self.connection_file = os.path.join(sockets, "kernel.json")

            @property
            def kernel_spec(self) -> KernelSpec:
                return KernelSpec(**get_kernel_dict())

            async def _async_launch_kernel(self, kernel_cmd: list[str], **options: Any) -> None:
                await super()._async_launch_kernel(kernel_cmd, **options)
                execution.kernels.append(self.provisioner.pid)  # it leads a session of its own

        try:
            papermill.execute_notebook(
                os.path.relpath(self.source),  # relative: papermill fills in braces in a path
                os.path.relpath(self.target),
                self.parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=300,  # a busy machine is slow, not broken
                cwd=os.path.relpath(self.source.parent),
                stdout_file=self.log,
                stderr_file=self.log,
                kernel_manager_class=Kernel,
                on_cell_start=self._on_cell_start,
            )
        except PapermillExecutionError as error:
            print(*error.traceback, sep="\n", file=self.log)
            message = error.evalue.strip().splitlines()
            self.error = CellFailed(f"{self.where}: {error.ename}: {message[0] if message else ''}")
        except DeadKernelError:
            self.error = CellFailed(f"the kernel died in {self.where} (killed from outside, or out of memory?)")
        except Exception as error:  # handed to the thread that waits
            self.error = error
