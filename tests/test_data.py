"""What ships in data/: every file is the one of the manifest, and Fashion-MNIST is the original, byte for byte."""

import hashlib
import json
import struct

import numpy as np
import pytest

from workbook import data, paths

FILES = data.manifest()


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_the_one_of_the_manifest(name):
    assert data.checked(name).stat().st_size == FILES[name]["bytes"]


@pytest.mark.parametrize("name", FILES)
def test_every_file_says_where_it_comes_from_and_under_which_licence(name):
    for key in ("origin", "licence", "made_by"):
        assert FILES[name][key].strip()


def test_nothing_ships_that_the_manifest_does_not_name():
    found = {str(path.relative_to(paths.DATA)) for path in paths.DATA.rglob("*") if path.is_file()}
    assert {name for name in found if not name.startswith(".")} - set(FILES) == {"MANIFEST.json"}


def test_weights_are_safetensors_and_small():
    weights = {name: entry["bytes"] for name, entry in FILES.items() if name.startswith("checkpoints/")}
    assert all(name.endswith((".safetensors", ".csv", ".json")) for name in weights)
    assert all(size <= 14e6 for size in weights.values())
    assert sum(weights.values()) <= 35e6


@pytest.mark.parametrize(("split", "stem", "count"), [("train", "train", 60_000), ("test", "t10k", 10_000)])
def test_fashion_mnist_equals_the_original_idx_files(split, stem, count):
    images, labels = data.fashion_mnist(split)
    assert images.shape == (count, 28, 28)
    assert images.dtype == labels.dtype == np.uint8
    originals = FILES["fashion-mnist/fashion-mnist.zip"]["contents"]
    idx = {  # the header of an IDX file: two zeros, 8 for unsigned bytes, the number of axes, their lengths
        f"{stem}-images-idx3-ubyte": struct.pack(">4B3I", 0, 0, 8, 3, count, 28, 28) + images.tobytes(),
        f"{stem}-labels-idx1-ubyte": struct.pack(">4B1I", 0, 0, 8, 1, count) + labels.tobytes(),
    }
    for name, content in idx.items():
        assert hashlib.sha256(content).hexdigest() == originals[name]


def test_the_arrays_are_read_only():
    with pytest.raises(ValueError, match="read-only"):
        data.fashion_mnist("test")[0][0, 0, 0] = 1


@pytest.fixture
def shipped(tmp_path, monkeypatch):
    """A folder of data with one file."""
    monkeypatch.setattr(paths, "DATA", tmp_path)
    (tmp_path / "a.bin").write_bytes(b"abc")
    entry = {"sha256": hashlib.sha256(b"abc").hexdigest(), "bytes": 3}
    (tmp_path / "MANIFEST.json").write_text(json.dumps({"files": {"a.bin": entry}}))
    return tmp_path


def test_a_changed_missing_or_unlisted_file_is_refused_by_name(shipped):
    assert data.checked("a.bin") == shipped / "a.bin"
    (shipped / "a.bin").write_bytes(b"abd")
    with pytest.raises(data.DataError, match=r"data/a.bin has changed: expected sha256 ba7816bf8f01…, found a52d159f"):
        data.checked("a.bin")
    (shipped / "a.bin").unlink()
    with pytest.raises(data.DataError, match=r"data/a.bin is missing. Restore it with: git checkout data/a.bin"):
        data.checked("a.bin")
    with pytest.raises(data.DataError, match=r"data/b.bin is not in data/MANIFEST.json"):
        data.checked("b.bin")
