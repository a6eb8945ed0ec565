"""Editors with known faults: what they make of a two-item canvas when told what to change, and how good it truly is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from workbook import data, images
from workbook.models import canvas

KINDS = ("class", "brightness", "direction")
INSTRUCTION = ("left", "right", *KINDS, *canvas.WORDS[4:])  # an instruction is three of them: side, kind, new word
FAULTS = ("exact", "nothing", "wrong word", "wrong side", "too much", "half way")  # the editors made by hand
BLEMISHES = ("none", "blur", "noise", "seam", "misplaced")
HASTE = (1.0, 3.0, 2.0, 2.0, 1.5, 1.0)  # of each editor: its blemish is u**haste, u uniform: who does more spoils more


@dataclass(frozen=True)
class Tasks:
    """Canvases and one instruction each, with all that an editor could make of them.

    x: sources (n, 1, 32, 64); source, target: captions (n, 9); side: the half to change (n,); kind: number in KINDS
    (n,); words: the instruction, numbers in INSTRUCTION (n, 3). Halves (n, 1, 32, 32): asked, the one that was asked
    for; wrong, an item of another class; spill, the other half after the same change.
    """

    x: torch.Tensor
    source: torch.Tensor
    target: torch.Tensor
    side: torch.Tensor
    kind: torch.Tensor
    words: torch.Tensor
    asked: torch.Tensor
    wrong: torch.Tensor
    spill: torch.Tensor
    strange: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, picked) -> Tasks:
        """Some of the tasks; picked: a slice or an array of indices."""
        return Tasks(*(getattr(self, name)[picked] for name in self.__dataclass_fields__))

    def instruction(self, i: int) -> str:
        """Task number i in words: "left: class → bag"."""
        side, kind, word = (INSTRUCTION[n] for n in self.words[i].tolist())
        return f"{side}: {kind} → {word}"


def draw_tasks(count: int, pool: canvas.Canvases, generator: torch.Generator) -> Tasks:
    """`count` tasks: class, brightness and direction in turn, the last of shoes alone, for which a mirror shows."""
    coin = lambda *shape: torch.rand(shape, generator=generator) < 0.5  # noqa: E731
    drawn = lambda high, *shape: torch.randint(high, shape, generator=generator)  # noqa: E731
    order, size = pool.labels.argsort(stable=True), pool.labels.bincount(minlength=10)
    first = size.cumsum(0) - size

    def item(labels: torch.Tensor) -> torch.Tensor:
        """A random item of each class."""
        chosen = (torch.rand(labels.shape, generator=generator) * size[labels]).long()
        return pool.items[order[first[labels] + chosen], 0]

    rows, side, kind = torch.arange(count), drawn(2, count), torch.arange(count) % 3
    labels, bright, mirrored = drawn(10, count, 2), coin(count, 2), coin(count, 2)
    shoe = torch.tensor(canvas.SHOES)[drawn(len(canvas.SHOES), count)]
    labels[rows, side] = torch.where(kind == 2, shoe, labels[rows, side])
    items = item(labels)
    old = labels[rows, side]
    new = torch.where(kind == 0, (old + 1 + drawn(9, count)) % 10, old)
    light, turned = bright[rows, side] ^ (kind == 1), mirrored[rows, side] ^ (kind == 2)
    strange = (new + 1 + drawn(9, count)) % 10
    again = (strange == old) & (new != old)  # neither what was asked for nor what was there
    strange = torch.where(again, (strange + 1) % 10, strange)
    strange = torch.where(again & (strange == new), (strange + 1) % 10, strange)

    def half(items: torch.Tensor, bright: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
        two = (part[:, None].expand(-1, 2, *part.shape[1:]) for part in (items, bright, mirrored))
        return canvas.place(*two)[..., :32]

    other = 1 - side
    same = kind[:, None, None] == 0
    asked = half(torch.where(same, item(new), items[rows, side]), light, turned)
    wrong = half(item(strange), bright[rows, side], mirrored[rows, side])
    spill = half(
        torch.where(same, item(new), items[rows, other]),
        torch.where(kind == 1, light, bright[rows, other]),
        mirrored[rows, other] ^ (kind == 2),
    )
    source = canvas.item_tokens(labels, bright, mirrored)
    after = [part.clone() for part in (labels, bright, mirrored)]
    for part, value in zip(after, (new, light, turned), strict=True):
        part[rows, side] = value
    word = torch.stack([8 + new, 5 - light.long(), 6 + turned.long()], 1)[rows, kind] - 4 + 2 + len(KINDS)
    words = torch.stack([side, 2 + kind, word], 1)
    x = canvas.place(items, bright, mirrored)
    return Tasks(x, source, canvas.item_tokens(*after), side, kind, words, asked, wrong, spill, strange)


def blend(tasks: Tasks, strength: torch.Tensor, spilt: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Canvases in which the half to change went the share `strength` of the way, the other half the share `spilt`.

    strength, spilt: (n,) in [0, 1]; right: bool (n,), towards what was asked, else towards a wrong class.
    """
    shape = (-1, 1, 1, 1)
    goal = torch.where(right.view(shape), tasks.asked, tasks.wrong)
    own, other = canvas.half(tasks.x, tasks.side), canvas.half(tasks.x, 1 - tasks.side)
    own, other = own.lerp(goal, strength.view(shape)), other.lerp(tasks.spill, spilt.view(shape))
    left = (tasks.side == 0).view(shape)
    return torch.cat([torch.where(left, own, other), torch.where(left, other, own)], dim=3)


def blemished(
    x: torch.Tensor, side: torch.Tensor, blemish: torch.Tensor, level: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Canvases with a blemish on one half. side, blemish: int (n,), the latter a number in BLEMISHES; level: (n,)."""
    rows, part, shape = torch.arange(len(x)), canvas.half(x, side), (-1, 1, 1, 1)
    level = level.view(shape)
    kernel = torch.exp(-torch.linspace(-4, 4, 9).square() / 8)
    smooth = functional.pad(part, (4, 4, 4, 4), value=-1.0)
    for window in (kernel.view(1, 1, 1, 9), kernel.view(1, 1, 9, 1)):
        smooth = functional.conv2d(smooth, window / kernel.sum())
    seam, moved = part.clone(), torch.full_like(part, -1.0)
    inner = torch.where(side == 0, 30, 0)  # the two columns at the middle of the canvas
    for column in range(2):
        seam[rows, :, :, inner + column] = part[rows, :, :, inner + column].lerp(torch.ones(1), level[:, :, :, 0])
    pixels = (8 * level.flatten()).round().long()
    for step in range(1, 9):
        here = pixels == step
        moved[here, :, step:, :] = part[here, :, :-step, :]
    moved[pixels == 0] = part[pixels == 0]
    noisy = (part + 0.7 * level * torch.randn(part.shape, generator=generator)).clamp(-1, 1)
    spoilt = torch.stack([part, part.lerp(smooth, level), noisy, seam, moved])[blemish, rows]
    left = (side == 0).view(shape)
    return torch.cat([torch.where(left, spoilt, x[..., :32]), torch.where(left, x[..., 32:], spoilt)], dim=3)


def by_hand(tasks: Tasks, fault: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, NDArray]:
    """What the editors made by hand return, and its true quality. fault: number in FAULTS of each task, (n,).

    Returns edits (n, 1, 32, 64) and quality (n, 2) in [0, 1]: following the instruction, accuracy x strength x (1 -
    change of the other half), and visual quality, 1 - level of the blemish.
    """
    n, uniform = len(tasks), lambda low, high: low + (high - low) * torch.rand(len(tasks), generator=generator)
    strength, spilt, right = torch.ones(n), torch.zeros(n), fault != 2
    strength = torch.where((fault == 1) | (fault == 3), 0.0, strength)
    strength = torch.where(fault == 5, uniform(0.2, 0.8), strength)
    spilt = torch.where(fault == 3, 1.0, torch.where(fault == 4, uniform(0.3, 1.0), spilt))
    level = uniform(0, 1) ** torch.tensor(HASTE)[fault]
    blemish = torch.randint(1, len(BLEMISHES), (n,), generator=generator)
    level = torch.where(blemish == 4, (8 * level).round() / 8, level)
    moves = (canvas.half(tasks.x, 1 - tasks.side) != tasks.spill).flatten(1).any(1)
    follows = right * strength * (1 - spilt * moves)
    edited = blemished(blend(tasks, strength, spilt, right), tasks.side, blemish, level, generator)
    return edited, torch.stack([follows, 1 - level], 1).double().numpy()


def one_edit(task: Tasks, strength: float, spilt: float, blemish: str, level: float) -> torch.Tensor:
    """An edit of one task that goes so far, spills so much and leaves such a blemish (one of BLEMISHES)."""
    share, spill, amount = (torch.tensor([x]) for x in (strength, spilt, level))
    edited, kind = blend(task, share, spill, torch.tensor([True])), torch.tensor([BLEMISHES.index(blemish)])
    return blemished(edited, task.side, kind, amount, torch.Generator().manual_seed(0))


def mixture(
    count: int,
    candidates: int,
    pool: canvas.Canvases,
    generator: torch.Generator,
    *,
    other: Callable[[Tasks], tuple[torch.Tensor, NDArray]] | None = None,
    others: int = 0,
) -> tuple[Tasks, torch.Tensor, NDArray, NDArray]:
    """`count` tasks, each with edits by different editors of FAULTS: (tasks, edits, editor, quality).

    other: one more editor, tasks to (edits, quality), different each time: in the first `others` tasks, two tries of
    it take the places of the first two candidates.
    Shapes (count, candidates, 1, 32, 64), (count, candidates), (count, candidates, 2); the other is number 6.
    """
    tasks = draw_tasks(count, pool, generator)
    fault = torch.rand(count, len(FAULTS), generator=generator).argsort(1)[:, :candidates]
    edited, quality = by_hand(repeated(tasks, candidates), fault.flatten(), generator)
    edited, quality = edited.unflatten(0, (count, -1)), quality.reshape(count, candidates, 2)
    for candidate in range(2 if others and other is not None else 0):
        edited[:others, candidate], quality[:others, candidate] = other(tasks[: min(others, count)])
        fault[:others, candidate] = len(FAULTS)
    return tasks, edited, fault.numpy(), quality


def repeated(tasks: Tasks, count: int) -> Tasks:
    """Each task `count` times in a row."""
    return tasks[torch.arange(len(tasks)).repeat_interleave(count)]


def naive_scores(tasks: Tasks, edited: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores (n,) of edits by rules that know no instruction: the smaller the change, the better."""
    close = torch.from_numpy(images.ssim(edited, tasks.x))
    return {"least change": -(edited - tasks.x).square().mean((1, 2, 3)), "SSIM to source": close}


def untrained_scores(
    tasks: Tasks,
    edited: torch.Tensor,
    log_chances: Callable[[torch.Tensor], torch.Tensor],
    direction: Callable[..., torch.Tensor],
) -> dict[str, torch.Tensor]:
    """Scores (n,) of edits by judges that never saw a preference: `naive_scores` and two that know the task.

    log_chances(halves) → (n, 10): how likely the half shows the class that it should; direction(source, edited, old
    caption, new caption) → (n,): how well the change of the picture goes the way of the change of the caption.
    """
    half, words = canvas.half(edited, tasks.side), canvas.item_words(tasks.target, tasks.side)
    sure = log_chances(half).gather(1, words[:, 2:] - 8)[:, 0]
    way = direction(tasks.x, edited, tasks.source, tasks.target)
    return naive_scores(tasks, edited) | {"classifier": sure, "CLIP direction": way}


class Examiner:
    """The quality of an edit that no rule has made: read off the picture by judges that no reward model has seen.

    Following: probability of the class that should be there x brightness right x direction right x (1 - change of the
    other half, 0.5 root mean square being all of it). Visual quality: 1 where the edited item is as near to its nearest
    real item of the class as half of the real ones are, 0 at three times that distance.
    """

    def __init__(self, judge: canvas.Judge, *, per_class: int = 300):
        items, labels = data.fashion_mnist_tensor("train")
        self.judge = judge
        self.real = [((items[labels == c][:per_class] + 1) / 2).flatten(1) for c in range(10)]
        spare = [((items[labels == c][-100:] + 1) / 2).flatten(1) for c in range(10)]
        self.usual = [torch.cdist(a, b).amin(1).median().item() for a, b in zip(spare, self.real, strict=True)]

    def __call__(self, tasks: Tasks, edited: torch.Tensor) -> NDArray:
        """Quality of edits (n, 1, 32, 64), shape (n, 2): following and visual, in [0, 1]."""
        edited = edited.clamp(-1, 1).cpu()
        half, words = canvas.half(edited, tasks.side), canvas.item_words(tasks.target, tasks.side)
        found, labels = self.judge(half, words), words[:, 2] - 8
        sure = self.judge.probabilities(half)[np.arange(len(tasks)), labels]
        change = (canvas.half(edited, 1 - tasks.side) - canvas.half(tasks.x, 1 - tasks.side)).square().mean((1, 2, 3))
        follows = sure * found["bright"] * found["mirrored"] * (1 - 2 * change.sqrt()).clamp(min=0).double().numpy()
        scale = torch.where(words[:, 0] == 4, 1.0, canvas.DIM)[:, None]
        light = ((half.flatten(1) + 1) / 2 / scale).clamp(0, 1)
        turned = (words[:, 1] == 7)[:, None]
        light = torch.where(turned, light.view(-1, 32, 32).flip(2).flatten(1), light)
        visual = np.zeros(len(tasks))
        for c in range(10):
            if (here := labels == c).any():
                far = torch.cdist(light[here], self.real[c]).amin(1) / self.usual[c]
                visual[here.numpy()] = (1 - (far - 1) / 2).clamp(0, 1).double().numpy()
        return np.stack([follows, visual], 1)
