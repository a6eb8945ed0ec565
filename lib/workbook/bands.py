"""Banded attention in one fused C kernel, band.c, and a way to put any attention into a network that exists."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from unittest.mock import patch

import torch
from torch.nn import functional

from workbook.kernels import BUILDS, Build, KernelError, build, runs_here


class BandKernel:
    """band.c in one build. Raises KernelError if it cannot be built, or the processor lacks what it needs."""

    def __init__(self, choice: Build):
        if not runs_here(choice):
            raise KernelError(f"the {choice.name} kernel does not run on this processor.")
        self.name = choice.name
        self._attend = ctypes.CDLL(str(build("band.c", choice.flags))).band_attention
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        self._attend.argtypes = [pointer] * 7 + [integer] * 6 + [ctypes.c_float, integer]
        self._attend.restype = integer

    def __call__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        half: int,
        frames: int = 1,
        *,
        threads: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention of each query to the places within `half` of its own, in every frame: (out, log-sum-exp).

        q, k, v: (batch, heads, tokens, width), float32 on the CPU, width a multiple of 32, any strides over the first
        three; tokens: `frames` runs of equally many places. Scores are q k / sqrt(width). threads: default torch's.
        Returns out (batch, heads, tokens, width), stored token by token, and the log of the sum of the exponentials
        (batch, heads, tokens). Raises ValueError for other shapes or types.
        """
        batch, heads, tokens, width = q.shape
        if k.shape != q.shape or v.shape != q.shape or tokens % frames or width % 32 or half < 0:
            raise ValueError(
                f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} with frames = {frames}, half = {half}: "
                "three equal shapes, frames that divide the tokens, a width that 32 divides and half >= 0 are needed."
            )
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.dtype != torch.float32 or x.device.type != "cpu" or x.stride(-1) != 1:
                raise ValueError(
                    f"{name} is {x.dtype} on {x.device} with last stride {x.stride(-1)}: float32 on the CPU with last "
                    "stride 1 is needed."
                )
        out = torch.empty(batch, tokens, heads, width).transpose(1, 2)
        largest, total = torch.empty(2, batch, heads, tokens)
        strides = (ctypes.c_int64 * 12)(*(step for x in (q, k, v, out) for step in x.stride()[:3]))
        pointers = [x.data_ptr() for x in (q, k, v, out, largest, total)]
        sizes = batch, heads, frames, tokens // frames, width, min(half, tokens)
        if self._attend(*pointers, strides, *sizes, width**-0.5, threads or torch.get_num_threads()):
            raise MemoryError(f"no memory for the scores of {tokens} tokens.")
        return out, total.log_().add_(largest, alpha=math.log(2))


@cache
def band_kernel(name: str = "auto") -> BandKernel:
    """The banded kernel in the build `name`, or in the fastest one that can be built and run here.

    Raises KernelError in one line: no compiler, or not this processor.
    """
    choices = [choice for choice in BUILDS if choice.name in ("AVX-512", "AVX2+FMA", "portable")]
    if name != "auto":
        choices = [choice for choice in choices if choice.name == name]
    failure = KernelError(f"{name} is no build of the banded kernel: AVX-512, AVX2+FMA and portable are.")
    for choice in choices:
        try:
            return BandKernel(choice)
        except KernelError as error:  # not this processor, or no compiler that knows it: take the next build
            failure = error
    raise failure


def half_width(tokens: int, share: float, frames: int = 1) -> int:
    """Places on each side of a query: a window of the share of a frame's places, rounded down, and halved so too."""
    return int(tokens // frames * share) // 2


def seen_share(tokens: int, half: int, frames: int = 1) -> float:
    """Mean share of all keys that a query sees; the window is cut at the ends of a frame."""
    places = tokens // frames
    rim = min(half, places - 1)
    return (places * (2 * rim + 1) - rim * (rim + 1)) / places**2


@contextmanager
def replaced(attend: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within the `with`, attend(layer, q, k, v) is the self-attention of whatever network runs.

    It stands in for torch's scaled_dot_product_attention where queries and keys have the same shape (batch, heads,
    tokens, width), without mask, scale or dropout; layer counts these calls from 0. All else passes through, and
    torch's own function is back at the end, whatever happens. Raises ValueError if there was no such call.
    """
    dense, layer = functional.scaled_dot_product_attention, 0

    def attention(query, key, value, attn_mask=None, **options):
        nonlocal layer
        if query.shape != key.shape or attn_mask is not None or any(options.values()):
            return dense(query, key, value, attn_mask, **options)
        layer += 1
        return attend(layer - 1, query, key, value)

    with patch.object(functional, "scaled_dot_product_attention", attention):
        yield
    if layer == 0:
        raise ValueError(
            "nothing was replaced: the network has no scaled_dot_product_attention of tokens to themselves."
        )
