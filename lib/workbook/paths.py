"""Where things are. No notebook writes a relative path of its own."""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # the checkout
NOTEBOOKS = ROOT / "notebooks"  # one notebook a paper, in chapters
DATA = ROOT / "data"  # data sets and checkpoints that ship, listed in MANIFEST.json
FIGURES = ROOT / "figures"  # what `make figures` makes, committed as the reference
BUILD = ROOT / "build"  # executed notebooks, logs, the graph's database; never committed
CACHE = Path(os.environ.get("WORKBOOK_CACHE", ROOT / ".cache"))  # de-quantised weights; safe to delete
