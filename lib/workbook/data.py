"""The data sets that ship with the workbook: offline, checked against data/MANIFEST.json, loaded in under a second."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from workbook import paths

FASHION_MNIST_CLASSES = (
    "T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip


class DataError(RuntimeError):
    """A file that ships is missing or is not the file that the manifest describes."""


def manifest() -> dict[str, dict]:
    """Entries of data/MANIFEST.json by path under data/: sha256, bytes, origin, licence, made_by."""
    return json.loads((paths.DATA / "MANIFEST.json").read_text(encoding="utf-8"))["files"]


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def checked(name: str) -> Path:
    """The path of data/`name`, after its SHA-256 was compared with the manifest's.

    Raises DataError in one line if the file is not listed, missing or changed.
    """
    entry = manifest().get(name)
    if entry is None:
        raise DataError(f"data/{name} is not in data/MANIFEST.json. Add it with its sha256, origin and licence.")
    path = paths.DATA / name
    if not path.exists():
        raise DataError(f"data/{name} is missing. Restore it with: git checkout data/{name}")
    if (found := sha256(path)) != entry["sha256"]:
        expected = entry["sha256"]
        raise DataError(
            f"data/{name} has changed: expected sha256 {expected[:12]}…, found {found[:12]}…. "
            f"Restore it with: git checkout data/{name}"
        )
    return path


@cache
def fashion_mnist(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Fashion-MNIST (Xiao et al. 2017) as (images, labels): uint8 of shape (n, 28, 28), and uint8 of shape (n,).

    split: "train" (60,000) or "test" (10,000), in the original order. The arrays are read-only.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r} is not a part of Fashion-MNIST: use 'train' or 'test'.")
    from PIL import Image

    def decode(blob: bytes) -> np.ndarray:
        return np.asarray(Image.open(io.BytesIO(blob)).getchannel(0))  # grey: the three channels are equal

    with zipfile.ZipFile(checked("fashion-mnist/fashion-mnist.zip")) as archive:
        strips = sorted(n for n in archive.namelist() if n.startswith(f"{split}/") and n.endswith(".webp"))
        blobs = [archive.read(name) for name in strips]
        labels = np.frombuffer(archive.read(f"{split}/labels.bin"), np.uint8)
    with ThreadPoolExecutor(2) as pool:  # libwebp releases the interpreter lock
        images = np.concatenate(list(pool.map(decode, blobs))).reshape(-1, 28, 28)
    images.setflags(write=False)
    return images, labels


def fashion_mnist_tensor(split: str):
    """Fashion-MNIST for the networks: float32 of shape (n, 1, 32, 32) in [-1, 1], padded with -1, and int64 labels."""
    import torch

    images, labels = fashion_mnist(split)
    scaled = torch.from_numpy(images.astype(np.float32) / 127.5 - 1)
    return torch.nn.functional.pad(scaled, (2, 2, 2, 2), value=-1.0)[:, None], torch.from_numpy(labels.astype(np.int64))


def register(name: str, *, origin: str, licence: str, made_by: str) -> None:
    """Enter data/`name` in the manifest with its present digest and size."""
    path, file = paths.DATA / name, paths.DATA / "MANIFEST.json"
    files = manifest() if file.exists() else {}
    entry = {"sha256": sha256(path), "bytes": path.stat().st_size, "origin": origin, "licence": licence}
    files[name] = entry | {"made_by": made_by}
    partial = file.with_suffix(".partial")
    partial.write_text(
        json.dumps({"files": dict(sorted(files.items()))}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    partial.replace(file)
