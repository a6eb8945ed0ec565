"""Weights that ship: safetensors by name, checked against the manifest, made by notebooks/checkpoints/."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from workbook import data, paths

SCALE = ".scale"  # what the name of a tensor of scales ends in
LEAST = 4096  # numbers in the smallest tensor that is worth 8 bits


def load(name: str, *, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tensors of data/checkpoints/NAME.safetensors, floating ones as `dtype`. Raises data.DataError if changed."""
    with safe_open(data.checked(f"checkpoints/{name}.safetensors"), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is no mapping
    tensors = restored(tensors)
    return {key: t.to(dtype) if t.is_floating_point() else t for key, t in tensors.items()}


def eight_bits(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices and kernels as whole numbers from -127 to 127, with a scale for each output: half the bytes of fp16.

    A tensor of at least two dimensions becomes int8, beside it stands NAME.scale in fp16: the largest magnitude of each
    row (all that feeds one output), divided by 127. The error is at most half a scale. Smaller ones stay as they are.
    """
    stored = {}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or tensor.ndim < 2 or tensor.numel() < LEAST:
            stored[key] = tensor
            continue
        rows = tensor.detach().float().flatten(1)
        scale = (rows.abs().amax(1, keepdim=True) / 127).clamp(min=1e-7).half()
        stored[key] = (rows / scale.float()).round().clamp(-127, 127).to(torch.int8).view(tensor.shape)
        stored[key + SCALE] = scale
    return stored


def restored(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What `eight_bits` made, as float32; other tensors as they are."""
    scales = {key.removesuffix(SCALE): t.float() for key, t in tensors.items() if key.endswith(SCALE)}
    plain = {key: t for key, t in tensors.items() if not key.endswith(SCALE)}
    return {key: (t.float().flatten(1) * scales[key]).view(t.shape) if key in scales else t for key, t in plain.items()}


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
    """Write a checkpoint with 16-bit floats, or 8 bits (torch.int8), and enter it in the manifest. Returns its path.

    made_by: the notebook, "checkpoints/NAME"; facts: numbers of the training run that travel in the file's header.
    """
    folder = folder or paths.DATA / "checkpoints"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    partial = path.with_suffix(".partial")
    floats = torch.float16 if dtype == torch.int8 else dtype
    tensors = eight_bits(tensors) if dtype == torch.int8 else tensors
    stored = {k: (t.to(floats) if t.is_floating_point() else t).detach().cpu().contiguous() for k, t in tensors.items()}
    save_file(stored, partial, metadata={key: str(value) for key, value in facts.items()})
    partial.replace(path)
    if folder == paths.DATA / "checkpoints":
        data.register(
            f"checkpoints/{path.name}", origin=f"trained by notebooks/{made_by}.ipynb", licence=licence, made_by=made_by
        )
    return path
