"""Mosaics of four items of one class, and the U-Net that draws them without being told the class."""

from __future__ import annotations

import torch
from diffusers import UNet2DModel

from workbook import checkpoints
from workbook.moving import small_items


def mosaics(n: int, generator: torch.Generator, *, split: str = "train") -> tuple[torch.Tensor, torch.Tensor]:
    """n pictures of four different items of one class, two by two: (n, 1, 32, 32) in [-1, 1], and labels (n,)."""
    items, labels = small_items(split)
    asked = torch.randint(10, (n,), generator=generator)
    of_class = [torch.nonzero(labels == label)[:, 0] for label in range(10)]
    quarters = torch.stack([items[_four(of_class[label], generator)] for label in asked.tolist()])
    rows = torch.cat([quarters[:, [0, 2]], quarters[:, [1, 3]]], 3)  # upper and lower row, left beside right
    return torch.cat([rows[:, 0], rows[:, 1]], 1)[:, None], asked


def _four(members: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    while len(set((chosen := torch.randint(len(members), (4,), generator=generator)).tolist())) < 4:
        pass
    return members[chosen]


def mosaic_unet() -> UNet2DModel:
    """U-Net for noised 32 × 32 mosaics: 0.9 M parameters, seven self-attention layers.

    It returns the velocity sqrt(abar) e - sqrt(1 - abar) x_0 of DDPM's 1,000 levels: "v_prediction" in diffusers.

    Attention works at 16 × 16 and 8 × 8 and in the middle: what an item in the upper half is can reach the lower half
    through it. All layers but attention are convolutions, so the network takes larger pictures too.
    """
    return UNet2DModel(
        sample_size=32,
        in_channels=1,
        out_channels=1,
        block_out_channels=(24, 48, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )


def load_mosaic_unet(*, device: str = "cpu") -> UNet2DModel:
    """The shipped network, in eval mode without gradients."""
    return checkpoints.restore(mosaic_unet(), "unet_mosaic").to(device)
