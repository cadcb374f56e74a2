"""How a task sees the images of the data set that all tasks share: permuted, rotated, corrupted.

A view changes a batch on the device, so a stream of T views holds one copy of the data. It has two hooks:
``images`` works on pixels in [0, 1] (0 is black) before they are normalised, ``inputs`` on what was normalised.
``task`` is one number, or int64 ``[S, B]`` where a batch mixes samples of several tasks.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from cl_lib.errors import InputError, suggest


def chance(seed: int, *purpose) -> torch.Generator:
    """The random numbers of one seed for one purpose, whatever else is drawn beside them.

    Not :func:`cl_lib.seeds.generator`: the two hash differently, and stored results hold what each has drawn.
    """
    digest = hashlib.sha256(repr((int(seed), *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


@dataclass(frozen=True)
class View:
    """The images as they are. ``needs`` says what it asks about a sample: its ``task``, its ``index``."""

    needs: ClassVar[tuple[str, ...]] = ()

    def images(self, x: Tensor, seeds: Sequence[int], index: Tensor, task: int | Tensor) -> Tensor:
        """Pixels ``[S, B, channels, height, width]`` in [0, 1] -> pixels; ``index`` ``[S, B]`` tells the images."""
        return x

    def inputs(self, x: Tensor, seeds: Sequence[int], task: int | Tensor) -> Tensor:
        """What was normalised, ``[S, B, channels, height, width]`` -> what the network meets."""
        return x

    def label(self, task: int) -> str:
        """What the task is called."""
        return ""

    def config(self) -> dict:
        return {"kind": type(self).__name__, **asdict(self)}


@dataclass(frozen=True)
class Until(View):
    """The first ``tasks`` tasks as ``view`` sees them, later ones as they are."""

    view: View
    tasks: int

    @property
    def needs(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("task", *self.view.needs)))

    def images(self, x, seeds, index, task):
        return self._first(lambda task: self.view.images(x, seeds, index, task), x, task)

    def inputs(self, x, seeds, task):
        return self._first(lambda task: self.view.inputs(x, seeds, task), x, task)

    def _first(self, seen: Callable[[int | Tensor], Tensor], x: Tensor, task: int | Tensor) -> Tensor:
        if isinstance(task, int):
            return seen(task) if task < self.tasks else x
        first = (task < self.tasks)[..., None, None, None]
        return torch.where(first, seen(task.clamp(max=self.tasks - 1)), x)

    def label(self, task):
        return self.view.label(task) if task < self.tasks else ""

    def config(self):
        return self.view.config()


@dataclass(frozen=True)
class Permuted(View):
    """Each task has its own order of the pixels, drawn by the seed; a pixel's channels stay together."""

    needs = ("task",)
    tasks: int
    identity_first: bool = False

    def inputs(self, x, seeds, task):
        pixels = x.flatten(-2)  # [S, B, channels, pixels]
        orders = _orders(tuple(seeds), self.tasks, pixels.shape[-1], self.identity_first, x.device)
        return pixels.gather(-1, _of_task(orders, task).unsqueeze(2).expand_as(pixels)).view_as(x)

    def label(self, task):
        return "as it is" if self.identity_first and task == 0 else f"permutation {task}"


@dataclass(frozen=True)
class Rotated(View):
    """Each task turns the images by its own angle: the given one, or drawn by the seed from [0°, 180°)."""

    needs = ("task",)
    tasks: int
    angles: tuple[float, ...] | None = None

    def images(self, x, seeds, index, task):
        return rotate(x, _of_task(_angles(tuple(seeds), self.tasks, self.angles, x.device), task))

    def label(self, task):
        return f"{self.angles[task]:g}°" if self.angles else f"angle {task}"


@dataclass(frozen=True)
class Shifted(View):
    """Each task corrupts the images in its own way, named in ``SHIFTS``."""

    needs = ("task", "index")
    shifts: tuple[str, ...]

    def __post_init__(self):
        for shift in self.shifts:
            corruption(shift)

    def images(self, x, seeds, index, task):
        if isinstance(task, int):
            return corruption(self.shifts[task])(x, index)
        out = x
        for t, shift in enumerate(self.shifts):
            out = torch.where((task == t)[..., None, None, None], corruption(shift)(x, index), out)
        return out

    def label(self, task):
        return self.shifts[task]


def _of_task(table: Tensor, task: int | Tensor) -> Tensor:
    """A table ``[S, T, …]`` -> its entries for the task ``[S, 1, …]``, or for each sample's task ``[S, B, …]``."""
    if isinstance(task, int):
        return table[:, task : task + 1]
    return table[torch.arange(len(table), device=table.device)[:, None], task]


@lru_cache(maxsize=64)
def _orders(seeds: tuple, tasks: int, pixels: int, identity_first: bool, device: torch.device) -> Tensor:
    """One permutation of the pixels for each seed and task, ``[S, T, pixels]``."""
    draw = lambda seed, task: torch.randperm(pixels, generator=chance(seed, "permutation", task))
    orders = torch.stack([torch.stack([draw(seed, t) for t in range(tasks)]) for seed in seeds])
    if identity_first:
        orders[:, 0] = torch.arange(pixels)
    return orders.to(device)


@lru_cache(maxsize=64)
def _angles(seeds: tuple, tasks: int, given: tuple | None, device: torch.device) -> Tensor:
    """One angle in degrees for each seed and task, ``[S, T]``."""
    draw = lambda seed, task: 180 * torch.rand((), generator=chance(seed, "angle", task)).item()
    return torch.tensor([given or [draw(seed, t) for t in range(tasks)] for seed in seeds], device=device)


def rotate(x: Tensor, degrees: Tensor) -> Tensor:
    """Images ``[S, B, channels, height, width]`` turned counter-clockwise about their centres.

    ``degrees`` is ``[S, B]``, with 1 for S or B where all are turned alike. Bilinear between pixels; what comes
    in from outside is 0.
    """
    S, B, C, H, W = x.shape
    cos, sin, zero = degrees.deg2rad().cos(), degrees.deg2rad().sin(), torch.zeros_like(degrees)
    theta = torch.stack([cos, -sin * (H / W), zero, sin * (W / H), cos, zero], -1).view(-1, 2, 3)
    grid = F.affine_grid(theta, [len(theta), 1, H, W], align_corners=False).view(*degrees.shape, H, W, 2)
    grid = grid.expand(S, B, H, W, 2).reshape(S * B, H, W, 2)
    return F.grid_sample(x.reshape(S * B, C, H, W), grid, align_corners=False).view_as(x)


# Named corruptions: x [S, B, channels, height, width] in [0, 1], an amount, index [S, B] -> x ------------


def _rotated(x, degrees, index):
    return rotate(x, torch.full((1, 1), degrees, device=x.device))


def _noisy(x, deviation, index):
    fields = _noise(x.shape[2:], x.device)
    noise = fields.index_select(0, index.flatten() % len(fields)).view_as(x)
    return (x + deviation * noise).clamp(0, 1)


@lru_cache(maxsize=4)
def _noise(shape: torch.Size, device: torch.device) -> Tensor:
    """256 fields of white noise for all seeds: image i meets field i mod 256 each time it is looked at."""
    return torch.randn(256, *shape, generator=chance(0, "noise")).to(device)


def _blurred(x, deviation, index):
    reach = math.ceil(3 * deviation)
    steps = torch.arange(-reach, reach + 1, device=x.device, dtype=x.dtype)
    kernel = (-0.5 * (steps / deviation) ** 2).softmax(0)
    planes = x.reshape(-1, 1, *x.shape[-2:])
    planes = F.conv2d(planes, kernel.view(1, 1, -1, 1), padding=(reach, 0))
    return F.conv2d(planes, kernel.view(1, 1, 1, -1), padding=(0, reach)).view_as(x)


def _occluded(x, share, index):
    middle = lambda n: (torch.arange(n, device=x.device) - (n - 1) / 2).abs() < share * n / 2
    return x.masked_fill(middle(x.shape[-2])[:, None] & middle(x.shape[-1]), 0)


def _pixelated(x, block, index):
    coarse = F.avg_pool2d(x.flatten(0, 1), int(block), ceil_mode=True)
    fine = coarse.repeat_interleave(int(block), -2).repeat_interleave(int(block), -1)
    return fine[..., : x.shape[-2], : x.shape[-1]].reshape(x.shape)


SHIFTS: dict[str, tuple[Callable, float | None, str]] = {  # name: (function, usual amount, meaning)
    "clean": (lambda x, _, index: x, None, "the image as it is"),
    "rotated": (_rotated, 45.0, "turned counter-clockwise by so many degrees"),
    "noisy": (_noisy, 0.3, "white noise of this standard deviation, fixed for each image, clipped to [0, 1]"),
    "inverted": (lambda x, _, index: 1 - x, None, "the negative, 1 − x"),
    "blurred": (_blurred, 1.0, "a Gaussian of this standard deviation in pixels"),
    "low-contrast": (lambda x, a, index: 0.5 + a * (x - 0.5), 0.3, "differences from mid-grey times this"),
    "dark": (lambda x, a, index: a * x, 0.3, "brightness times this"),
    "occluded": (_occluded, 0.5, "a black box in the middle, this share of height and width"),
    "pixelated": (_pixelated, 2.0, "means of square blocks, this whole number of pixels wide"),
}


@lru_cache
def corruption(shift: str) -> Callable[[Tensor, Tensor], Tensor]:
    """``"noisy"``, or ``"noisy:0.5"`` with an amount of one's own -> a function (x, index) -> x.

    Raises InputError for an unknown name or an amount that it cannot use.
    """
    name, _, given = str(shift).partition(":")
    if name not in SHIFTS:
        raise suggest(name, SHIFTS, "shift")
    change, amount, meaning = SHIFTS[name]
    if not given:
        return lambda x, index: change(x, amount, index)
    if amount is None:
        raise InputError(f"The shift {shift!r} cannot be used: {name!r} takes no amount, leave it out.")
    try:
        chosen = float(given)
    except ValueError:
        chosen = math.nan
    smallest = {"rotated": -math.inf, "pixelated": 1.0}.get(name, 1e-6)
    if not math.isfinite(chosen) or chosen < smallest or (name == "pixelated" and chosen != int(chosen)):
        raise InputError(
            f"The shift {shift!r} cannot be used: {name!r} takes a number ({meaning}), for example {name}:{amount:g}."
        )
    return lambda x, index: change(x, chosen, index)
