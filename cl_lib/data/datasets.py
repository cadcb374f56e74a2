"""Data sets: a few tensors each, uint8 images and int64 labels, read once per process.

``load("mnist")`` looks under the data root (:func:`data_root`). ``cl_lib.data.readers`` knows the files.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cl_lib.bounds import check
from cl_lib.data.readers import READERS
from cl_lib.errors import InputError, suggest

NAMES = tuple(READERS)
INTEGERS = {getattr(torch, f"{sign}int{bits}") for sign in ("", "u") for bits in (8, 16, 32, 64)}


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Images and labels, for training and for testing.

    Arguments:
        name: what it is called in results.
        x, x_test: images ``[n, channels, height, width]``, tensors or NumPy arrays: uint8 (0 to 255), or of a floating
            kind, which become float32 and are otherwise taken as they are.
        y, y_test: labels ``[n]``, whole numbers of any integer kind, each the number of a class; they become int64.
        classes: the name of each class, strings.

    A data set that :func:`load` gave travels to another process by its name, not by its tensors.

    Raises:
        InputError: if the arrays do not fit together, an image holds nan or an infinity, or a name is no string.
    """

    name: str
    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]

    def __post_init__(self):
        check("name", self.name, str, "A data set")
        names = self.classes
        if isinstance(names, str) or not isinstance(names, Iterable) or not all(isinstance(n, str) for n in names):
            raise InputError(
                f"classes={names!r} of {self.name!r} cannot be used: give a list with the name of each class, a string."
            )
        self._keep("classes", tuple(names))
        for suffix, part in ("", "training"), ("_test", "test"):
            self._check(f"x{suffix}", f"y{suffix}", part)
        if self.x.shape[1:] != self.x_test.shape[1:] or self.x.dtype != self.x_test.dtype:
            raise InputError(
                f"{self.name!r} trains on {self.x.dtype} images {list(self.x.shape[1:])}, tests "
                f"on {self.x_test.dtype} {list(self.x_test.shape[1:])}: give one kind."
            )

    def _keep(self, field: str, value) -> None:
        object.__setattr__(self, field, value)

    def _check(self, images: str, labels: str, part: str) -> None:
        """Keep the images and labels of one part as tensors of the right kind, or say why that cannot be."""
        x, y = (_tensor(getattr(self, field), f"{field} of {self.name!r}") for field in (images, labels))
        if x.ndim != 4 or 0 in x.shape[1:] or not (x.dtype == torch.uint8 or x.is_floating_point()):
            raise InputError(
                f"The {part} images of {self.name!r} are {x.dtype} {list(x.shape)}: "
                "give uint8 or float32 of shape [n, channels, height, width]."
            )
        if y.dtype not in INTEGERS or y.shape != x.shape[:1] or not len(y):
            raise InputError(
                f"The {part} labels of {self.name!r} are {y.dtype} {list(y.shape)}: "
                f"give int64, one for each of the {len(x)} images, and at least one."
            )
        y = y.long()
        if y.min() < 0 or y.max() >= len(self.classes):
            raise InputError(
                f"The {part} labels of {self.name!r} run from {y.min()} to {y.max()}, but "
                f"it names {len(self.classes)} classes: number them from 0 without a gap."
            )
        if x.is_floating_point():
            x = x.float()
            if not torch.stack(x.aminmax()).isfinite().all():  # the extremes are nan where any pixel is
                bad = int((~x.flatten(1).isfinite().all(1)).nonzero()[0])
                raise InputError(
                    f"The {part} images of {self.name!r} hold nan or an infinity, first in image {bad}: "
                    "leave such images out, or fill the gaps."
                )
        self._keep(images, x)
        self._keep(labels, y)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.x.shape[1:]))
        return (
            f"{self.name}: {len(self.x):,} training and {len(self.x_test):,} test images {size}, "
            f"{len(self.classes)} classes"
        )

    def __reduce__(self):
        origin = next((key for key, data in _loaded.items() if data is self), None)
        return (load, origin) if origin else (Dataset, tuple(getattr(self, f.name) for f in fields(self)))

    def to(self, device: str | torch.device) -> "Dataset":
        """The same data set on ``device``; itself if it is there already."""
        if torch.empty(0, device=device).device == self.x.device:
            return self
        return replace(self, **{f: getattr(self, f).to(device) for f in ("x", "y", "x_test", "y_test")})

    @cached_property
    def fingerprint(self) -> str:
        """Twelve hexadecimal digits that change when any pixel, label or class name does."""
        digest = hashlib.sha256(repr(self.classes).encode())
        for tensor in self.x, self.y, self.x_test, self.y_test:
            digest.update(repr((tensor.dtype, tensor.shape)).encode())
            digest.update(tensor.contiguous().cpu().numpy())
        return digest.hexdigest()[:12]

    @cached_property
    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and mean square of each pixel over the training images, float64 ``[channels, height, width]``.

        uint8 images count as 0 to 1.
        """
        total = torch.zeros(2, *self.x.shape[1:], dtype=torch.float64, device=self.x.device)
        for chunk in self.x.split(256):  # small enough for a processor's cache
            x = chunk.float() / 255 if chunk.dtype == torch.uint8 else chunk
            total += torch.stack([x.sum(0), x.square().sum(0)])
        mean, square = total / len(self.x)
        return mean, square

    def statistics(self, normalise: str) -> tuple[Tensor, Tensor]:
        """What to subtract, and what to divide by, ``[channels, 1 or height, 1 or width]``."""
        if normalise == "standard" and self.x.shape[1:3] == (1, 1):  # a table: its features have units of their own
            x = self.x.double() / (255 if self.x.dtype == torch.uint8 else 1)
            mean, std = x.mean(0), x.std(0, correction=0)
            return mean.float(), torch.where(std > 1e-9 * mean.abs(), std, 1).float()
        mean, square = self.moments
        one = mean.new_ones(len(mean), 1, 1)
        if normalise == "standard":
            mean, square = (m.mean((1, 2), keepdim=True) for m in (mean, square))
            std = (square - mean.square()).clamp(min=0).sqrt()
            return mean.float(), torch.where(std > 1e-6, std, one).float()  # only centre a constant channel
        return (mean if normalise == "centre" else 0 * one).float(), one.float()


def data_root(root: str | os.PathLike | None = None) -> Path:
    """The folder that data sets are under: ``root``, else ``$CL_DATA``, else ``data/`` of the checkout.

    Where the library is installed and no checkout is there, it is ``cl_lib`` in the user's cache, ``$XDG_CACHE_HOME``
    or ``~/.cache``. Raises InputError if a folder that was asked for does not exist.
    """
    check("root", root, str | os.PathLike | None, "A data set", None)
    asked = root or os.environ.get("CL_DATA")
    if not asked:
        above = Path(__file__).resolve().parents[2]
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return above / "data" if (above / "pyproject.toml").is_file() else Path(cache) / "cl_lib"
    folder = Path(asked).expanduser().resolve()
    if not folder.is_dir():
        source = "root= (--data)" if root else "the environment variable CL_DATA"
        raise InputError(
            f"The data folder {str(folder)!r}, given by {source}, does not exist: make it, or name another."
        )
    return folder


def load(name: str, root: str | os.PathLike | None = None) -> Dataset:
    """A data set by name; the second time in a process it is there at once.

    ============================  ===================================================  ===================
    name                          images, training + test                              classes
    ============================  ===================================================  ===================
    ``digits``                    1,442 + 355 grey 8×8, inside scikit-learn            10
    ``mnist``, ``fashion-mnist``  60,000 + 10,000 grey 28×28                           10
    ``cifar10``, ``cifar100``     50,000 + 10,000 colour 32×32                         10, 100
    ``tiny-imagenet``             500 + 50 a class, colour 64×64                       200, or 40 of them
    ``imagenette``                9,469 + 3,925 colour, scaled and cropped to 128×128  10
    ============================  ===================================================  ===================

    Raises:
        InputError: for an unknown name, a data root that does not exist, a damaged or incomplete file, and files that
            are neither there nor to be downloaded.
    """
    if not isinstance(name, str) or name not in READERS:
        raise suggest(name, READERS, "data set")
    key = name, str(data_root(root))
    if key not in _loaded:
        *tensors, classes = READERS[name](Path(key[1]))
        _loaded[key] = Dataset(name, *tensors, tuple(classes))
    return _loaded[key]


_loaded: dict[tuple[str, str], Dataset] = {}


def _tensor(array, what: str) -> Tensor:
    """A tensor as it is, a NumPy array as a tensor."""
    if isinstance(array, Tensor):
        return array
    if not isinstance(array, np.ndarray):
        raise InputError(f"{what} is given as {type(array).__name__}: give a tensor or a NumPy array.")
    try:  # torch shares the memory of an array in its own byte order, dense and writable; others are copied
        return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ["C", "W"]))
    except TypeError as error:
        raise InputError(f"{what} is an array of {array.dtype}: give one of numbers.") from error


def join(
    tasks: Iterable, name: str, start: int = 0, known: Mapping[int, str] | None = None
) -> tuple[Dataset, list[list[int]]]:
    """Tasks from several sources -> one data set, and the labels of each task.

    The classes of the whole are the labels in each training set, sorted, task after task: what two tasks call by one
    label are two classes here.

    Arguments:
        tasks: each a :class:`Dataset`, or a pair (train, test) of torchvision-style data sets, DataLoaders, or pairs
            ``(x, y)`` of tensors or arrays.
        name: what the whole is called.
        start: the number of the first task, for messages.
        known: names of labels, for sources that have none.

    Raises:
        InputError: if a source cannot be read, or the sources do not fit together.
    """
    train, test, met, names = [], [], [], []
    for t, task in enumerate(tasks, start):
        pair = ((task.x, task.y), (task.x_test, task.y_test)) if isinstance(task, Dataset) else task
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise InputError(f"Task {t} is given as {type(pair).__name__}: give a pair (training set, test set).")
        x, y = _read(pair[0], f"training set of task {t}")
        x_test, y_test = _read(pair[1], f"test set of task {t}")
        labels = y.unique()
        strangers = y_test[~torch.isin(y_test, labels)]
        if len(strangers):
            raise InputError(
                f"The test set of task {t} has the label {strangers[0]}, which its training "
                "set lacks: give both the same classes."
            )
        train.append((x, torch.searchsorted(labels, y) + len(names)))
        test.append((x_test, torch.searchsorted(labels, y_test) + len(names)))
        met.append(labels.tolist())
        source = task if isinstance(task, Dataset) else pair[0]
        names += [_class_name(source, label, known or {}) for label in met[-1]]
    kinds = {f"{x.dtype} {list(x.shape[1:])}" for x, _ in train + test}
    if len(kinds) != 1:
        found = " and ".join(sorted(kinds)) or "no task"
        raise InputError(
            f"The tasks' images must be of one kind, but there is {found}: "
            "give at least one task, and make their images alike with a transform."
        )
    tensors = [torch.cat(parts) for parts in (*zip(*train, strict=True), *zip(*test, strict=True))]
    return Dataset(name, *tensors, tuple(names)), met


def _read(source, what: str) -> tuple[Tensor, Tensor]:
    """A source of images and labels -> images ``[n, channels, height, width]``, labels ``[n]``, on the CPU."""
    if isinstance(source, tuple) and all(isinstance(part, Tensor | np.ndarray) for part in source):
        samples = zip(*source, strict=True)
    elif isinstance(source, DataLoader):
        samples = (sample for x, y in source for sample in zip(x, y, strict=True))
    elif hasattr(source, "__getitem__"):
        samples = (source[i] for i in range(len(source)))
    else:
        samples = source
    try:
        images, labels = zip(*((_image(image), _label(label)) for image, label in samples), strict=True)
        return torch.stack(images), torch.tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"The {what} cannot be read ({error}): give pairs (image, whole number), at least "
            "one, all images of one shape."
        ) from error


def _image(image) -> Tensor:
    """A PIL image, an array ``[height, width(, channels)]``, a tensor -> tensor ``[channels, height, width]``.

    What has fewer dimensions gets leading ones: a vector of features is one row of one channel.
    """
    if not isinstance(image, Tensor):
        image = torch.from_numpy(np.array(image))
        image = image.permute(2, 0, 1) if image.ndim == 3 else image
    if image.is_complex():
        raise TypeError("an image holds complex numbers")
    image = image.cpu() if image.dtype == torch.uint8 else image.cpu().float()
    return image[(None,) * (3 - image.ndim)]


def _label(label) -> int:
    """A label as Python's int: no float is rounded, no truth value counted, and none is below 0."""
    value = label.item() if isinstance(label, Tensor | np.ndarray | np.generic) else label
    if type(value) is not int or value < 0:
        raise ValueError(f"the label {value!r} is no whole number from 0 up")
    return value


def _class_name(source, label: int, known: Mapping[int, str]) -> str:
    while not hasattr(source, "classes") and hasattr(source, "dataset"):  # a DataLoader, a Subset
        source = source.dataset
    names = getattr(source, "classes", ())
    return str(names[label]) if label < len(names) else known.get(label, str(label))
