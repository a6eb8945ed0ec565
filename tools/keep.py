"""Store the outputs that nbval compares: python tools/keep.py CHAPTER/NAME, after `make quick N=CHAPTER/NAME`.

The outputs of cells tagged `keep_output` are copied from the executed notebook of the quick profile.
"""

import sys

import nbformat

from workbook import notebook
from workbook.plan import plan


def keep(name: str) -> int:
    """Copy the outputs into the notebook; returns how many cells were filled."""
    chosen = plan(notebook.find(name), "quick")
    executed = nbformat.read(chosen.executed, 4)
    outputs = {cell.id: cell for cell in executed.cells if "keep_output" in cell.metadata.get("tags", [])}
    document = nbformat.read(chosen.notebook, 4)
    filled = 0
    for cell in document.cells:
        if cell.id in outputs and "keep_output" in cell.metadata.get("tags", []):
            kept = [output for output in outputs[cell.id].outputs if output.get("name") != "stderr"]
            cell.outputs, cell.execution_count = kept, outputs[cell.id].execution_count
            filled += 1
    nbformat.write(document, chosen.notebook)
    return filled


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {keep(name)} cells")
