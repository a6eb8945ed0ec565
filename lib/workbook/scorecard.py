"""The scorecard: what each notebook found and how the paper's claims fared, as a table and as one picture."""

from __future__ import annotations

import sys
from pathlib import Path

from workbook import notebook, paths
from workbook.files import read_object

START, END = "<!-- scorecard:start -->", "<!-- scorecard:end -->"
VERDICTS = ("reproduced", "partly", "not reproduced", "out of reach")
LOOK = {  # a shape and a lightness of its own each, so that it reads in grey
    "reproduced": {"marker": "o", "markerfacecolor": "#009E73", "markeredgecolor": "#009E73"},
    "partly": {"marker": "o", "markerfacecolor": "#E69F00", "markerfacecoloralt": "white", "markeredgecolor": "#B37A00",
               "fillstyle": "left"},
    "not reproduced": {"marker": "X", "markerfacecolor": "#D55E00", "markeredgecolor": "#8F3F00"},
    "out of reach": {"marker": "o", "markerfacecolor": "white", "markeredgecolor": "#8C8C8C"},
}  # fmt: skip


def write() -> int:
    """Write the README's table between its markers, and figures/scorecard.svg and .png."""
    records = {name: record for name in notebook.names() if (record := read_object(_record(name)))}
    if not records:
        print("There is no record yet: run make figures first.", file=sys.stderr)
        return 1
    readme = paths.ROOT / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.exists() else ""
    if START not in text or END not in text:
        print(f"README.md has no place for the scorecard: a line {START} and a line {END}.", file=sys.stderr)
        return 1
    before, _, rest = text.partition(START)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{START}\n{table(records)}{END}{after}", encoding="utf-8")
    from workbook import plotting

    plotting.use_style()
    plotting.write(draw(records), paths.FIGURES / "scorecard", alt=sentence(records))
    return 0


def _record(name: str) -> Path:
    return paths.FIGURES / name / "record.json"


def counts(records: dict[str, dict]) -> dict[str, int]:
    """How many claims have which verdict."""
    found = [claim["verdict"] for record in records.values() for claim in record["claims"]]
    return {verdict: found.count(verdict) for verdict in VERDICTS}


def sentence(records: dict[str, dict]) -> str:
    """What the scorecard says in one sentence."""
    parts = ", ".join(f"{count} {verdict}" for verdict, count in counts(records).items())
    return f"{sum(counts(records).values())} claims of {len(records)} papers: {parts}."


def table(records: dict[str, dict]) -> str:
    """The Markdown table: notebook, paper, finding, and how many claims have which verdict."""
    heads = f"| notebook | paper | finding | {' | '.join(VERDICTS)} |"
    lines = [sentence(records), "", heads, "| --- " * 3 + "| ---: " * 4 + "|"]
    for name, record in records.items():
        paper = record["paper"]
        link = f"[{paper['title']}](https://arxiv.org/abs/{paper['arxiv']}) ({paper['year']})"
        numbers = " | ".join(str(count or "·") for count in counts({name: record}).values())
        cells = (f"[{name}](notebooks/{name}.ipynb)", link, _cell(record["finding"]))
        lines.append(f"| {' | '.join(cells)} | {numbers} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def draw(records: dict[str, dict]):
    """One row a notebook, one mark a claim with its number, the verdict in shape and colour."""
    import matplotlib.pyplot as plt
    from matplotlib.lines import Line2D

    from workbook import plotting

    columns = max(len(record["claims"]) for record in records.values())
    fig, ax = plt.subplots(figsize=(max(6.4, 2.6 + 0.55 * columns), 0.9 + 0.3 * len(records)))
    for row, record in enumerate(records.values()):
        for column, claim in enumerate(record["claims"]):
            ax.plot(column, row, linestyle="", markersize=9, **LOOK[claim["verdict"]])
            name = claim["id"].partition(",")[0]  # "G5, batch 4" stands under G5: there is no room for more
            ax.annotate(name, (column, row), (8, 0), textcoords="offset points", va="center", fontsize=8)
    ax.set(xlim=(-0.6, max(columns, 8) - 0.4), ylim=(len(records) - 0.4, -0.6))
    ax.set_yticks(range(len(records)), list(records))
    ax.set_xticks([])
    ax.tick_params(length=0, labelcolor=plotting.INK)
    ax.spines[:].set_visible(False)
    total = counts(records)
    handles = [Line2D([], [], linestyle="", markersize=9, label=f"{total[v]} {v}", **LOOK[v]) for v in VERDICTS]
    fig.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, columnspacing=1.2, handletextpad=0.3)
    return fig
