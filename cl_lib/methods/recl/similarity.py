"""How alike a reconstruction and an image are: pairs of nearest ones and their structural similarity."""

import torch
from torch import Tensor

from cl_lib import _torchvision  # noqa: F401, torchmetrics imports torchvision


def pairs(reconstructed: Tensor, references: Tensor) -> Tensor:
    """The nearest of m reconstructions ``[m, …]`` to each of n references ``[n, …]``: row numbers ``[n]``.

    Both are standardised, the references by their own mean and deviation over all pixels and images, the
    reconstructions by theirs; the distance is Euclidean (Janetzky et al., appendix D.5).
    """
    r, x = (t.flatten(1) for t in (references, reconstructed))
    r, x = ((t - t.mean()) / t.std().clamp_min(1e-12) for t in (r, x))
    return torch.cdist(r, x).argmin(1)


def stretched(images: Tensor) -> Tensor:
    """Each image ``[n, …]`` scaled to run from 0 to 1."""
    low, high = (f(images.flatten(1), 1) for f in (torch.amin, torch.amax))
    wide = lambda t: t.reshape(-1, *[1] * (images.dim() - 1))
    return (images - wide(low)) / wide(high - low).clamp_min(1e-12)


def similarity(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of n pairs of images ``[n, C, H, W]`` within 0 and 1, ``[n]`` (Wang et al., 2004).

    The window is Gaussian, of σ = 1.5 pixels as usual, 0.5 for images under 16 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    sigma = 1.5 if min(images.shape[-2:]) >= 16 else 0.5
    values = ssim(images.float(), references.float(), sigma=sigma, data_range=1.0, reduction="none")
    return values.reshape(len(images))


def quality(reconstructed: Tensor, references: Tensor, pixels) -> Tensor:
    """SSIM of each reference and its nearest reconstruction, both inputs of a network, ``[n]``.

    ``pixels`` turns inputs into pixels within 0 and 1 (:meth:`Stream.pixels`); reconstructions are stretched.
    """
    chosen = reconstructed[pairs(reconstructed, references)]
    return similarity(stretched(pixels(chosen)), pixels(references).clamp(0, 1))
