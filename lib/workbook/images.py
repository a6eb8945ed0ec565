"""How good pictures are: the Fréchet distance in classifier features, confidence, peak signal-to-noise, SSIM."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from workbook.models.classifier import Classifier


def load_classifier(*, device: str = "cpu") -> Classifier:
    """The shared Fashion-MNIST classifier `clf_fmnist` in eval mode."""
    from workbook import checkpoints

    return checkpoints.restore(Classifier(), "clf_fmnist").to(device)


@torch.inference_mode()
def judge(classifier: Classifier, pictures: torch.Tensor, *, chunk: int = 500) -> tuple[NDArray, NDArray]:
    """Features (n, 64) and class probabilities (n, 10), float64. pictures: (n, 1, 32, 32) in [-1, 1]."""
    features, probabilities = [], []
    for part in pictures.split(chunk):
        found = classifier.features(part.contiguous(memory_format=torch.channels_last))
        features.append(found.double().cpu())
        probabilities.append(classifier.head(found).double().softmax(-1).cpu())
    return torch.cat(features).numpy(), torch.cat(probabilities).numpy()


def frechet_distance(one: NDArray, other: NDArray) -> float:
    """Squared Fréchet (2-Wasserstein) distance of the Gaussians fitted to two sets of features, in float64.

    one: (n, d), other: (m, d), n and m at least 2. Fewer rows than dimensions are allowed, but the value grows as n
    shrinks: compare only values of equal n, and with the distance of n real pictures.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError("a Fréchet distance needs at least two pictures on each side.")
    means = [np.mean(features, axis=0, dtype=np.float64) for features in (one, other)]
    first, second = (np.cov(features, rowvar=False, dtype=np.float64) for features in (one, other))
    values, vectors = np.linalg.eigh(first)
    root = vectors * np.sqrt(np.clip(values, 0, None)) @ vectors.T
    # the trace of (first second)^(1/2) through a symmetric matrix, whose eigenvalues stay real under rounding
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ second @ root), 0, None)).sum()
    return float(np.square(means[0] - means[1]).sum() + np.trace(first) + np.trace(second) - 2 * cross)


def quality(classifier: Classifier, pictures: torch.Tensor, real: NDArray, *, sure: float = 0.9) -> dict[str, float]:
    """{"fcd": Fréchet distance to the features of real pictures, "confident": share named with probability >= sure}."""
    features, probabilities = judge(classifier, pictures)
    return {"fcd": frechet_distance(features, real), "confident": float((probabilities.max(1) >= sure).mean())}


def real_floor(features: NDArray, real: NDArray, count: int, *, draws: int = 30, seed: int = 0) -> NDArray:
    """Fréchet distances of `count` real pictures, drawn `draws` times from `features`, to other `real` ones.

    What a perfect sampler would score with `count` pictures. The two sets of pictures must not overlap.
    """
    if count > len(features):
        raise ValueError(f"{count} pictures cannot be drawn from {len(features)}.")
    random = np.random.default_rng(seed)
    return np.array([frechet_distance(features[random.permutation(len(features))[:count]], real) for _ in range(draws)])


def psnr(pictures: torch.Tensor, reference: torch.Tensor, *, span: float = 2.0) -> NDArray:
    """Peak signal-to-noise ratio of each picture in dB, shape (n,). span: largest minus smallest possible pixel."""
    error = (pictures.double() - reference.double()).square().flatten(1).mean(1).cpu().numpy()
    return 10 * np.log10(span**2 / np.maximum(error, 1e-20))


def ssim(pictures: torch.Tensor, reference: torch.Tensor, *, size: int = 7) -> NDArray:
    """Structural similarity (Wang et al. 2004) of pictures in [-1, 1], square window of `size` pixels, shape (n,)."""

    def mean(x: torch.Tensor) -> torch.Tensor:
        return functional.avg_pool2d(x.double(), size, 1)

    one, other = mean(pictures), mean(reference)
    spread = mean(pictures**2) - one**2 + mean(reference**2) - other**2
    shared = mean(pictures * reference) - one * other
    c_1, c_2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    value = (2 * one * other + c_1) * (2 * shared + c_2) / ((one**2 + other**2 + c_1) * (spread + c_2))
    return value.mean((1, 2, 3)).cpu().numpy()
