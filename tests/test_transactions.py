"""Whatever ends a run, the figures, the record and the executed notebook of the last good one stay byte-identical."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from tiny import Checkout, write_notebook


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A checkout with good figures of two notebooks, of which decoding/one is stale by now."""
    made = Checkout(tmp_path_factory.mktemp("transactions") / "checkout")
    result = made.make(JOBS="2")
    assert result.returncode == 0, result.stderr
    path = made.root / "lib/workbook/alone.py"
    path.write_text(path.read_text().replace("VALUE = 1", "VALUE = 2"))
    return made


@pytest.fixture
def untouched(checkout):
    """Compare every product before and after the test, and look for what a run may leave behind."""
    (checkout.root / "build/waiting").unlink(missing_ok=True)
    before = checkout.products("decoding/one") | checkout.products("diffusion/two")
    yield
    assert checkout.products("decoding/one") | checkout.products("diffusion/two") == before
    assert checkout.workbook("why").stdout == (
        "decoding/one has to run:\n  lib/workbook/alone.py changed\ndiffusion/two: up to date\n"
    )
    assert list((checkout.root / "build/running").glob("*/*")) == []
    assert list((checkout.root / "figures").rglob(".*")) == []


def wait_for_kernel(checkout, process) -> int:
    """The process id of the kernel once it is in the cell that waits."""
    path = checkout.root / "build/waiting"
    deadline = time.monotonic() + 300
    while not (path.exists() and path.read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def gone(pid: int) -> bool:
    """Whether the process ends within some seconds."""
    for _ in range(1200):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.usefixtures("untouched")
def test_old_figures_survive_a_killed_kernel(checkout):
    result = checkout.run("make", "figures", TINY_MODE="die")
    assert result.returncode != 0
    assert "the kernel died in cell 5 (experiment)" in result.stderr
    assert "0 of 1 notebooks done" in result.stdout
    assert "build/logs/decoding/one.log" in result.stdout
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("mode", "reason"), [("oracle", "oracle failed: sum"), ("empty", "line.svg is missing or em")])
def test_old_figures_survive_a_run_that_is_not_sound(checkout, mode, reason):
    result = checkout.run("make", "figures", TINY_MODE=mode)
    assert result.returncode != 0
    assert f"decoding/one: {reason}" in result.stderr


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_old_figures_survive_a_signal_and_the_kernel_is_gone(checkout, number, code):
    environment = checkout.environment(TINY_MODE="wait")
    command = [sys.executable, "-m", "doit", "figures"]
    process = subprocess.Popen(
        command, cwd=checkout.root, env=environment, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    kernel = wait_for_kernel(checkout, process)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does: everyone in the foreground gets it
    else:
        process.send_signal(number)  # as a job scheduler does
    _, err = process.communicate(timeout=120)
    assert process.returncode == code
    assert "decoding/one: stopped by SIG" in err
    assert "Traceback" not in err
    assert gone(kernel)


def test_old_figures_survive_a_killed_runner_and_the_next_run_sweeps_up(checkout):
    before = checkout.products("decoding/one")
    (checkout.root / "build/waiting").unlink(missing_ok=True)
    process = checkout.start(sys.executable, "-m", "workbook", "run", "decoding/one", TINY_MODE="wait")
    kernel = wait_for_kernel(checkout, process)
    process.kill()
    process.communicate()
    assert gone(kernel)
    assert checkout.products("decoding/one") == before
    assert checkout.run("make", "figures", TINY_MODE="oracle").returncode != 0  # takes the lock, sweeps, fails
    assert list((checkout.root / "build/running").glob("*/*")) == []


@pytest.mark.usefixtures("untouched")
def test_a_run_that_takes_too_long_is_ended(checkout):
    write_notebook(checkout.root, "systems/slow", settings={"timeout": 3})
    result = checkout.run("make", "figures", "N=slow", TINY_MODE="wait")
    shutil.rmtree(checkout.root / "notebooks/systems")
    assert result.returncode != 0
    assert "systems/slow: took longer than 3 s, in cell 5 (experiment)" in result.stderr
    assert gone(int((checkout.root / "build/waiting").read_text()))


@pytest.fixture
def small_disk(checkout):
    """Mount a file system of some kilobytes over a folder of the checkout."""
    mounted = []

    def mount(folder: str, kilobytes: int):
        path = checkout.root / folder
        path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "workbook-test", str(path)]
        try:
            code = subprocess.call(command, stderr=subprocess.DEVNULL)
        except FileNotFoundError:
            code = 1
        if code != 0:
            pytest.skip("mounting a small disk is not permitted here")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.call(["umount", str(path)])


@pytest.mark.usefixtures("untouched")
def test_old_figures_survive_a_full_disk_while_running(checkout, small_disk):
    small_disk("build/running", 4)
    result = checkout.make()
    assert result.returncode != 0
    assert "decoding/one: no space left on the disk" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.usefixtures("untouched")
def test_old_figures_survive_a_full_disk_while_moving_in(checkout, small_disk):
    old = {path: path.read_bytes() for path in (checkout.root / "figures/decoding/one").iterdir()}
    disk = small_disk("figures/decoding", 32)
    (disk / "one").mkdir()
    for path, content in old.items():
        path.write_bytes(content)
    filler = disk / "filler"
    with pytest.raises(OSError, match="No space"):
        filler.write_bytes(bytes(1 << 16))
    result = checkout.make()
    assert result.returncode != 0
    assert "decoding/one: no space left on the disk" in result.stderr
    assert {path: path.read_bytes() for path in old} == old
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "one"]


def test_a_half_done_exchange_is_undone_at_the_next_start(checkout):
    before = checkout.products("diffusion/two")
    (checkout.root / "figures/diffusion/two").rename(checkout.root / "figures/diffusion/.two.old")
    result = checkout.make(N="diffusion/two")
    assert result.returncode == 0, result.stderr
    assert checkout.products("diffusion/two") == before


def test_the_next_make_figures_reruns_just_the_failed_notebook(checkout):
    assert checkout.run("make", "figures", TINY_MODE="oracle").returncode != 0
    assert (checkout.root / "build/failed/decoding/one.ipynb").exists()  # to look at
    before = checkout.times()
    result = checkout.make()
    assert result.returncode == 0, result.stderr
    changed = [name for name, when in checkout.times().items() if when != before[name]]
    assert changed == ["figures/decoding/one/record.json"]
    assert not (checkout.root / "build/failed/decoding/one.ipynb").exists()
    assert checkout.make().stdout == "2 notebooks up to date\n"
