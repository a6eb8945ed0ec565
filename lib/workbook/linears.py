"""Linear layers side by side: those that torch has for one weight, timed on weights that no cache holds."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from workbook import measure, plotting
from workbook.kernels import Int4Kernel
from workbook.models.lm import Linear

T = TypeVar("T")

Product = Callable[[torch.Tensor], Callable[[], object]]  # x (m, K) float32 -> the call to time


def in_turn(make: Callable[[], T], size: int, total: int) -> Iterator[T]:
    """Copies of something of `size` bytes, as many as make up `total` bytes, handed out in turn for ever.

    So that no cache holds them: a model's layers follow each other, and each one's weights come from memory.
    """
    return itertools.cycle([make() for _ in range(max(1, -(-total // size)))])


def in_rotation(linear: Callable[[torch.Tensor], object], size: int, total: int) -> Product:
    """A product of a linear layer of `size` bytes whose copies take turns over `total` bytes."""
    linears = in_turn(lambda: copy.deepcopy(linear), size, total)
    return lambda x: lambda: next(linears)(x)


def stream(kernel: Int4Kernel | None, size: int, total: int) -> Product:
    """What reads `size` bytes and does nothing else: the least time of any product with weights of that size.

    By the kernel's own loop, or torch's sum where there is no kernel.
    """
    parts = in_turn(lambda: torch.ones(size // 4), size, total)
    return lambda x: lambda: kernel.read(next(parts)) if kernel else next(parts).sum()


def matrix_rate(*, dtype: torch.dtype, device: str, side: int = 1536, repeats: int = 9) -> float:
    """Operations a second of the best of several square matrix products of torch."""
    a = torch.randn(side, side, device=device).to(dtype)
    table = time_products({"square": lambda x: lambda: a @ a}, 1, [1], repeats=repeats)
    return 2 * side**3 / table.seconds.min()


def torch_products(
    weight: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, *, total: int
) -> dict[str, Product]:
    """torch's linear layers for one weight (N, K) with codes (N, K) and scales (N, K/g), by name, on weight's device.

    Each takes x in the type that it wants; the conversion is not timed. total: bytes over which the weights rotate.
    """
    n, k = weight.shape
    group, linear = k // scales.shape[1], torch.nn.functional.linear
    products: dict[str, Product] = {}

    def add(name: str, make: Callable[[], object], bits: float, apply: Callable, dtype: torch.dtype) -> None:
        weights = in_turn(make, int(bits * n * k / 8), total)

        def prepare(x: torch.Tensor) -> Callable[[], object]:
            x = x.to(weight.device, dtype)
            return lambda: apply(x, next(weights))

        products[name] = prepare

    for name, dtype in (("torch bf16", torch.bfloat16), ("torch fp16", torch.float16)):
        add(name, lambda dtype=dtype: weight.to(dtype, copy=True), 16, linear, dtype)
    add("torch fp32", lambda: Linear(weight), 32, lambda x, packed: packed(x), torch.float32)
    zeros = torch.stack([scales, torch.zeros_like(scales)], 2).transpose(0, 1).bfloat16().contiguous()
    if weight.device.type == "cuda":
        nibbles = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        convert, multiply = (lambda: torch.ops.aten._convert_weight_to_int4pack(nibbles, 8)), "_weight_int4pack_mm"
    else:
        ints = codes.int()
        convert, multiply = (
            lambda: torch.ops.aten._convert_weight_to_int4pack_for_cpu(ints, 1),
            "_weight_int4pack_mm_for_cpu",
        )
        coarse = weight.abs().amax(1) / 127
        bytes_ = (weight / coarse[:, None]).round().to(torch.int8)
        eight = torch.ops.aten._weight_int8pack_mm
        add("torch int8", bytes_.clone, 8, lambda x, w: eight(x, w, coarse.bfloat16()), torch.bfloat16)
    four = getattr(torch.ops.aten, multiply)
    add("torch int4", convert, 4, lambda x, w: four(x, w, group, zeros), torch.bfloat16)
    return products


def time_products(
    products: Mapping[str, Product], inputs: int, batches: Sequence[int], *, repeats: int
) -> pd.DataFrame:
    """Seconds of products with x (m, inputs), interleaved: columns name, repeat, seconds, m.

    At most three rounds above 16 rows, where products without a matrix unit take seconds.
    """
    tables = []
    for m in tqdm(batches, desc="timing products", mininterval=2, disable=len(batches) < 2):
        x = torch.randn(m, inputs)
        calls = {name: _finished(prepare(x)) for name, prepare in products.items()}
        table = measure.interleaved(calls, repeats=repeats if m <= 16 else min(repeats, 3))
        tables.append(table.assign(m=m))
    return pd.concat(tables, ignore_index=True)


def relative_speed(runs: pd.DataFrame, reference: pd.Series, *, seed: int = 0) -> pd.DataFrame:
    """Speed over `reference` seconds (by m) of what `time_products` timed: columns m, name, speed, low, high."""
    rows = []
    for (m, name), seconds in runs.groupby(["m", "name"]).seconds:
        speed = measure.bootstrap(reference[m] / seconds, np.median, seed=seed)
        rows.append({"m": m, "name": name, "speed": speed.value, "low": speed.low, "high": speed.high})
    return pd.DataFrame(rows)


def _finished(call: Callable[[], object]) -> Callable[[], object]:
    """The call with all that it starts on a GPU."""
    if not torch.cuda.is_available():
        return call

    def finished():
        call()
        torch.cuda.synchronize()

    return finished


def draw_roofline(points: pd.DataFrame, bandwidth: float, rate: float, *, mark: str):
    """Operations a second over operations per byte of weights, under the roofs of `bandwidth` (B/s) and `rate` (1/s).

    points: columns name, m, intensity (operations per byte), gflops; mark: the name whose points show their m.
    """
    roofs = f"Roofs: memory {bandwidth / 1e9:.1f} GB/s, products {rate / 1e9:.0f} GFLOP/s"
    fig, ax = plotting.panel(
        "Operations per byte of weights", "GFLOP/s (of the dense product)", title=roofs, log="xy", size=(7.2, 4.6)
    )
    reach = np.geomspace(points.intensity.min() / 1.5, points.intensity.max() * 1.5, 90)
    roof = np.minimum(reach * bandwidth, rate) / 1e9
    ax.plot(reach, roof, color=plotting.INK, linewidth=1.2)
    plotting.plain_ticks(ax.xaxis, [x for x in 4.0 ** np.arange(-2, 8) if reach[0] <= x <= reach[-1]])
    low, high = points.gflops.min() / 1.5, 1.5 * max(roof[-1], points.gflops.max())
    plotting.plain_ticks(ax.yaxis, [y for y in 2.0 ** np.arange(-4, 20) if low <= y <= high])
    ax.set_ylim(low, high)
    for index, (name, rows) in enumerate(points.groupby("name", sort=False)):
        plotting.line_with_interval(ax, rows, x="intensity", y="gflops", index=index, label=name)
    for row in points[points.name == mark].itertuples():
        ax.annotate(
            f"m = {row.m}",
            (row.intensity, row.gflops),
            xytext=(-3, 7),
            textcoords="offset points",
            fontsize=7.5,
            ha="right",
        )
    ax.legend(loc="lower right", fontsize=8.5)  # the ends of these lines lie on each other
    return fig
