"""How each data set is read: a function from the data root to (x, y, x_test, y_test, class names).

torchvision downloads what is missing and parses most formats. Every file is checked before it is used, so
that a damaged or half-downloaded one is a sentence that names it, not a crash or a wrong number.
"""

import hashlib
import os
import socket
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from cl_lib.errors import InputError

AGAIN = "delete it and run again, and it is fetched anew."


def digits(root: Path):
    """UCI's optical digits, which scikit-learn holds. Grey values 0…16 are stored as 255/16 of them, rounded.

    Every fifth image of each class is for testing.
    """
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images * (255 / 16)).round().to(torch.uint8).view(-1, 1, 8, 8)
    y = torch.from_numpy(labels).long()
    test = torch.zeros(len(y), dtype=torch.bool)
    for c in range(10):
        test[(y == c).nonzero()[4::5]] = True
    return x[~test], y[~test], x[test], y[test], map(str, range(10))


IDX = {  # md5 of the unpacked files: torchvision checks the compressed ones only
    "MNIST": {
        "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "FashionMNIST": {
        "train-images-idx3-ubyte": "f4a8712d7a061bf5bd6d2ca38dc4d50a",
        "train-labels-idx1-ubyte": "9018921c3c673c538a1fc5bad174d6f9",
        "t10k-images-idx3-ubyte": "8181f5470baa50b63fa0f6fddb340f0a",
        "t10k-labels-idx1-ubyte": "15d484375f8d13e6eb1aabb0c3f46965",
    },
}


def idx(kind: str, root: Path):
    """MNIST and Fashion-MNIST."""
    from cl_lib._torchvision import datasets

    source = getattr(datasets, kind)
    folder = root / kind / "raw"
    _ensure(folder, IDX[kind], lambda: source(root, download=True))
    train, test = source(root), source(root, train=False)
    classes = [name.split(" - ")[0] for name in source.classes]  # "0 - zero" is 0
    return train.data[:, None], train.targets, test.data[:, None], test.targets, classes


def cifar(kind: str, root: Path):
    """CIFAR-10 and CIFAR-100."""
    from cl_lib._torchvision import datasets

    source = getattr(datasets, kind)
    files = dict([*source.train_list, *source.test_list, (source.meta["filename"], source.meta["md5"])])
    _ensure(root / source.base_folder, files, lambda: source(root, download=True))
    train, test = source(root), source(root, train=False)
    x, x_test = (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in (train, test))
    return x, torch.tensor(train.targets), x_test, torch.tensor(test.targets), train.classes


TINY = "http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"


def tiny_imagenet(root: Path):
    """Tiny-ImageNet: 200 classes, or the 40 if only they are there. The validation images are for testing."""
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir() and (root / "tiny-imagenet-40").is_dir():
        folder = root / "tiny-imagenet-40"
    if not folder.is_dir():
        from cl_lib._torchvision import datasets

        with _downloading(folder):
            datasets.utils.download_and_extract_archive(TINY[0], root, md5=TINY[1])
    with _whole(folder):
        wnids = (folder / "wnids.txt").read_text().split()
        words = dict(line.split("\t") for line in (folder / "words.txt").read_text().splitlines())
        notes = [line.split("\t") for line in (folder / "val/val_annotations.txt").read_text().splitlines()]
        classes = [words[wnid].split(",")[0] for wnid in wnids]
    train = [
        (file, c)
        for c, wnid in enumerate(wnids)
        for file in sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
    ]
    test = [(folder / "val/images" / file, wnids.index(wnid)) for file, wnid, *_ in notes if wnid in wnids]
    return *_decoded(folder, train, test, (500 * len(wnids), 50 * len(wnids)), side=64), classes


def imagenette(root: Path):
    """Imagenette, from its archive of 160-pixel images. The validation images are for testing."""
    from cl_lib._torchvision import datasets

    folder = root / "imagenette2-160"
    if not folder.is_dir():
        with _downloading(folder):
            datasets.Imagenette(root, size="160px", download=True)
    with _whole(folder):
        parts = [datasets.Imagenette(root, split=split, size="160px") for split in ("train", "val")]
    samples = [[(Path(file), c) for file, c in part._samples] for part in parts]
    return *_decoded(folder, *samples, (9469, 3925), side=128), [names[0] for names in parts[0].classes]


READERS: dict[str, Callable] = {
    "digits": digits,
    "mnist": lambda root: idx("MNIST", root),
    "fashion-mnist": lambda root: idx("FashionMNIST", root),
    "cifar10": lambda root: cifar("CIFAR10", root),
    "cifar100": lambda root: cifar("CIFAR100", root),
    "tiny-imagenet": tiny_imagenet,
    "imagenette": imagenette,
}


# What they share ----------------------------------------------------------------------------------


def _ensure(folder: Path, files: dict[str, str], download: Callable) -> None:
    """Download if a file of {name: md5} is missing from the folder, then compare every md5."""
    if not all((folder / file).is_file() for file in files):
        with _downloading(folder):
            download()
    for file, md5 in files.items():
        found = hashlib.md5((folder / file).read_bytes(), usedforsecurity=False).hexdigest()
        if found != md5:
            raise InputError(f"{folder / file} is damaged or incomplete (md5 {found}, not {md5}): {AGAIN}")


@contextmanager
def _downloading(folder: Path, patience: float = 30.0):
    """Say in one sentence that a download failed; a server silent for ``patience`` seconds has failed."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(patience)
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{folder} is missing or incomplete and could not be downloaded ({reason}): connect "
            "to the network and run again, put the files there, or name the data folder that "
            "has them with root= (--data) or CL_DATA."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


@contextmanager
def _whole(folder: Path):
    """Say in one sentence that an unpacked folder lacks files."""
    try:
        yield
    except (OSError, LookupError, ValueError) as error:
        raise InputError(f"{folder} is incomplete ({error}): {AGAIN}") from error


def _decoded(folder: Path, train: list, test: list, expected: tuple[int, int], side: int):
    """Lists of (file, label) -> x, y, x_test, y_test, the images ``side`` pixels square.

    Decoding takes a while, so the tensors are kept beside the folder in ``<folder>.safetensors``.
    """
    if (len(train), len(test)) != expected:
        raise InputError(
            f"{folder} is incomplete ({len(train)} of {expected[0]} training images, "
            f"{len(test)} of {expected[1]} test images): {AGAIN}"
        )
    y, y_test = (torch.tensor([label for _, label in part]) for part in (train, test))
    cache = folder.with_name(f"{folder.name}.safetensors")
    try:
        kept = load_file(cache)
        if torch.equal(kept["y"], y) and torch.equal(kept["y_test"], y_test):
            return kept["x"], y, kept["x_test"], y_test
    except (OSError, SafetensorError, KeyError):
        pass  # absent, or cut short
    x, x_test = (torch.stack([_picture(file, side) for file, _ in part]) for part in (train, test))
    temporary = cache.with_name(f"{cache.name}.{os.getpid()}")
    try:
        save_file({"x": x, "y": y, "x_test": x_test, "y_test": y_test}, temporary)
        temporary.replace(cache)
    except (OSError, SafetensorError):  # a folder that cannot be written, a full disk: go on without
        temporary.unlink(missing_ok=True)
    return x, y, x_test, y_test


def _picture(file: Path, side: int) -> Tensor:
    """A picture file -> uint8 ``[3, side, side]``: the shorter side scaled to ``side``, the middle cut out."""
    from PIL import Image, ImageOps

    try:
        with Image.open(file) as picture:
            square = ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.BILINEAR)
    except OSError as error:
        raise InputError(
            f"{file} is damaged ({error}): put the original back, or delete the whole folder and run again."
        ) from error
    return torch.from_numpy(np.array(square)).permute(2, 0, 1)
