"""The small video diffusion transformer: Wan's architecture from diffusers, told a class instead of a text."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel
from torch import nn

from workbook import checkpoints
from workbook.models.dit import NO_LABEL


class VideoDiT(nn.Module):
    """Velocity v(x, sigma, label) of a flow-matching model of films (n - x_0 on x = (1 - sigma) x_0 + sigma n).

    The network is `transformer`, a WanTransformer3DModel: patches of 2 frames × 4 × 4 pixels, 256 tokens for a film of
    8 frames of 32 × 32. Its "text" is two learned tokens, one of the class and one that is always the same.
    """

    def __init__(self, *, layers: int = 5, heads: int = 4, head_width: int = 32, text: int = 64):
        super().__init__()
        self.transformer = WanTransformer3DModel(
            patch_size=(2, 4, 4),
            num_attention_heads=heads,
            attention_head_dim=head_width,
            in_channels=1,
            out_channels=1,
            text_dim=text,
            freq_dim=64,
            ffn_dim=3 * heads * head_width,
            num_layers=layers,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=64,
        )
        self.label = nn.Embedding(NO_LABEL + 1, text)
        self.always = nn.Parameter(torch.randn(1, 1, text))

    def words(self, labels: torch.Tensor) -> torch.Tensor:
        """The "text" of each label: (n, 2, text)."""
        return torch.cat([self.label(labels)[:, None], self.always.expand(len(labels), 1, -1)], 1)

    def forward(self, x: torch.Tensor, sigma: torch.Tensor | float, labels: torch.Tensor | None = None) -> torch.Tensor:
        """x: (n, 1, frames, h, w), frames even, h and w multiples of 4; sigma: noise level 0 to 1, one number or (n,);
        labels: (n,), int64, 0 to 9 or NO_LABEL, which is what None means. Returns v in the shape of x."""
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=x.device).expand(len(x))
        labels = torch.full((len(x),), NO_LABEL, device=x.device) if labels is None else labels
        return self.transformer(x, 1000 * sigma, self.words(labels), return_dict=False)[0]


def load_video(name: str = "wan_moving_fmnist", *, device: str = "cpu") -> VideoDiT:
    """The shipped network, in eval mode without gradients."""
    return checkpoints.restore(VideoDiT(), name).to(device)
