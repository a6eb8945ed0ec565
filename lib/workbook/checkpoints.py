"""Weights that ship: safetensors by name, checked against the manifest, made by notebooks/checkpoints/."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from workbook import data, paths


def load(name: str, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of data/checkpoints/NAME.safetensors, floating ones as `dtype`. Raises data.DataError if changed."""
    with safe_open(data.checked(f"checkpoints/{name}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is no mapping
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}


def provenance(name: str) -> dict[str, str]:
    """What was said of the training when the checkpoint was saved: steps, seconds, machine, final loss."""
    with safe_open(data.checked(f"checkpoints/{name}.safetensors"), "pt") as file:
        return dict(file.metadata() or {})


def restore(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """Load a checkpoint into a module of the same shape; returns it in eval mode without gradients."""
    module.load_state_dict(load(name))
    return module.eval().requires_grad_(False)


def save(
    name: str,
    tensors: dict[str, torch.Tensor],
    *,
    made_by: str,
    licence: str,
    facts: dict[str, object],
    dtype: torch.dtype = torch.float16,
    folder: Path | None = None,
) -> Path:
    """Write a checkpoint with 16-bit floats and enter it in the manifest. Returns its path.

    made_by: the notebook, "checkpoints/NAME"; facts: numbers of the training run that travel in the file's header.
    """
    folder = folder or paths.DATA / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    partial = path.with_suffix(".partial")
    stored = {k: (t.to(dtype) if t.is_floating_point() else t).detach().cpu().contiguous() for k, t in tensors.items()}
    save_file(stored, partial, metadata={key: str(value) for key, value in facts.items()})
    partial.replace(path)
    if folder == paths.DATA / "checkpoints":
        data.register(
            f"checkpoints/{path.name}", origin=f"trained by notebooks/{made_by}.ipynb", licence=licence, made_by=made_by
        )
    return path
