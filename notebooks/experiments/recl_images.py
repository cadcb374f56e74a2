"""Images read from networks' weights, beside their training images and unseen ones, for chapter 11.

Homogeneous networks learn a few images of each class by full-batch gradient descent, each other ones; after each of some
lengths of training they are read with ReCL's own settings. On MNIST (some minutes on one processor core):

    python notebooks/experiments/recl_images.py
"""

import argparse
import json
from pathlib import Path

import cl_lib
import torch
from cl_lib.files import replacing
from cl_lib.identity import provenance
from cl_lib.methods.recl.reconstruction import Settings, labels, search, start
from cl_lib.methods.recl.similarity import stretched
from cl_lib.nets import networks
from safetensors.torch import save_file


def images(stream, seed, part="train"):
    x, y = stream.batch([seed], stream.indices(seed, 0, part)[None], 0, part)
    return x[0], y[0]


def learned(stream, seed, chosen):
    """A network after each length of training."""
    x, y = images(stream, seed)
    net = networks.build(
        "homogeneous_mlp",
        stream.shape,
        stream.outputs,
        tuple(chosen.hidden),
        seed,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=chosen.lr)
    for epoch in range(1, max(chosen.epochs) + 1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if epoch in chosen.epochs:
            yield epoch, net


def read(net, stream, m, seed, how):
    """What :func:`search` finds in a network's weights: m images, and the share of ‖θ‖² that is left."""
    rows = torch.ones(stream.outputs, dtype=torch.bool)
    params = {k: p.detach()[None].clone() for k, p in net.named_parameters()}
    first = start(
        m,
        stream.shape,
        how.spread,
        torch.Generator().manual_seed(seed),
        torch.float32,
    )
    found = search(
        net, params, {}, *(t[None] for t in first), labels(m, rows), rows, how
    )
    return found.x[0], float(found.loss / found.size)


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--dataset", default="mnist")
    p.add_argument(
        "--per-class",
        type=int,
        default=2,
        help="training images a class (default: 2)",
    )
    p.add_argument("--hidden", type=int, nargs="+", default=[1000, 1000])
    p.add_argument("--lr", type=float, default=0.3)
    p.add_argument(
        "--epochs",
        type=int,
        nargs="+",
        default=[30, 1000],
        help="lengths of training to look at",
    )
    p.add_argument(
        "--iterations",
        type=int,
        default=500,
        help="iterations of a reconstruction (default: 500)",
    )
    p.add_argument("--seeds", type=int, default=5, help="networks (default: 5)")
    p.add_argument(
        "--unseen",
        type=int,
        default=20,
        help="images a class that none learned (default: 20)",
    )
    p.add_argument(
        "--out", type=Path, default="data/results/recl-images.safetensors"
    )
    chosen = p.parse_args()

    stream = cl_lib.split(
        chosen.dataset, tasks=1, per_class=chosen.per_class, normalise="centre"
    )
    pixels = lambda x: (255 * stretched(stream.pixels(x))).round().byte()
    m, how = (
        2 * chosen.per_class * stream.outputs,
        Settings(iterations=chosen.iterations),
    )
    kept = {}
    for seed in range(chosen.seeds):
        for epoch, net in learned(stream, seed, chosen):
            found, left = read(net, stream, m, seed, how)
            print(
                f"seed {seed}, {epoch} epochs: loss {left:.3f} of ‖θ‖²",
                flush=True,
            )
            kept |= {
                f"read {epoch} {seed}": pixels(found),
                f"loss {epoch} {seed}": torch.tensor(left),
            }
        x, y = images(stream, seed)
        kept |= {f"real {seed}": pixels(x), f"y {seed}": y}
    x, y = images(stream, 0, "test")
    some = torch.cat(
        [(y == c).nonzero()[: chosen.unseen, 0] for c in range(stream.outputs)]
    )
    kept |= {
        "unseen": pixels(x[some]),
        "unseen y": y[some],
        "label": labels(m, torch.ones(stream.outputs, dtype=bool)),
    }

    told = vars(chosen) | {"out": chosen.out.name, **provenance()}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(chosen.out) as temporary:
        save_file(
            {k: t.contiguous() for k, t in kept.items()},
            temporary,
            metadata={"origin": json.dumps(told)},
        )
    print(chosen.out)


if __name__ == "__main__":
    main()
