"""What several tests of data look at."""

import torch

from cl_lib.data.datasets import Dataset


def coloured(n=40, classes=4, shape=(3, 4, 6), seed=0, name="coloured"):
    """A small colour data set whose images are higher than wide or wider than high."""
    x = torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    y = torch.arange(n) % classes
    return Dataset(name, x, y, x[: 2 * classes], y[: 2 * classes], tuple("abcdefgh"[:classes]))


def vectors(labels, seed=0, shape=(1, 2, 2)):
    """A task of one's own: images and labels to train and to test on, the same."""
    x = torch.rand(len(labels), *shape, generator=torch.Generator().manual_seed(seed))
    return ((x, torch.tensor(labels)),) * 2


def whole(stream, seed, task, part="train"):
    """All of a task: (indices, x, y)."""
    index = stream.indices(seed, task, part)
    x, y = stream.batch([seed], index[None], task, part)
    return index, x[0], y[0]


def rows(stream):
    return [list(r) for r in stream.rows]
