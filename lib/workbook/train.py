"""One small training loop: AdamW, warm-up and cosine decay, an averaged copy of the weights, resumable."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm


def cosine_rate(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear from 0 over `warmup` steps, then half a cosine down to 0 at `steps`."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def fit(
    model: torch.nn.Module,
    loss: Callable[[torch.nn.Module, int], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    warmup: int = 100,
    weight_decay: float = 0.01,
    average: float = 0.999,
    clip: float = 1.0,
    resume: Path | None = None,
    save_every: int = 200,
    log_every: int = 50,
    description: str = "training",
) -> tuple[torch.nn.Module, list[dict]]:
    """Minimise `loss(model, step)` and return the averaged model and the training history.

    loss: draws its batch from a generator seeded by `step`, so that a resumed run sees the same batches.
    average: decay of the exponential moving average of the weights; the first steps use a smaller decay,
        (1 + step) / (10 + step), so that the average forgets the random start.
    resume: a safetensors file that holds weights, average and optimiser; written every `save_every` steps and
        removed at the end. An existing file continues where it stopped.
    Returns (averaged model in eval mode, [{"step", "loss", "rate"}] with the mean loss of each `log_every` steps).
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, fused=True)
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    averages = [dict(averaged.named_parameters())[n] for n in names]
    start, history, recent = 0, [], []
    if resume is not None and Path(resume).exists():
        start = _restore(Path(resume), names, parameters, averages, optimiser)
    model.train()
    progress = tqdm(range(start, steps), initial=start, total=steps, desc=description, mininterval=10)
    for step in progress:
        rate = learning_rate * cosine_rate(step, steps, warmup)
        for group in optimiser.param_groups:
            group["lr"] = rate
        value = loss(model, step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(average, (1 + step) / (10 + step))
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        recent.append(value.item())
        if (step + 1) % log_every == 0 or step + 1 == steps:
            history.append({"step": step + 1, "loss": sum(recent) / len(recent), "rate": rate})
            progress.set_postfix(loss=f"{history[-1]['loss']:.4f}")
            recent = []
        if resume is not None and (step + 1) % save_every == 0:
            _store(Path(resume), step + 1, names, parameters, averages, optimiser)
    for (_, target), (_, source) in zip(averaged.named_buffers(), model.named_buffers(), strict=True):
        target.copy_(source)
    if resume is not None:
        Path(resume).unlink(missing_ok=True)
    return averaged, history


def _store(path, step, names, parameters, averages, optimiser) -> None:
    tensors = {}
    for name, parameter, mean in zip(names, parameters, averages, strict=True):
        state = optimiser.state[parameter]
        tensors |= {
            f"weight/{name}": parameter.detach().contiguous(),
            f"average/{name}": mean.contiguous(),
            f"first/{name}": state["exp_avg"].contiguous(),
            f"second/{name}": state["exp_avg_sq"].contiguous(),
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"step": str(step)})
    partial.replace(path)


def _restore(path, names, parameters, averages, optimiser) -> int:
    with safe_open(path, "pt") as file, torch.no_grad():
        step = int(file.metadata()["step"])
        for name, parameter, mean in zip(names, parameters, averages, strict=True):
            parameter.copy_(file.get_tensor(f"weight/{name}"))
            mean.copy_(file.get_tensor(f"average/{name}"))
            optimiser.state[parameter] = {
                "step": torch.tensor(float(step)),
                "exp_avg": file.get_tensor(f"first/{name}"),
                "exp_avg_sq": file.get_tensor(f"second/{name}"),
            }
    return step


class _WideAttention(TorchFunctionMode):
    """Attention in 32 bits under autocast: on a CPU its backward pass in 16 bits takes eight times as long."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not functional.scaled_dot_product_attention:
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):
            q, k, v = (part.float() for part in args[:3])
            return function(q, k, v, *args[3:], **kwargs)


def sixteen_bits(network: torch.nn.Module, *, compiled: bool = True) -> Callable[..., torch.Tensor]:
    """`network` as a function that multiplies in bfloat16 where the CPU has units for it; the result is float32.

    More than twice as fast there, right to about three digits. The weights stay float32 and those of `network`: what
    trains them trains this function. Elsewhere it is the network as it is. compiled: fuse what lies between the
    multiplications (a minute at the first calls; needs a C++ compiler, and is left out without one).
    """
    if not torch.cpu._is_amx_tile_supported():
        return network

    def call(*args, **kwargs) -> torch.Tensor:
        with _WideAttention(), torch.autocast("cpu", torch.bfloat16):
            return network(*args, **kwargs).float()

    return torch.compile(call) if compiled and shutil.which("g++") else call
