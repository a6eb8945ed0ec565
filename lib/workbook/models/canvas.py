"""Two Fashion-MNIST items on one canvas, the caption that says what they are, and the U-Net that draws from captions.

A canvas is 32 x 64 pixels in [-1, 1]: two items side by side, each bright or dim, each plain or mirrored. Its caption
is nine tokens, three words an item, so that an edit is one word and the other half is a background known to the pixel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from workbook import checkpoints, data, images
from workbook.diffusion import DiscreteVP

WORDS = ("<start>", "<end>", "<null>", "and", "bright", "dim", "plain", "mirrored", *data.FASHION_MNIST_CLASSES)
LENGTH = 9  # <start> bright plain bag and dim mirrored sneaker <end>
BRIGHT, MIRRORED, NOUN = (1, 5), (2, 6), (3, 7)  # where the words of the left and of the right item stand
DIM = 0.5  # what a dim item keeps of its brightness
SHOES = (5, 7, 9)  # sandal, sneaker, ankle boot: the classes whose items all point one way, so that a mirror shows

Conditional = Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor]  # (x, t, tokens) -> eps, of x's shape


# -- canvases and captions --------------------------------------------------------------------------------------------


def tokens(caption: str) -> torch.Tensor:
    """Token numbers of "bright plain bag and dim mirrored ankle boot", shape (9,). Raises ValueError on other text."""
    words = caption.replace("ankle boot", "ankle_boot").split()
    words = ["<start>", *(w.replace("_", " ") for w in words), "<end>"]
    allowed = ({4, 5}, {6, 7}, set(range(8, 18)))
    slots = ({0}, *allowed, {3}, *allowed, {1})
    known = [WORDS.index(w) if w in WORDS else -1 for w in words]
    if len(known) != LENGTH or any(k not in slot for k, slot in zip(known, slots, strict=True)):
        raise ValueError(f"{caption!r} is no caption. One is: 'bright plain bag and dim mirrored ankle boot'.")
    return torch.tensor(known)


def caption(numbers: torch.Tensor) -> str:
    """The words of one row of tokens, shape (9,), without <start> and <end>."""
    return " ".join(WORDS[int(n)] for n in numbers[1:-1])


def null_tokens(count: int) -> torch.Tensor:
    """The empty caption, which classifier-free guidance compares with, shape (count, 9)."""
    return torch.full((count, LENGTH), WORDS.index("<null>"))


def item_tokens(labels: torch.Tensor, bright: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Captions of pairs of items, shape (n, 9). labels: int (n, 2), 0 to 9; bright, mirrored: bool (n, 2)."""
    numbers = torch.full((len(labels), LENGTH), WORDS.index("and"))
    numbers[:, 0], numbers[:, -1] = WORDS.index("<start>"), WORDS.index("<end>")
    for words, values in ((BRIGHT, 5 - bright.long()), (MIRRORED, 6 + mirrored.long()), (NOUN, 8 + labels)):
        numbers[:, list(words)] = values
    return numbers


def place(items: torch.Tensor, bright: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Canvases of pairs of items, shape (n, 1, 32, 64). items: (n, 2, 32, 32) in [-1, 1]; bright, mirrored: (n, 2)."""
    turned = torch.where(mirrored[:, :, None, None], items.flip(3), items)
    scale = torch.where(bright, 1.0, DIM)[:, :, None, None]
    return torch.cat([*((turned + 1) * scale - 1).unbind(1)], dim=2)[:, None]


class Canvases:
    """An endless source of canvases with captions, drawn from one part of Fashion-MNIST ("train" or "test")."""

    def __init__(self, split: str):
        self.items, self.labels = data.fashion_mnist_tensor(split)

    def draw(
        self, count: int, generator: torch.Generator, *, classes: Sequence[int] = range(10)
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(canvases (count, 1, 32, 64), tokens (count, 9)): independent items of `classes`, fair coins for the rest."""
        pool = torch.arange(len(self.labels))
        if len(classes) < 10:
            pool = pool[torch.isin(self.labels, torch.tensor(list(classes)))]
        picked = pool[torch.randint(len(pool), (count, 2), generator=generator)]
        bright, mirrored = (torch.rand(count, 2, generator=generator) < 0.5 for _ in range(2))
        return place(self.items[picked, 0], bright, mirrored), item_tokens(self.labels[picked], bright, mirrored)


def half(canvases: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """The left (side 0) or right (side 1) item of each canvas, shape (n, 1, 32, 32). side: int (n,)."""
    halves = torch.stack(canvases.split(32, dim=3), dim=1)
    return halves[torch.arange(len(canvases), device=canvases.device), side]


class Judge:
    """What an item looks like: its class by `clf_fmnist`, its brightness and its direction by two small fits.

    A dim item keeps half its brightness, so its brightest hundredth of pixels ends below 0.5; the threshold lies midway
    between there and where 99 % of real bright items end. The direction of a shoe is the sign of a linear function of
    the picture minus its mirror image, fitted by ridge regression to real shoes, which all point left.
    """

    def __init__(self, classifier: nn.Module, *, real: int = 6000):
        items, labels = (part[:real] for part in data.fashion_mnist_tensor("train"))
        self.classifier = classifier
        self.device = next(classifier.parameters()).device
        self.threshold = float((DIM + self._brightest(items).quantile(0.01)) / 2)
        odd = self._odd(items[torch.isin(labels, torch.tensor(SHOES))])
        ridge = 0.01 * len(odd) * torch.eye(odd.shape[1])
        self.direction = torch.linalg.solve(odd.T @ odd + ridge, odd.sum(0))

    @staticmethod
    def _brightest(items: torch.Tensor) -> torch.Tensor:
        return (items.flatten(1).quantile(0.99, dim=1) + 1) / 2

    @staticmethod
    def _odd(items: torch.Tensor) -> torch.Tensor:
        """Left half of picture minus mirror image, at one hundred units of light a picture, shape (n, 512)."""
        light = (items[:, 0].clamp(-1, 1) + 1) / 2
        light = 100 * light / light.sum((1, 2), keepdim=True).clamp(min=1)
        return (light - light.flip(2))[:, :, :16].flatten(1)

    def probabilities(self, items: torch.Tensor) -> NDArray:
        """Of the ten classes, shape (n, 10), with dim items brought back to full brightness. items: (n, 1, 32, 32)."""
        dim = self._brightest(items) <= self.threshold
        restored = torch.where(dim[:, None, None, None], (items + 1) / DIM - 1, items)
        return images.judge(self.classifier, restored.clamp(-1, 1).to(self.device))[1]

    def __call__(self, items: torch.Tensor, numbers: torch.Tensor) -> dict[str, NDArray]:
        """Is each item what its three words say? items: (n, 1, 32, 32); numbers: (n, 3), its slice of the caption.

        Returns {"class", "bright", "mirrored", "all"}: bool (n,). Direction counts for shoes alone.
        """
        items, numbers = items.cpu(), numbers.cpu()
        labels = numbers[:, 2] - 8
        named = torch.from_numpy(self.probabilities(items).argmax(1)) == labels
        bright = (self._brightest(items) > self.threshold) == (numbers[:, 0] == 4)
        turned = (self._odd(items) @ self.direction < 0) == (numbers[:, 1] == 7)
        turned |= ~torch.isin(labels, torch.tensor(SHOES))
        found = {"class": named, "bright": bright, "mirrored": turned, "all": named & bright & turned}
        return {key: value.numpy() for key, value in found.items()}


def item_words(numbers: torch.Tensor, side: torch.Tensor) -> torch.Tensor:
    """The three words of the left (side 0) or right (side 1) item, shape (n, 3). numbers: (n, 9); side: int (n,)."""
    return torch.stack([numbers[:, 1:4], numbers[:, 5:8]], dim=1)[torch.arange(len(numbers)), side]


# -- the network ------------------------------------------------------------------------------------------------------


class CanvasUNet(nn.Module):
    """Text-to-canvas U-Net: a diffusers UNet2DConditionModel behind a one-layer text encoder.

    Pixels are folded 2 x 2 into channels, a lossless "latent" of 4 x 16 x 32, and one more channel holds the horizontal
    position (as in CoordConv, Liu et al. 2018), so that telling left from right need not be learnt from the borders.
    Returns the velocity sqrt(abar) e - sqrt(1 - abar) x_0.
    """

    def __init__(self, channels: tuple[int, int, int] = (32, 64, 64), *, width: int = 64):
        super().__init__()
        self.word = nn.Embedding(len(WORDS), width)
        self.place = nn.Parameter(torch.randn(LENGTH, width) * 0.5)
        self.text = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True)
        self.unet = UNet2DConditionModel(
            sample_size=(16, 32),
            in_channels=5,
            out_channels=4,
            block_out_channels=channels,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=4,  # diffusers reads it as the number of heads
            norm_num_groups=8,
        )
        self.register_buffer("horizontal", torch.linspace(-1, 1, 32).expand(1, 1, 16, 32).clone(), persistent=False)

    def encode(self, numbers: torch.Tensor) -> torch.Tensor:
        """Text states of captions, shape (n, 9, width). numbers: int (n, 9)."""
        return self.text(self.word(numbers) + self.place)

    def forward(self, x: torch.Tensor, level: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Velocity at x, shape (n, 1, 32, 64). level: (n,), 0 to 999; numbers: int (n, 9)."""
        folded = functional.pixel_unshuffle(x, 2)
        folded = torch.cat([folded, self.horizontal.expand(len(x), -1, -1, -1)], dim=1)
        return functional.pixel_shuffle(self.unet(folded, level, self.encode(numbers)).sample, 2)


def canvas_schedule() -> DiscreteVP:
    """Stable Diffusion's 1,000 levels: the square roots of beta rise evenly from 0.00085 to 0.012."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return DiscreteVP(np.exp(np.cumsum(np.log1p(-beta))))


def eps_model(network: CanvasUNet, schedule: DiscreteVP) -> Conditional:
    """The network as eps(x, t, tokens): e = sqrt(1 - abar) x + sqrt(abar) velocity."""

    @torch.inference_mode()
    def eps(x: torch.Tensor, t: float, numbers: torch.Tensor) -> torch.Tensor:
        level = torch.full((len(x),), schedule.level(t), dtype=torch.float32, device=x.device)
        velocity = network(x, level, numbers)
        return float(schedule.noise(t)) * x + float(schedule.signal(t)) * velocity

    return eps


def guided(eps: Conditional, numbers: torch.Tensor, scale: float):
    """Classifier-free guidance as a plain model (x, t) -> eps: null + scale (caption - null), one batch of 2 n.

    At scale 1 the null caption drops out, and is not computed.
    """
    if scale == 1:
        return lambda x, t: eps(x, t, numbers)
    both = torch.cat([null_tokens(len(numbers)).to(numbers.device), numbers])

    def model(x: torch.Tensor, t: float) -> torch.Tensor:
        null, captioned = eps(torch.cat([x, x]), t, both).chunk(2)
        return null + scale * (captioned - null)

    return model


def load_canvas_unet(*, device: str = "cpu") -> tuple[CanvasUNet, DiscreteVP]:
    """The checkpoint unet_canvas as (network, schedule)."""
    return checkpoints.restore(CanvasUNet(), "unet_canvas").to(device), canvas_schedule()
