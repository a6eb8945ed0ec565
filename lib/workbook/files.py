"""Small file operations that either happen whole or not at all, and digests that are computed once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from workbook import paths


def digest_text(text: str) -> str:
    """SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes, "" if it is missing; read once a process while its size and times stay."""
    try:
        status = path.stat()
    except OSError:
        return ""
    return _digest(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


@cache
def _digest(path: Path, *_state: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(path: Path) -> str:
    """A path as a user writes it, from the root of the checkout."""
    return str(path.relative_to(paths.ROOT)) if path.is_relative_to(paths.ROOT) else str(path)


def write_json(path: Path, value: Any) -> None:
    """Write strict JSON to a temporary name and rename it: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def read_strict(path: Path) -> Any:
    """JSON without NaN and Infinity; ValueError otherwise."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)


@cache  # so that a file is warned of once
def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def read_object(path: Path) -> dict | None:
    """A JSON object, or None if the file is missing or, after one warning line, not a whole one."""
    try:
        value = read_strict(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else error
        _warn(f"{shown(path)} cannot be read and counts as absent: {reason}")
        return None
    if not isinstance(value, dict):
        _warn(f"{shown(path)} cannot be read and counts as absent: not a JSON object")
        return None
    return value


@contextmanager
def locked(path: Path, *, shared: bool = False, waiting: str = "") -> Iterator[None]:
    """Hold a lock between processes. The system frees it when its holder ends, however that ends.

    waiting: a line to print if another process holds it; "{holder}" stands for that process.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            if waiting:
                print(waiting.format(holder=file.read().strip() or "another process"), file=sys.stderr, flush=True)
            fcntl.flock(file, kind)
        if not shared:
            file.truncate(0)
            file.write(f"process {os.getpid()}")
            file.flush()
        yield
