"""Worker processes that run a function together: started once, asked many times, ended as one.

    with Fleet(2) as fleet:
        results = fleet.run(function, *arguments)      # function(wire, *arguments) in every worker

A function is sent by value, so that what stands in a notebook's cell is what the workers run. Workers meet through a
file (torch.distributed, gloo over the loopback interface). Whatever goes wrong in one of them ends all, with one clear
line; and when the process that started them dies, however it dies, they end within a second.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

PRELOAD = ["workbook.patchparallel"]  # what the server of new workers imports once, so that a worker starts at once


def prepare() -> None:
    """Start the server of worker processes, which imports torch and diffusers while the caller does other things."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    forkserver.ensure_running()


class FleetError(RuntimeError):
    """A worker failed or died, told in one line; all workers of its fleet have been ended."""


class Fleet:
    """`size` worker processes with `threads` threads each. Use it in a `with` block, or call `close()`.

    patience: seconds that a worker waits for the message of another before it gives up.
    """

    def __init__(self, size: int, *, threads: int = 1, patience: float = 120.0):
        if size < 1:
            raise ValueError(f"size = {size}: a fleet has at least one worker.")
        self.size = size
        self._folder = tempfile.mkdtemp(prefix="fleet-")
        prepare()
        context = multiprocessing.get_context("forkserver")
        self._pipes: list[Connection] = []
        self._workers = []
        atexit.register(self.close)
        try:
            for rank in range(size):
                ours, theirs = context.Pipe()
                arguments = (rank, size, threads, os.path.join(self._folder, "meeting"), patience, theirs)
                worker = context.Process(target=_serve, args=arguments, daemon=True, name=f"worker {rank}")
                worker.start()
                theirs.close()
                self._pipes.append(ours)
                self._workers.append(worker)
            self._answers("starting")
        except BaseException:
            self.close()
            raise

    def run(self, function: Callable, *arguments: Any) -> list:
        """What function(wire, *arguments) returns in each worker, in the order of ranks.

        Raises FleetError if a worker raised or died; the fleet is closed then, as it is by Ctrl-C.
        """
        if not self._workers:
            raise FleetError("this fleet is closed: start another one.")
        job = by_value(function, arguments)
        try:
            for rank, pipe in enumerate(self._pipes):
                try:
                    pipe.send_bytes(job)
                except OSError:
                    raise FleetError(self._epitaph(rank, "before its next job")) from None
            return self._answers(f"in {getattr(function, '__name__', 'its job')}")
        except BaseException:
            self.close()
            raise

    def _answers(self, doing: str) -> list:
        """One answer of each worker; the first failure counts."""
        answers: dict[int, Any] = {}
        while len(answers) < self.size:
            open_ranks = [rank for rank in range(self.size) if rank not in answers]
            for ready in wait([self._pipes[rank] for rank in open_ranks]):  # a dead worker's pipe is ready, too
                rank = self._pipes.index(ready)
                try:
                    fine, answer = cloudpickle.loads(ready.recv_bytes())
                except (EOFError, OSError):
                    raise FleetError(self._epitaph(rank, doing)) from None
                if not fine:
                    raise FleetError(self._blame(rank, answer))
                answers[rank] = answer
        return [answers[rank] for rank in range(self.size)]

    def _blame(self, rank: int, first: str) -> str:
        """The line for a worker that raised; if another one died meanwhile, that was the cause."""
        for other, worker in enumerate(self._workers):
            worker.join(0.2)
            if other != rank and worker.exitcode is not None:
                return self._epitaph(other, "at work")
        return f"worker {rank} of {self.size} failed: {first}. All workers were ended."

    def _epitaph(self, rank: int, doing: str) -> str:
        """The line for a worker that died."""
        self._workers[rank].join(1)
        code = self._workers[rank].exitcode
        how = f"exit status {code}" if code is None or code >= 0 else signal.Signals(-code).name
        return f"worker {rank} of {self.size} died {doing} ({how}). All workers were ended."

    @property
    def pids(self) -> list[int]:
        """The process numbers of the workers."""
        return [worker.pid for worker in self._workers]

    def close(self) -> None:
        """End all workers, and wait until they are gone."""
        workers, self._workers = self._workers, []
        for worker in workers:
            worker.kill()  # they hold nothing that would need a farewell
        for worker in workers:
            worker.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.close)

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def by_value(function: Callable, arguments: tuple) -> bytes:
    """A call as bytes. Methods of notebooks, which no worker can import, travel with it."""
    methods = [module for name, module in list(sys.modules.items()) if name.startswith("workbook_method_")]
    for module in methods:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps((function, arguments))
    finally:
        for module in methods:
            cloudpickle.unregister_pickle_by_value(module)


def loopback_bytes() -> int | None:
    """Bytes that this machine's loopback interface has received so far; None where no such counter is to be read."""
    try:
        lines = Path("/proc/net/dev").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    counts = {name.strip(): rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return int(counts["lo"][0]) if "lo" in counts else None


def _serve(rank: int, size: int, threads: int, meeting: str, patience: float, pipe: Connection) -> None:
    """The life of a worker: meet the others, then answer one job after the other until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    import torch
    import torch.distributed as dist

    from workbook.wire import ProcessWire

    torch.set_num_threads(threads)
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        try:
            limit = timedelta(seconds=patience)
            dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=size, timeout=limit)
        except Exception as error:
            pipe.send_bytes(cloudpickle.dumps((False, _one_line(error))))
            return
        pipe.send_bytes(cloudpickle.dumps((True, None)))
        while True:
            job = pipe.recv_bytes()
            try:
                function, arguments = cloudpickle.loads(job)
                answer = cloudpickle.dumps((True, function(ProcessWire(rank, size), *arguments)))
            except Exception as error:
                answer = cloudpickle.dumps((False, _one_line(error)))
            pipe.send_bytes(answer)


def _end_with_parent() -> None:
    """Leave when the parent is gone, even from the middle of a computation or of a wait for a message."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _one_line(error: Exception) -> str:
    """What went wrong and where, in one line."""
    where = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" (line {where[0].lineno} of {Path(where[0].filename).name})" if where else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{place}"
