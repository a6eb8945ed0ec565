"""Figures of judges: how often they are right, what they do with their doubt, and what it gains to pick by them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from workbook import plotting

ACCURACY = {"order": "The true order", "label": "The labels of a panel"}
DOUBT = {
    "training": ("Training step", "Mean log σ", "During training"),
    "doubt": ("Exact chance of the less likely side", "Spread of z (after the stretch)", "Doubtful pairs"),
    "calibration": ("Predicted P(A ≻ B)", "Exact P(A ≻ B)", "Calibration"),
}
GAIN, COST = "Gain in true quality over one edit", "Best of n: calls of networks and milliseconds for all n"
USES = {
    "six editors": (COST, GAIN, "Six editors (dotted: predicted)", "x"),
    "one editor": (COST, GAIN, "Tries of InfEdit (dotted: predicted)", "x"),
    "data": ("Data thrown away, %", "True quality of the editor, q₁ + q₂", "Choosing data", ""),
}


def draw_accuracy(table: pd.DataFrame, ceilings: Mapping[float, float], untrained: int) -> Figure:
    """Accuracy against the true order and against a panel's labels: a row a judge, a mark a noise of the annotators.

    table: judge, noise, measure, value, low, high; ceilings: {noise: % of the labels that the best judge gets};
    untrained: how many judges at the end of the table learnt nothing.
    """
    names = list(dict.fromkeys(table.judge))[::-1]
    fig, axes = plotting.panels(2, size=(11.4, 0.33 * len(names) + 1.8), sharey=True)
    for ax, (what, title) in zip(axes, ACCURACY.items(), strict=True):
        ax.axhspan(-0.6, untrained - 0.5, color="0.95", zorder=0)
        for i, (noise, limit) in enumerate(ceilings.items()):
            rows = table[(table.measure == what) & (table.noise == noise)].set_index("judge").reindex(names)
            y, look = np.arange(len(names)) + 0.14 - 0.14 * i, plotting.look(i) | {"linestyle": "", "elinewidth": 2}
            sides = rows.value - rows.low, rows.high - rows.value
            ax.errorbar(rows.value, y, xerr=sides, label=f"annotators' noise {noise:g}", **look)
            if what == "label":
                ax.axvline(limit, color=look["color"], linestyle="-.", linewidth=1.1, ymax=0.95)
                ax.text(limit, len(names) - 0.4, f"ceiling {limit:.0f}", ha="center", fontsize=8, color=look["color"])
        plotting.label(ax, "Pairs called right, %", "", title=title)
    axes[0].set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) + 0.1))
    axes[0].legend(loc="upper left", fontsize=8.5)
    words = "never saw a preference"
    axes[0].text(0.985, untrained - 0.85, words, transform=axes[0].get_yaxis_transform(), ha="right", fontsize=8.5)
    return fig


def draw_sigma(table: pd.DataFrame) -> Figure:
    """log sigma over training; spread against doubt; predicted against exact probability.

    table: panel, judge, x, y, as `preferences.uncertainty` returns it.
    """
    fig, axes = plotting.panels(3, size=(12.6, 4))
    for ax, (panel, (x, y, title)) in zip(axes, DOUBT.items(), strict=True):
        for index, (name, rows) in enumerate(table[table.panel == panel].groupby("judge", sort=False)):
            look = plotting.look(index) | ({"marker": ""} if panel == "training" else {})
            ax.plot(rows.x, rows.y, label=name, **look)
        plotting.label(ax, x, y, title=title)
    axes[2].plot([0, 1], [0, 1], color=plotting.GREY, linewidth=1, label="_")
    axes[1].set(ylim=(0, None), xticks=np.linspace(0, 0.5, 6))
    axes[2].set_xticks(np.linspace(0, 1, 6))
    for ax in axes:
        plotting.label_ends(ax, room=0.3)
    return fig


def draw_uses(table: pd.DataFrame, looks: Mapping[str, int]) -> Figure:
    """Gain of best of n, with what n costs, and an editor's quality against the share of its data thrown away.

    table: panel (one of USES), judge, x, value, low, high, predicted, and the cost of n in calls and milliseconds;
    looks: number of each judge's colour and mark.
    """
    fig, axes = plotting.panels(3, size=(15, 4.6))
    for ax, (panel, part) in zip(axes, table.groupby("panel", sort=False), strict=True):
        for name, rows in part.groupby("judge", sort=False):
            plotting.line_with_interval(ax, rows, x="x", y="value", index=looks[name], label=name)
            ax.plot(rows.x, rows.predicted, ":", color=plotting.look(looks[name])["color"], linewidth=1.4, label="_")
        x, y, title, log = USES[panel]
        plotting.label(ax, x, y, title=title, log=log)
        plotting.plain_ticks(ax.xaxis, sorted(set(part.x)))
        plotting.label_ends(ax, room=0.62)
        if part.calls.notna().any():
            cost = part.groupby("x")[["calls", "milliseconds"]].first()
            texts = [f"{n:g}\n{calls:,.0f}\n{ms:,.0f}" for n, calls, ms in cost.itertuples()]
            ax.set_xticks(cost.index, texts)
            ax.annotate("n\ncalls\nms", (0, 0), (-6, -6), "axes fraction", "offset points", ha="right", va="top")
    return fig
