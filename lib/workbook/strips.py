"""Figures of a picture that is computed in strips: what travels, how good it is, and how long a step takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from workbook import plotting
from workbook.study import Measured

CATEGORIES = ("attention", "convolution", "normalisation", "output")


def draw_bytes(counts: pd.DataFrame, *, published: float) -> Figure:
    """Attention's bytes relative to the first scheme's against the strips; all bytes of a step, by category.

    counts: columns strips, scheme, category, bytes; published: the paper's saving of attention's bytes, percent.
    """
    fig, (ax, right) = plotting.panels(2, size=(12.4, 4.6), width_ratios=[1, 1.5])
    names = list(counts.scheme.unique())
    wide = counts.pivot_table(index=["strips", "category"], columns="scheme", values="bytes")[names]
    share = wide.xs("attention", level="category").pipe(lambda t: 100 * t.div(t[names[0]], axis=0))
    for index, name in enumerate(names):
        ax.plot(share.index, share[name], label=name, **plotting.look(index))
        for n, y in share[name].items() if index else ():
            place = {"xytext": (0, -14 if y < 50 else 6), "textcoords": "offset points"}
            ax.annotate(f"{y:.1f}".removesuffix(".0"), (n, y), ha="center", fontsize=8.5, **place)
    plotting.label(ax, "Strips (processes)", f"Attention's bytes, % of {names[0]}'s", log="x")
    plotting.plain_ticks(ax.xaxis, share.index)
    ax.set(xlim=(1.5, share.index.max() * 1.1), ylim=(0, 112))
    plotting.published(ax, y=100 - published, text=f"{published:g} % less")
    plotting.label_ends(ax, room=0.55)
    bars = wide.stack().unstack("category")[list(CATEGORIES)] / 1e6
    places = [i + 0.6 * (i // len(names)) for i in range(len(bars))]
    left = 0.0
    for index, category in enumerate(CATEGORIES):
        style = {"color": plotting.COLOURS[index], "edgecolor": "white", "hatch": ("", "//", "", "")[index]}
        right.barh(places, bars[category], left=left, label=category, **style)
        left = left + bars[category].to_numpy()
    for place, size in zip(places, left, strict=True):
        right.text(size, place, f" {size:.2f}", va="center", fontsize=8.5)
    right.set_yticks(places, [f"{scheme}, {n} strips" for n, scheme in bars.index])
    right.invert_yaxis()
    right.grid(axis="y", visible=False)
    plotting.label(right, "Received by all strips in one step of one picture, MB", "")
    right.margins(x=0.12)
    right.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(CATEGORIES), columnspacing=1.2, handlelength=1.4)
    return fig


def draw_quality(table: pd.DataFrame, shares: Sequence[float], levels: Mapping[str, float]) -> Figure:
    """PSNR and agreement against the share p, a line for each number of strips; schemes without p stand at the sides.

    table: columns strips, scheme ("never", "alone", "PCPP p", "DistriFusion"), and psnr and agreement, each with
    _value, _low, _high; levels: three agreements to compare with, by name.
    """
    fig, axes = plotting.panels(2, size=(12.4, 4.4))
    words = {"psnr": "PSNR to the picture of one process, dB", "agreement": "Halves of the same kind, %"}
    spots = {"never": -0.52, "alone": -0.3} | {f"PCPP {p:g}": p for p in sorted(shares)} | {"DistriFusion": 1.28}
    for ax, (word, title) in zip(axes, words.items(), strict=True):
        for index, (n, rows) in enumerate(table[table.strips > 1].groupby("strips")):
            rows, x = rows.set_index("scheme").loc[list(spots)], np.array(list(spots.values())) + 0.018 * index
            y, low, high = (rows[f"{word}_{end}"] for end in ("value", "low", "high"))
            style = plotting.look(index)
            ax.errorbar(x, y, [y - low, high - y], **style | {"linestyle": ""}, elinewidth=0.9, capsize=2)
            ax.plot(x[2:-1], y.iloc[2:-1], label=f"{n} strips", **style)
        ax.set_xticks(list(spots.values()), [name.removeprefix("PCPP ") for name in spots], fontsize=8.5)
        plotting.label(ax, "Share p of each neighbour that PCPP sees; at the sides, schemes without it", title)
        for edge in (-0.14, 1.12):
            ax.axvline(edge, color=plotting.GREY, lw=0.8)
    beside = axes[1].get_yaxis_transform()
    for name, side in zip(sorted(levels, key=levels.get), ("center", "top", "bottom"), strict=True):
        axes[1].axhline(levels[name], color=plotting.GREY, lw=1, ls="--")
        axes[1].text(1.01, levels[name], name, color=plotting.GREY, fontsize=8.5, va=side, transform=beside)
    axes[1].set_ylim(-4, 106)
    axes[0].legend(loc="lower right", bbox_to_anchor=(0.8, 0))
    return fig


def draw_speed(
    table: pd.DataFrame,
    speed: Mapping[str, Measured],
    modelled: Mapping[int, float],
    *,
    names: Sequence[str],
    fast: str,
    ceiling: float,
    published: Mapping[int, float],
    side: int,
) -> Figure:
    """Milliseconds of a step of two processes, computing and waiting; speed-ups against the number of processes.

    table: columns seconds and waiting (in ms) by contestant; names: the contestants that are drawn, first of them one
    process; fast: the one whose speed-up is modelled; ceiling: the speed-up of two processes that never speak.
    """
    fig, (ax, right) = plotting.panels(2, size=(12.4, 4.2), width_ratios=[1.3, 1])
    rows, first = table.loc[list(names)], names[0]
    computing = rows.seconds - rows.waiting
    ax.barh(names, computing, label="computing", color=plotting.COLOURS[0], edgecolor="white")
    style = {"color": plotting.COLOURS[1], "edgecolor": "white", "hatch": "//"}
    ax.barh(names, rows.waiting, left=computing, label="messages and waiting", **style)
    for name in names:
        text = f" {rows.seconds[name]:.0f} ms" + ("" if name == first else f", {speed[name].value:.2f}×")
        ax.text(rows.seconds[name], name, text, va="center", fontsize=9)
    limit = rows.seconds[first] / ceiling
    ax.axvline(limit, color=plotting.INK, lw=1.2, ls="--")
    ax.text(limit, len(names) - 0.45, f" two processes that never speak: {ceiling:.2f}×", fontsize=8.5, va="top")
    ax.set(xlim=(0, 1.25 * rows.seconds.max()), ylim=(len(names) - 0.05, -0.6))
    ax.grid(axis="y", visible=False)
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    plotting.label(ax, f"One step of one picture of {side} × {side}, two processes, ms", "")
    counts, m = list(modelled), speed[fast]
    right.plot(counts, counts, color=plotting.GREY, lw=1, ls=":", label="as many times as processes")
    right.plot(counts, list(modelled.values()), label=f"{fast}, modelled", **plotting.look(1))
    error = [[m.value - m.low], [m.high - m.value]]
    right.errorbar(
        [2], [m.value], error, fmt="o", ms=8, color=plotting.COLOURS[0], capsize=3, label=f"{fast}, measured"
    )
    plotting.label(right, "Processes", "Speed-up over one process, ×", log="xy")
    for count, y in published.items():
        plotting.published(right, x=count, y=y, text=f"{y:g}×")
    plotting.plain_ticks(right.xaxis, counts)
    plotting.plain_ticks(right.yaxis, (1, 1.5, 2, 3, 4, 6, 8))
    right.set(xlim=(1.8, 12), ylim=(min(1, 0.9 * m.low, 0.9 * min(modelled.values())), 10))
    right.legend(loc="lower left", bbox_to_anchor=(0, 1))
    return fig
