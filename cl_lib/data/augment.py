"""Augmentation of whole batches on the device: :class:`Augment`, or a transform of your own.

Drawing and applying are apart: each seed draws from random numbers of its own, then all are changed at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from cl_lib.bounds import Bound, check
from cl_lib.errors import InputError
from cl_lib.identity import identify
from cl_lib.seeds import Draws

MOST_PIXELS = 1024  # of padding


@dataclass(frozen=True, eq=False)
class Augment:
    """Random crop and horizontal flip, the usual pair for small natural images.

    An image is padded by ``crop`` pixels on each side; a window of the image's size is cut out at (dx, dy),
    uniform in 0…2·crop, and mirrored left to right with probability one half. dx = dy = crop, not mirrored,
    is the image itself.

    Arguments:
        crop: the padding in pixels; 0 for no crop.
        flip: whether to mirror.
        fill: what the padding holds, a number or a tensor ``[channels, 1, 1]``. None is 0; a stream replaces it
            by black as the network meets it.

    Raises:
        InputError: if ``crop`` is not a whole number from 0 to 1,024, or another argument is of another kind.
    """

    crop: int = 4
    flip: bool = True
    fill: float | Tensor | None = None

    def __post_init__(self):
        check("crop", self.crop, Annotated[int, Bound(0, MOST_PIXELS)], "Augment", 4)
        check("flip", self.flip, bool, "Augment", True)
        if not isinstance(self.fill, Tensor):
            check("fill", self.fill, float | None, "Augment", None)

    on_host = False  # what it draws is drawn on the device

    def draw(self, n: int, draws: Draws) -> Tensor:
        """What happens to each of ``n`` images of G seeds: dx, dy, and flip (0 or 1), int64 ``[G, n, 3]``."""
        dx, dy = draws.below(2 * self.crop + 1, 2 * n).split(n, 1)
        return torch.stack([dx, dy, draws.below(1 + self.flip, n)], -1)

    def apply(self, x: Tensor, draws: Tensor) -> Tensor:
        """Change images ``[..., channels, height, width]`` by draws ``[..., 3]``; the same shape comes back."""
        C, H, W = x.shape[-3:]
        images = x.reshape(-1, C, H, W)
        dx, dy, flip = draws.to(x.device).reshape(-1, 3).unbind(-1)
        if p := self.crop:
            padded = images.new_empty(len(images), C, H + 2 * p, W + 2 * p)
            padded[...] = 0.0 if self.fill is None else self.fill
            padded[..., p : p + H, p : p + W] = images
            windows = padded.unfold(2, H, 1).unfold(3, W, 1)  # a view: [n, C, 2p+1, 2p+1, H, W]
            images = windows[torch.arange(len(images), device=x.device), :, dy, dx]
        if self.flip:
            images = torch.where(flip.bool().view(-1, 1, 1, 1), images.flip(-1), images)
        return images.reshape(x.shape)

    def to(self, device: str | torch.device) -> "Augment":
        return replace(self, fill=self.fill.to(device)) if isinstance(self.fill, Tensor) else self

    def config(self) -> dict:
        fill = self.fill
        if isinstance(fill, Tensor):
            fill = [round(value, 4) for value in fill.flatten().tolist()]
        return {"crop": self.crop, "flip": self.flip, "fill": fill}


@dataclass(frozen=True, eq=False)
class Transform:
    """Any function of a batch as an augmentation, torchvision's v2 transforms among them.

    Arguments:
        function: a batch ``[B, channels, height, width]`` as the network meets it, normalised, to a batch of the same
            shape and dtype. It is called once a step and seed. torchvision's random transforms draw once for a whole
            batch; one draw an image is ``lambda x: torch.stack([transform(image) for image in x])``.

    What ``function`` draws must come from torch's global generator. Each call runs with that generator seeded by a draw
    of the seed's own, and finds it put back afterwards: what one seed's images become does not depend on the seeds
    beside it.
    """

    function: Callable[[Tensor], Tensor]

    on_host = True

    def draw(self, generators: list[torch.Generator]) -> list[int]:
        """The seed of each seed's call: known on the host, so that nothing waits for the device."""
        return [int(torch.randint(2**63 - 1, (), generator=generator)) for generator in generators]

    def apply(self, x: Tensor, draws: list[int]) -> Tensor:
        """Change batches ``[G, B, channels, height, width]``, each under its seed among the G ``draws``.

        Raises:
            InputError: if the function gives back another shape, dtype or device, or no tensor.
        """
        return torch.stack([self._call(*pair) for pair in zip(x, draws, strict=True)])

    def _call(self, batch: Tensor, seed: int) -> Tensor:
        cuda = [batch.device] if batch.is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(cuda):
            torch.default_generator.manual_seed(seed)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            out = self.function(batch.clone())
        kind = lambda t: (t.shape, t.dtype, t.device)
        if not isinstance(out, Tensor) or kind(out) != kind(batch):
            found = f"{out.dtype} {list(out.shape)} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
            name = getattr(self.function, "__name__", type(self.function).__name__)
            raise InputError(
                f"The transform {name} made {found} of a batch: give back its own kind, "
                f"here {batch.dtype} {list(batch.shape)} on {batch.device}."
            )
        return out

    def to(self, device: str | torch.device) -> "Transform":
        return self

    def config(self) -> dict:
        return {"transform": identify(self.function)}
