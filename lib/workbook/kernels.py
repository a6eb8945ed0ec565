"""C kernels, built once by the system compiler and called through ctypes; the INT4 matrix product in five builds.

A kernel is a C file beside this module. `build` compiles it into the workbook's cache under a name that holds the
digest of source, flags and compiler, so that a changed source is a new file and a finished one is never written again.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from workbook import paths

SOURCES = Path(__file__).parent


class KernelError(RuntimeError):
    """A kernel that cannot be built or does not run here, told in one line."""


def compiler() -> list[str]:
    """The C compiler as a command: $CC, or the first of cc, gcc and clang. KernelError if there is none."""
    if given := shlex.split(os.environ.get("CC", "")):
        if shutil.which(given[0]) is None:
            raise KernelError(f"CC = {os.environ['CC']!r} is not a program. Unset CC, or name a C compiler.")
        return given
    for name in ("cc", "gcc", "clang"):
        if found := shutil.which(name):
            return [found]
    raise KernelError("no C compiler: none of cc, gcc and clang is on the PATH. Install gcc, or set CC.")


@cache
def _version(command: tuple[str, ...]) -> bytes:
    return subprocess.run([*command, "--version"], capture_output=True, check=False).stdout


def build(source: str, flags: Sequence[str] = ()) -> Path:
    """The shared library of lib/workbook/`source`, compiled if this build is not in the cache; KernelError otherwise.

    With OpenMP where the compiler has it, on one thread where it has not. Safe with several at once: each
    compiles under a name of its own and renames at the end.
    """
    command, path = compiler(), SOURCES / source
    digest = hashlib.sha256(path.read_bytes())
    digest.update(repr([command, *flags]).encode() + _version(tuple(command)))
    target = paths.CACHE / "kernels" / f"{path.stem}-{digest.hexdigest()[:16]}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(f".{os.getpid()}-{threading.get_ident()}.partial")
    for openmp in (["-fopenmp"], []):
        wanted = [*command, "-O3", "-std=gnu11", "-shared", "-fPIC", *flags, *openmp, str(path), "-o", str(partial)]
        done = subprocess.run(wanted, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            partial.replace(target)
            return target
    partial.unlink(missing_ok=True)
    reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip()[:200])
    raise KernelError(f"{command[0]} cannot compile {source} with {' '.join(flags) or 'no flags'}: {reason}")


@dataclass(frozen=True)
class Build:
    """One way to compile int4.c: the compiler's flags, and what the processor must have, as Linux spells it."""

    name: str
    flags: tuple[str, ...]
    needs: tuple[str, ...]


_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma")
_AVX512_NEEDS = ("avx512f", "avx512bw", "avx512dq", "avx512vl", "fma")
BUILDS = (
    Build(
        "AMX-BF16",
        (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
        (*_AVX512_NEEDS, "avx512_bf16", "amx_tile", "amx_bf16"),
    ),
    Build("AVX512-BF16", (*_AVX512, "-mavx512bf16"), (*_AVX512_NEEDS, "avx512_bf16")),
    Build("AVX-512", _AVX512, _AVX512_NEEDS),
    Build("AVX2+FMA", ("-mavx2", "-mfma"), ("avx2", "fma")),
    Build("portable", (), ()),
)


@cache
def processor_flags() -> frozenset[str]:
    """The processor's instruction sets as /proc/cpuinfo lists them; none where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def runs_here(choice: Build) -> bool:
    """Whether this processor has what the build needs."""
    return not choice.needs or (platform.machine() == "x86_64" and processor_flags().issuperset(choice.needs))


class Int4Kernel:
    """int4.c in one build: the product with packed INT4 weights, and a stream that only reads.

    name: the build's name. Raises KernelError if it cannot be built, or the processor lacks what it needs.
    """

    def __init__(self, choice: Build):
        if not runs_here(choice):
            missing = " ".join(flag for flag in choice.needs if flag not in processor_flags())
            raise KernelError(f"the {choice.name} kernel does not run on this processor, which lacks {missing}.")
        self.name = choice.name
        library = ctypes.CDLL(str(build("int4.c", choice.flags)))
        if not library.int4_ready():
            raise KernelError(f"the operating system does not let this process use {choice.name}.")
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self._matmul, self._read = library.int4_matmul, library.int4_read
        self._matmul.argtypes, self._matmul.restype = [pointer] * 4 + [integer] * 7, integer
        self._read.argtypes, self._read.restype = [pointer, ctypes.c_int64, integer], ctypes.c_double

    def __deepcopy__(self, memo: dict) -> Int4Kernel:
        return self  # copies of a layer share its code

    def __call__(
        self,
        x: torch.Tensor,
        words: torch.Tensor,
        scales: torch.Tensor,
        *,
        group: int,
        sparse: bool = False,
        reuse: bool = True,
        threads: int | None = None,
    ) -> torch.Tensor:
        """x (m, K) float32 times the packed weights (K, N), giving (m, N) float32.

        words: int32 of shape (N/32, K/8, 32), or (N/32, K/32, 3, 32) if sparse; scales: float16, (N/32, K/group, 32);
        group: inputs that share a scale, a multiple of 32; reuse: False makes every row de-quantise the weights again;
        threads: default torch's number. The bf16 builds round x to bf16, AVX2 a single row
        to 15 bits. Raises ValueError for other shapes or types.
        """
        (m, k), (panels, groups, width) = x.shape, scales.shape
        expected = (panels, k // 32, 3, 32) if sparse else (panels, k // 8, 32)
        if width != 32 or group % 32 or groups * group != k or tuple(words.shape) != expected:
            raise ValueError(
                f"x {tuple(x.shape)}, words {tuple(words.shape)} and scales {tuple(scales.shape)} do not belong "
                f"together with groups of {group}: words {expected} and groups that are multiples of 32 are allowed."
            )
        for name, tensor, dtype in (
            ("x", x, torch.float32),
            ("words", words, torch.int32),
            ("scales", scales, torch.float16),
        ):
            if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
                raise ValueError(
                    f"{name} is {tensor.dtype} on {tensor.device}: a contiguous {dtype} on the CPU is needed."
                )
        y = torch.empty((m, 32 * panels))
        if m == 0:
            return y
        pointers = (tensor.data_ptr() for tensor in (x, words, scales, y))
        if self._matmul(*pointers, m, 32 * panels, k, group, sparse, reuse, threads or torch.get_num_threads()):
            raise MemoryError(f"no memory for the work space of a product of {m} rows of {k}.")
        return y

    def read(self, data: torch.Tensor, threads: int | None = None) -> float:
        """The sum of a float32 tensor, read once from front to back in as many parts as threads (the last 255 not)."""
        return self._read(data.data_ptr(), data.numel(), threads or torch.get_num_threads())


def int4_kernel(name: str = "auto") -> Int4Kernel:
    """The INT4 kernel in the build `name`, or in the fastest one that can be built and run here.

    Raises KernelError in one line: no compiler, or not this processor.
    """
    if name != "auto":
        matching = [choice for choice in BUILDS if choice.name == name]
        if not matching:
            raise KernelError(f"{name} is no build of the INT4 kernel: {', '.join(b.name for b in BUILDS)} are.")
        return Int4Kernel(matching[0])
    failure = KernelError("no build of the INT4 kernel runs here.")
    for choice in filter(runs_here, BUILDS):
        try:
            return Int4Kernel(choice)
        except KernelError as error:  # an old compiler does not know the newest instructions: take the next build
            failure = error
    raise failure


def pack_sparse(codes: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """2:4 words int32 (N/32, K/32, 3, 32) of codes (N, K), of which `kept` marks two in every four inputs.

    Of 32 inputs the 16 kept codes in two words, and their sixteen 2-bit positions in a third.
    """
    n, k = codes.shape
    fours = kept.view(n, k // 4, 4)
    if n % 32 or k % 32 or not (fours.sum(2) == 2).all():
        raise ValueError(f"a weight of {n} x {k} needs multiples of 32, and exactly two kept of every four inputs.")
    position = fours.int().topk(2).indices.sort().values  # (N, K/4, 2), ascending
    chosen = codes.view(n, k // 4, 4).gather(2, position)
    chosen, position = (t.reshape(n // 32, 32, k // 32, 16).permute(0, 2, 3, 1).int() for t in (chosen, position))
    halves = [sum(chosen[:, :, 8 * half + i] << 4 * i for i in range(8)) for half in range(2)]
    return torch.stack([*halves, sum(position[:, :, i] << 2 * i for i in range(16))], dim=2).contiguous()


def unpack_sparse(words: torch.Tensor) -> torch.Tensor:
    """Codes (N, K) uint8 from 2:4 words, 8 (which stands for zero) where nothing was kept."""
    chosen = torch.stack([words[:, :, half] >> 4 * i & 15 for half in range(2) for i in range(8)], dim=2)
    position = torch.stack([words[:, :, 2] >> 2 * i & 3 for i in range(16)], dim=2)
    chosen, position = (t.permute(0, 3, 1, 2).reshape(32 * len(words), -1, 2) for t in (chosen, position))
    codes = torch.full((*chosen.shape[:2], 4), 8, dtype=torch.int32).scatter_(2, position.long(), chosen)
    return codes.view(len(codes), -1).to(torch.uint8)
