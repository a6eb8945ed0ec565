"""The environment: its three files agree, and setup takes, makes or refuses what it should."""

import ast
import importlib.util
import os
import re
import sys
from importlib.metadata import requires, version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from workbook import paths

spec = importlib.util.spec_from_file_location("workbook_setup", paths.ROOT / "tools" / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


def requirements(name):
    """The requirements of a file by canonical name."""
    lines = (paths.ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [Requirement(line.partition(" #")[0]) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(item.name): item for item in found}


def pinned():
    return requirements("requirements.lock") | requirements("requirements-models.lock")


def test_every_package_of_the_locks_is_pinned_to_one_version():
    for item in pinned().values():
        assert re.fullmatch(r"==[\w.]+", str(item.specifier)), item


def test_the_locks_satisfy_every_direct_requirement():
    for name, item in requirements("requirements.txt").items():
        assert item.specifier.contains(str(pinned()[name].specifier).removeprefix("==")), item


def test_every_direct_requirement_says_why():
    for line in (paths.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines():
        assert not line.strip() or line.startswith("#") or len(line.partition("#")[2].split()) >= 2, line


def test_the_locks_are_complete():
    """Every dependency of a pinned package is pinned, but for the package that is installed without any."""
    for name in requirements("requirements.lock"):
        for text in requires(name) or []:
            item = Requirement(text)
            if item.marker is None or item.marker.evaluate({"extra": ""}):
                assert canonicalize_name(item.name) in pinned() or item.name == "setuptools", f"{name} needs {item}"


def test_conda_installs_the_same_locks():
    environment = yaml.safe_load((paths.ROOT / "environment.yml").read_text(encoding="utf-8"))
    plain = [item for item in environment["dependencies"] if isinstance(item, str)]
    (pip,) = [item["pip"] for item in environment["dependencies"] if isinstance(item, dict)]
    assert "python=3.11" in plain
    assert pip == ["-r requirements.lock"]
    assert "tools/setup.py" in (paths.ROOT / "postBuild").read_text(encoding="utf-8")  # adds requirements-models.lock


def test_this_environment_is_the_locked_one():
    for name, item in pinned().items():
        assert version(name).partition("+")[0] == str(item.specifier).removeprefix("==")


def test_another_python_is_refused_in_one_line():
    with pytest.raises(setup.SetupError) as refused:
        setup.check_version((3, 8, 2))
    assert str(refused.value) == (
        "The workbook needs Python 3.11; python3 is 3.8.2. "
        "Install it, or name it: make setup PYTHON=/path/to/python3.11"
    )


def test_setup_is_readable_by_an_old_python():
    ast.parse((paths.ROOT / "tools" / "setup.py").read_text(encoding="utf-8"), feature_version=(3, 5))


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with locks of its own that this environment satisfies, and no .venv."""
    monkeypatch.setattr(setup, "ROOT", str(tmp_path))
    monkeypatch.setattr(setup, "VENV", str(tmp_path / ".venv"))
    for name, text in {"LOCK": f"pytest=={version('pytest')}\n", "MODELS": f"yaml_missing_{os.getpid()}==1\n"}.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(setup, name, str(tmp_path / name))
    (tmp_path / "active").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):  # a second door to this environment, to hold a stamp of its own
        if (Path(sys.prefix) / name).exists():
            (tmp_path / "active" / name).symlink_to(Path(sys.prefix) / name)
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "active"))
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    calls = []
    monkeypatch.setattr(setup, "run", lambda command, what: calls.append(what))
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(setup, "finish", lambda prefix: Path(setup.stamp_of(prefix)).write_text(setup.lock_digest()))
    monkeypatch.setattr(setup, "say", lambda text: None)
    return tmp_path, calls


def test_the_active_environment_is_taken_if_it_satisfies_the_lock(checkout):
    root, calls = checkout
    assert setup.environment() == str(root / "active")
    assert calls == ["Installing requirements-models.lock"]  # a package of weights that conda cannot install alone


def test_a_second_setup_does_nothing_until_the_lock_changes(checkout):
    root, calls = checkout
    setup.environment()
    calls.clear()
    assert setup.environment() == str(root / "active")
    assert calls == []
    (root / "LOCK").write_text("pytest==0\n")
    assert setup.environment() == str(root / ".venv")
    assert calls[0] == "Making .venv"


def test_a_corrupt_stamp_counts_as_absent(checkout):
    root, calls = checkout
    Path(setup.stamp_of(str(root / "active"))).write_bytes(b"\xff\xfe")
    assert setup.environment() == str(root / "active")
    assert calls


def test_lab_listens_on_loopback_with_its_token():
    recipe = next(part for part in (paths.ROOT / "Makefile").read_text().split("\n\t@") if "-m jupyterlab" in part)
    assert "--ip 127.0.0.1" in recipe
    assert "token" not in recipe.partition("\n")[0]
    assert "password" not in recipe
