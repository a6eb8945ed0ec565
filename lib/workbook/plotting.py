"""One style for all figures: a colour-blind-safe palette with markers and dashes, direct labels, byte-stable files."""

from __future__ import annotations

import base64
import io
import re
from optparse import Values
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito (2008), ordered so that neighbours also differ in lightness, which keeps grey prints legible.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000", "#8C8C8C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1.2)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
    "-",
    (0, (2, 2)),
)
INK, GREY = "#222222", "#767676"


def use_style() -> None:
    """Set matplotlib's defaults for the whole notebook."""
    mpl.rcParams.update(
        {
            "figure.dpi": 110, "savefig.dpi": 130, "figure.figsize": (6.4, 4.0), "figure.constrained_layout.use": True,
            "font.size": 10, "font.family": "DejaVu Sans", "axes.titlesize": 10.5, "axes.titlelocation": "left",
            "axes.labelsize": 10, "axes.labelcolor": INK, "text.color": INK, "axes.edgecolor": GREY,
            "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#E4E4E4",
            "grid.linewidth": 0.7, "axes.axisbelow": True, "xtick.color": GREY, "ytick.color": GREY,
            "lines.linewidth": 1.8, "lines.markersize": 5.5, "legend.frameon": False,
            "axes.prop_cycle": mpl.cycler(color=COLOURS[:6]), "svg.hashsalt": "workbook", "svg.fonttype": "path",
            "savefig.bbox": None,
        }
    )  # fmt: skip


def look(index: int) -> dict[str, Any]:
    """Colour, marker and dash number `index` of the palette, as keyword arguments of `Axes.plot`."""
    i = index % len(COLOURS)
    return {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": DASHES[i]}


def panel(
    x: str, y: str, *, title: str = "", size: tuple[float, float] = (6.4, 4.0), log: str = ""
) -> tuple[Figure, Axes]:
    """A figure with one labelled axes. log: any of "", "x", "y", "xy"."""
    fig, ax = plt.subplots(figsize=size)
    label(ax, x, y, title=title, log=log)
    return fig, ax


def panels(count: int, *, size: tuple[float, float] = (9.6, 3.9), **options) -> tuple[Figure, np.ndarray]:
    """A figure with `count` axes side by side."""
    fig, axes = plt.subplots(1, count, figsize=size, squeeze=False, **options)
    return fig, axes[0]


def label(ax: Axes, x: str, y: str, *, title: str = "", log: str = "") -> None:
    """Axis labels (with units), an optional title, logarithmic axes."""
    ax.set(xlabel=x, ylabel=y, title=title)
    if "x" in log:
        ax.set_xscale("log")
    if "y" in log:
        ax.set_yscale("log")


def line_with_interval(
    ax: Axes, rows: pd.DataFrame, *, x: str, y: str, index: int, label: str = "", low: str = "low", high: str = "high"
) -> None:
    """A line with markers, its interval as a band when columns `low` and `high` exist, and a label for `label_ends`."""
    rows = rows.sort_values(x)
    ax.plot(rows[x], rows[y], label=label, **look(index))
    if low in rows and high in rows:
        ax.fill_between(rows[x], rows[low], rows[high], color=look(index)["color"], alpha=0.16, linewidth=0)


def label_ends(ax: Axes, *, gap: float = 0.05, pad: float = 0.02, room: float = 0.28, size: float = 8.5) -> None:
    """Write each labelled line's name at its right end, pushed apart vertically, instead of a legend.

    gap: least distance between labels, as a fraction of the axes' height; room: fraction of the x range that is added
    on the right for the text.
    """
    drawn = ax.get_lines()
    lines = [line for line in drawn if not line.get_label().startswith("_") and len(line.get_xdata())]
    if not lines:
        return
    low, high = ax.get_xlim()
    transform = ax.transScale.transform
    left, right = (transform((v, ax.get_ylim()[1]))[0] for v in (low, high))
    widened = right + room * (right - left)
    ax.set_xlim(low, ax.transScale.inverted().transform((widened, transform((high, ax.get_ylim()[1]))[1]))[0])
    to_axes = ax.transData + ax.transAxes.inverted()
    ends = [(to_axes.transform((line.get_xdata()[-1], line.get_ydata()[-1])), line) for line in lines]
    ends.sort(key=lambda end: end[0][1])
    heights = np.array([end[0][1] for end in ends])
    for _ in range(200):  # relax overlaps symmetrically; a handful of labels converges at once
        moved = False
        for i in range(len(heights) - 1):
            lack = gap - (heights[i + 1] - heights[i])
            if lack > 1e-9:
                heights[i] -= lack / 2
                heights[i + 1] += lack / 2
                moved = True
        heights = np.clip(heights, 0.0, 1.0) if len(heights) * gap < 1 else heights
        if not moved:
            break
    for height, ((x, y), line) in zip(heights, ends, strict=True):
        ax.annotate(
            line.get_label(), xy=(x, y), xytext=(x + pad, height), xycoords="axes fraction", textcoords="axes fraction",
            color=line.get_color(), fontsize=size, va="center", ha="left", annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": line.get_color(), "lw": 0.6, "shrinkA": 0, "shrinkB": 3}
            if abs(height - y) > gap / 3 else None,
        )  # fmt: skip


def plain_ticks(axis, values) -> None:
    """Ticks at `values`, written as plain numbers: for logarithmic axes over a few settings."""
    axis.set_ticks(list(values), [f"{v:g}" for v in values])
    axis.set_tick_params(which="minor", size=0)
    axis.set_minor_formatter(mpl.ticker.NullFormatter())


def published(ax: Axes, *, y: float | None = None, x: float | None = None, text: str = "") -> None:
    """Mark a value that the paper states: a thin dash-dotted line (y or x alone) or a star (both), and its source."""
    style = {"color": GREY, "linewidth": 1.1, "linestyle": (0, (6, 2, 1, 2)), "zorder": 1.5}
    if x is not None and y is not None:
        ax.plot([x], [y], marker="*", markersize=12, color="white", markeredgecolor=INK, zorder=4, label="_published")
        ax.annotate(f"paper: {text}", (x, y), xytext=(6, 6), textcoords="offset points", fontsize=8, color=INK)
    elif y is not None:
        ax.axhline(y, label="_published", **style)
        ax.annotate(f"paper: {text}", (0.01, y), xycoords=("axes fraction", "data"), xytext=(0, 3),
                    textcoords="offset points", fontsize=8, color=GREY)  # fmt: skip
    elif x is not None:
        ax.axvline(x, label="_published", **style)
        ax.annotate(f"paper: {text}", (x, 0.02), xycoords=("data", "axes fraction"), xytext=(3, 0),
                    textcoords="offset points", fontsize=8, color=GREY, rotation=90)  # fmt: skip


def write(fig: Figure, stem: Path, *, alt: str) -> list[Path]:
    """Write STEM.svg and STEM.png with the alt text inside; the same figure gives the same bytes."""
    svg, png = stem.with_suffix(".svg"), stem.with_suffix(".png")
    vector, raster = io.BytesIO(), io.BytesIO()
    fig.savefig(vector, format="svg", metadata={"Date": None, "Creator": None, "Description": alt})
    fig.savefig(raster, format="png")
    svg.write_text(smaller_svg(vector.getvalue().decode()), encoding="utf-8")
    png.write_bytes(smaller_png(raster.getvalue(), alt=alt))
    return [svg, png]


def smaller_png(data: bytes, *, alt: str = "") -> bytes:
    """The PNG file in greys, or in the 72 colours that fit, white and the workbook's own: a rare mark keeps its hue.

    alt: the description that the file carries.
    """
    from PIL import Image, ImageChops, PngImagePlugin

    text, out = PngImagePlugin.PngInfo(), io.BytesIO()
    if alt:
        text.add_itxt("Description", alt)
    picture = Image.open(io.BytesIO(data)).convert("RGB")
    grey = picture.convert("L")
    if ImageChops.difference(grey.convert("RGB"), picture).getbbox() is None:  # no colour anywhere
        picture = grey
    else:
        exact, fitted = np.asarray(picture), picture.quantize(72, kmeans=2, dither=Image.Dither.NONE)
        number, palette = np.array(fitted), fitted.getpalette()[:216]
        for place, colour in enumerate((*COLOURS, "#FFFFFF"), len(palette) // 3):
            palette += (own := [int(colour[i : i + 2], 16) for i in (1, 3, 5)])
            number[(exact == own).all(2)] = place
        picture = Image.fromarray(number)
        picture.putpalette(palette)
    picture.save(out, format="png", pnginfo=text, optimize=True)
    return out.getvalue()


def smaller_svg(text: str) -> str:
    """The SVG with five digits a coordinate (0.01 points), short names, and its pictures through smaller_png."""
    from scour import scour

    def embedded(match: re.Match) -> str:
        return match[1] + base64.b64encode(smaller_png(base64.b64decode(match[2]))).decode()

    options = {"digits": 5, "indent_type": None, "newlines": False, "shorten_ids": True, "strip_ids": True}
    text = re.sub(r"(data:image/png;base64,)([\w+/=\s]+)", embedded, text)
    return scour.scourString(text, scour.sanitizeOptions(Values({**options, "strip_comments": True})))


def show(fig: Figure) -> None:
    """Display a figure once in a notebook, and free it."""
    from IPython.display import display

    display(fig)
    plt.close(fig)


def contact_sheet(images: np.ndarray, *, rows: list[str], columns: int, title: str = "", scale: float = 0.62) -> Figure:
    """Grey images in a grid, one labelled row each. images: (len(rows), columns, height, width), any range."""
    fig, axes = plt.subplots(
        len(rows),
        columns,
        figsize=(scale * columns + 1.4, scale * len(rows) + 0.3),
        squeeze=False,
        layout="constrained",
    )
    for row, name in enumerate(rows):
        for column in range(columns):
            ax = axes[row, column]
            ax.imshow(images[row, column], cmap="gray_r", interpolation="none")  # an SVG then holds the pixels
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    if title:
        fig.suptitle(title, fontsize=10.5, x=0.01, ha="left")
    return fig
