"""How good a reconstruction is, and the search for its settings: pairs, structural similarity, strategies."""

import dataclasses
import math

import torch
from torch import Tensor

from cl_lib import _torchvision  # noqa: F401, torchmetrics imports torchvision
from cl_lib.request import digest
from cl_lib.search import optimise

RANGES = {  # Janetzky et al., appendix B.3
    "spread": {"log": (1e-6, 0.1)},
    "rate": {"log": (1e-4, 1.0)},
    "lambda_rate": {"log": (1e-4, 1.0)},
    "lambda_min": {"log": (0.01, 0.5)},
    "alpha": {"between": (10.0, 500.0)},
}


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


# --- the search ----------------------------------------------------------------------------------------------


def tuned(method, learner, task: int, position: int, search):
    """One seed's reconstruction with the settings that its study finds best: ReCL's strategies of §4.3."""
    settings, supervised = method.settings(), method.strategy == "supervised"
    if supervised:
        kept = learner.memory.stored
        references = kept.x[position, : int(min(kept.seen[position], method.references))]
    best = (-math.inf, {}, None)  # what this process has found: its merit, settings, samples

    def value(chosen):
        nonlocal best
        found = search(dataclasses.replace(settings, **chosen))
        if supervised:
            merit = result = float(quality(found.x[0].to(references.dtype), references, learner.stream.pixels).mean())
        else:
            merit = -(result := float(found.loss[0]))
        if merit > best[0]:
            best = merit, chosen, found
        return result

    config = learner.config()
    config["parameters"] = {k: v for k, v in config["parameters"].items() if k not in ("study", "trials")}
    name = f"recl-{digest(config, (learner.seeds[position],))}-seed{learner.seeds[position]}-task{task}"
    direction = "maximize" if supervised else "minimize"
    chosen = optimise(value, RANGES, method.trials, method.study, name, direction)
    return best[2] if chosen == best[1] else search(dataclasses.replace(settings, **chosen))
