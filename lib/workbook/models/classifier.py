"""The Fashion-MNIST classifier that judges samples: its logits name a picture, its features measure distances."""

from __future__ import annotations

import torch
from torch import nn


class Classifier(nn.Module):
    """Three 3x3 convolution stages and a 64-dimensional feature layer; about 0.2 M parameters.

    Input: images of shape (n, 1, 32, 32) in [-1, 1] (Fashion-MNIST padded by two pixels).
    """

    def __init__(self, width: int = 32, classes: int = 10):
        super().__init__()

        def stage(inner: int, outer: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(inner, outer, 3, padding=1, bias=False),
                nn.BatchNorm2d(outer),
                nn.ReLU(),
                nn.MaxPool2d(2),
            )

        self.stages = nn.Sequential(stage(1, width), stage(width, 2 * width), stage(2 * width, 4 * width))
        self.feature = nn.Sequential(nn.Flatten(), nn.Linear(4 * width * 16, 64), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(64, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Penultimate features, shape (n, 64): the space of the Fréchet distance."""
        return self.feature(self.stages(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the ten classes, shape (n, 10)."""
        return self.head(self.features(images))
