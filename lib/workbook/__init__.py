"""The small library shared by the notebooks of the workbook.

Everything heavy (torch, diffusers, matplotlib) is imported by the module that needs it, never here.
"""

__version__ = "0.1.0"
