"""The epsilon-predicting U-Net of the diffusion chapter, a diffusers UNet2DModel."""

from __future__ import annotations

from diffusers import UNet2DModel


def eps_unet(channels: tuple[int, ...] = (24, 48, 48), *, size: int = 32) -> UNet2DModel:
    """U-Net that predicts the noise in a one-channel image of `size` x `size` pixels; 0.63 M parameters by default."""
    down = ["DownBlock2D"] * (len(channels) - 1) + ["AttnDownBlock2D"]
    return UNet2DModel(
        sample_size=size,
        in_channels=1,
        out_channels=1,
        block_out_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=tuple(down),
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
    )
