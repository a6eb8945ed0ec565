"""Messages between the processes of a group, counted to the byte: gathers, swaps with single peers, late mail.

A `Wire` is one member's end. Three kinds lead to the same results: `ProcessWire` (torch.distributed, real messages),
`ThreadWire` (members are threads of one process: for tests and for small demonstrations) and `EchoWire` (nobody else
is there; everyone's message is a copy of one's own: to time what a member computes, without any traffic).
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch


class Pending:
    """A message under way. `wait()` returns what it brings; asking again costs nothing."""

    def __init__(self, wire: Wire, finish: Callable[[], Any]):
        self._wire, self._finish, self._result = wire, finish, None

    def wait(self) -> Any:
        """Block until the message is here; the time counts as the wire's."""
        if self._finish is not None:
            started = time.perf_counter()
            self._result, self._finish = self._finish(), None
            self._wire.seconds += time.perf_counter() - started
        return self._result


class Wire:
    """One member's end of a group of `size`.

    received: payload bytes by category; messages: calls by category; seconds: time spent in calls and in waiting.
    """

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size
        self.reset()

    def reset(self) -> None:
        """Forget all counts."""
        self.received, self.messages, self.seconds = Counter(), Counter(), 0.0

    def gather(self, tensor: torch.Tensor, category: str | Mapping[str, int]) -> Pending:
        """Everybody's tensor, a list of `size` in the order of ranks; all have the same shape.

        category: what the bytes count as; or for a message of several parts the bytes of each category.
        """
        parts = category if isinstance(category, Mapping) else {category: tensor.nbytes}
        for name, size in parts.items():
            self.received[name] += (self.size - 1) * size
            self.messages[name] += 1
        return self._timed(self._gather, tensor.contiguous())

    def swap(self, parcels: Mapping[int, torch.Tensor], lengths: Mapping[int, int], category: str) -> Pending:
        """Send each parcel to its peer, and receive from each peer a flat tensor of `lengths[peer]` numbers: a dict.

        Both sides must name each other, and agree about the lengths.
        """
        first = next(iter(parcels.values()), torch.empty(0))
        self.received[category] += first.element_size() * sum(lengths.values())
        self.messages[category] += len(lengths)
        flat = {peer: parcel.contiguous().flatten() for peer, parcel in parcels.items()}
        return self._timed(self._swap, flat, lengths, first.dtype)

    def _timed(self, start: Callable, *arguments: Any) -> Pending:
        started = time.perf_counter()
        pending = Pending(self, start(*arguments))
        self.seconds += time.perf_counter() - started
        return pending


class ProcessWire(Wire):
    """A member of the default group of torch.distributed."""

    def _gather(self, tensor: torch.Tensor) -> Callable:
        import torch.distributed as dist

        everyone = [torch.empty_like(tensor) for _ in range(self.size)]
        handle = dist.all_gather(everyone, tensor, async_op=True)

        def finish() -> list[torch.Tensor]:
            handle.wait()
            tensor.size()  # the sent tensor lives until here
            return everyone

        return finish

    def _swap(self, flat: Mapping, lengths: Mapping, dtype: torch.dtype) -> Callable:
        import torch.distributed as dist

        arrived = {peer: torch.empty(length, dtype=dtype) for peer, length in lengths.items()}
        handles = [dist.isend(tensor, peer) for peer, tensor in flat.items() if tensor.numel()]
        handles += [dist.irecv(tensor, peer) for peer, tensor in arrived.items() if tensor.numel()]

        def finish() -> dict[int, torch.Tensor]:
            for handle in handles:
                handle.wait()
            flat.keys()  # the sent tensors live until here
            return arrived

        return finish


class ThreadWire(Wire):
    """A member of a group of threads, which share a table of boxes: (sender, receiver, kind, number) -> tensor."""

    def __init__(self, rank: int, size: int, boxes: Mapping[tuple, queue.Queue], timeout: float):
        super().__init__(rank, size)
        self._boxes, self._numbers, self._timeout = boxes, Counter(), timeout

    def _send(self, kind: str, parcels: Mapping[int, torch.Tensor], peers: Sequence[int]) -> Callable:
        self._numbers[kind] += 1
        number = self._numbers[kind]
        for peer, tensor in parcels.items():
            self._boxes[self.rank, peer, kind, number].put(tensor.clone())
        return lambda: {peer: self._boxes[peer, self.rank, kind, number].get(timeout=self._timeout) for peer in peers}

    def _gather(self, tensor: torch.Tensor) -> Callable:
        others = [rank for rank in range(self.size) if rank != self.rank]
        collect, own = self._send("gather", dict.fromkeys(others, tensor), others), tensor.clone()

        def finish() -> list[torch.Tensor]:
            arrived = collect() | {self.rank: own}
            return [arrived[rank] for rank in range(self.size)]

        return finish

    def _swap(self, flat: Mapping, lengths: Mapping, dtype: torch.dtype) -> Callable:
        return self._send("swap", flat, list(lengths))


class EchoWire(Wire):
    """A member that is alone: what others would send is a copy of what it sends itself, cut or repeated to length."""

    def _gather(self, tensor: torch.Tensor) -> Callable:
        return lambda: [tensor] * self.size

    def _swap(self, flat: Mapping, lengths: Mapping, dtype: torch.dtype) -> Callable:
        return lambda: {peer: flat[peer][torch.arange(n) % max(1, len(flat[peer]))] for peer, n in lengths.items()}


def in_threads(size: int, function: Callable, *arguments: Any, timeout: float = 30.0) -> list:
    """function(wire, *arguments) in `size` threads of this process, as `Fleet.run` does in processes; the results.

    timeout: seconds that a member waits for a message. What a member raises is raised here.
    """
    boxes, lock = {}, threading.Lock()

    class Boxes(defaultdict):
        def __missing__(self, key):
            with lock:
                return boxes.setdefault(key, queue.Queue())

    results, errors, shared = [None] * size, [], Boxes()

    def member(rank: int) -> None:
        torch.set_num_threads(1)  # the members are the threads
        try:
            results[rank] = function(ThreadWire(rank, size, shared, timeout), *arguments)
        except Exception as error:  # told below, in the thread that asked
            errors.append((isinstance(error, queue.Empty), rank, error))

    before = torch.get_num_threads()
    threads = [threading.Thread(target=member, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.set_num_threads(before)
    if errors:
        raise min(errors, key=lambda e: e[:2])[2]  # the cause, not those who waited for its messages in vain
    return results


def in_turn(wire: Wire, calls: Mapping[str, Callable], names: Sequence[str], *, repeats: int, warmup: int = 2) -> list:
    """Time calls that a group makes together, one after the other in rounds, every other round in reverse order.

    calls: of this member; one that lacks a name rests in that turn, which begins when all are ready. Returns rows
    (name, repeat, seconds, seconds spent in messages); rounds before repeat 0 are warm-up and are not kept.
    """
    rows = []
    for repeat in range(-warmup, repeats):
        for name in names if repeat % 2 == 0 else list(names)[::-1]:
            wire.gather(torch.zeros(1), "start").wait()
            wire.seconds, began = 0.0, time.perf_counter()
            if name in calls:
                calls[name]()
            if repeat >= 0:
                rows.append((name, repeat, time.perf_counter() - began, wire.seconds))
    return rows


def slowest(found: Sequence[list]) -> Any:
    """What `in_turn` returned in each member as one table: name, repeat, seconds of the slowest, mean waiting."""
    import pandas as pd

    rows = pd.DataFrame([row for rows in found for row in rows], columns=["name", "repeat", "seconds", "waiting"])
    grouped = rows.groupby(["name", "repeat"], sort=False)
    return grouped.agg({"seconds": "max", "waiting": "mean"}).reset_index()


def summed(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Counts of all members together, by category."""
    total: Counter = Counter()
    for count in counts:
        total.update(count)
    return dict(total)


class Board:
    """Tensors that everybody posts for everybody, read one step later. Several travel in one gather.

    together: tensors in one message. In each step a name is read first, then posted; the message leaves when it is
    full or the step ends, and travels while the step goes on.
    """

    def __init__(self, wire: Wire, *, together: int = 20):
        self.wire, self.together = wire, together
        self._known: dict[str, Callable[[], list[torch.Tensor]]] = {}
        self._queue: list[tuple[str, torch.Tensor, str]] = []

    def keep(self, name: str, everyone: list[torch.Tensor]) -> None:
        """Put up what came another way: a list of everybody's tensors, in the order of ranks."""
        self._known[name] = lambda: everyone

    def read(self, name: str) -> list[torch.Tensor]:
        """Everybody's tensors of that name as of the previous step, one's own included. KeyError for a new name."""
        return self._known[name]()

    def post(self, name: str, tensor: torch.Tensor, category: str) -> None:
        """Put up one's own tensor, for the next step."""
        self._queue.append((name, tensor, category))
        if len(self._queue) >= self.together:
            self.flush()

    def flush(self) -> None:
        """Send what waits: at the end of a step."""
        if not self._queue:
            return
        sizes = Counter()
        for _, tensor, category in self._queue:
            sizes[category] += tensor.nbytes
        pending, start = self.wire.gather(torch.cat([tensor.flatten() for _, tensor, _ in self._queue]), sizes), 0
        for name, tensor, _ in self._queue:
            piece, start = slice(start, start + tensor.numel()), start + tensor.numel()
            self._known[name] = lambda p=pending, piece=piece, s=tensor.shape: [t[piece].view(s) for t in p.wait()]
        self._queue = []


class Mail:
    """Tensors for single peers, read one step later; all of a group's mail counts as one category.

    together: posts in one message. It leaves when it is full or the step ends, and travels while the step goes on.
    """

    def __init__(self, wire: Wire, category: str, *, together: int = 20):
        self.wire, self.category, self.together = wire, category, together
        self._known: dict[str, Callable[[], dict[int, torch.Tensor]]] = {}
        self._queue: list[tuple[str, Mapping[int, torch.Tensor], Mapping[int, torch.Size]]] = []

    def keep(self, name: str, parcels: Mapping[int, torch.Tensor]) -> None:
        """Note what came another way, by peer."""
        self._known[name] = lambda: dict(parcels)

    def read(self, name: str) -> dict[int, torch.Tensor]:
        """What each peer posted under that name in the previous step. KeyError for a new name."""
        return self._known[name]()

    def post(self, name: str, parcels: Mapping[int, torch.Tensor], shapes: Mapping[int, torch.Size]) -> None:
        """Send to each peer its parcel; shapes: of what each peer sends in return. Always to the same peers."""
        self._queue.append((name, parcels, {peer: torch.Size(shape) for peer, shape in shapes.items()}))
        if len(self._queue) >= self.together:
            self.flush()

    def flush(self) -> None:
        """Send what waits: at the end of a step."""
        if not self._queue:
            return
        peers = list(self._queue[0][1])
        bundles = {peer: torch.cat([parcels[peer].flatten() for _, parcels, _ in self._queue]) for peer in peers}
        lengths = {peer: [shapes[peer].numel() for _, _, shapes in self._queue] for peer in peers}
        pending = self.wire.swap(bundles, {peer: sum(each) for peer, each in lengths.items()}, self.category)

        def pieces(number: int, shapes: Mapping[int, torch.Size]) -> dict[int, torch.Tensor]:
            arrived = pending.wait()
            return {peer: arrived[peer].split(lengths[peer])[number].view(shapes[peer]) for peer in peers}

        for number, (name, _, shapes) in enumerate(self._queue):
            self._known[name] = partial(pieces, number, shapes)
        self._queue = []
