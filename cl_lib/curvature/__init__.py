"""The loss around θ: Fisher information, spectra, landscapes.

What works on a vector of parameters is at hand under the room's own name, ``curvature.loss_of(net, x, y)``.
"""

from cl_lib.curvature import fisher, spectrum
from cl_lib.curvature.landscape import (
    Plane,
    along,
    barrier,
    cosine,
    cosines,
    fisher_form,
    gradients,
    layers,
    line,
    logits_of,
    loss_of,
    taylor,
    transplant,
)
from cl_lib.nets.vectors import unvector, vector

__all__ = [
    "Plane",
    "along",
    "barrier",
    "cosine",
    "cosines",
    "fisher",
    "fisher_form",
    "gradients",
    "layers",
    "line",
    "logits_of",
    "loss_of",
    "spectrum",
    "taylor",
    "transplant",
    "unvector",
    "vector",
]
