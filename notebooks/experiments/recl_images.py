"""Images read from a network's weights, beside its training images, for the figure of chapter 11.

A homogeneous network learns a few images of each class by full-batch gradient descent; after each of some lengths of
training it is read with ReCL's own settings. On MNIST (some minutes on one processor core):

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
from cl_lib.methods.recl.similarity import pairs, quality, similarity, stretched
from cl_lib.nets import networks
from safetensors.torch import save_file


def strangers(read, real, classes, x, y, most=200):
    """The share of unseen images ``x, y`` of its class that a reconstruction resembles more than its real one, [n]."""
    own = similarity(read, real)
    shares = []
    for image, c, least in zip(read, classes, own, strict=True):
        others = x[y == c][:most]
        shares.append(
            (similarity(image.expand_as(others).contiguous(), others) > least)
            .float()
            .mean()
        )
    return torch.stack(shares)


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
        default=[30, 1000, 10_000],
        help="lengths of training to look at",
    )
    p.add_argument(
        "--iterations",
        type=int,
        default=3000,
        help="iterations of a reconstruction",
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--out", type=Path, default="data/results/recl-images.safetensors"
    )
    chosen = p.parse_args()

    stream = cl_lib.split(
        chosen.dataset, tasks=1, per_class=chosen.per_class, normalise="centre"
    )
    x, y = (
        t[0]
        for t in stream.batch(
            [chosen.seed], stream.indices(chosen.seed, 0)[None], 0
        )
    )
    rows, m, how = (
        torch.ones(stream.outputs, dtype=torch.bool),
        2 * len(x),
        Settings(iterations=chosen.iterations),
    )
    net = networks.build(
        "homogeneous_mlp",
        stream.shape,
        stream.outputs,
        tuple(chosen.hidden),
        chosen.seed,
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=chosen.lr)
    bytes_of = lambda t: (255 * t.clamp(0, 1)).round().byte()
    noise = (
        torch.randn(
            m,
            *stream.shape,
            generator=torch.Generator().manual_seed(chosen.seed),
        )
        .mul_(0.3)
        .clamp_(-1, 1)
    )
    kept = {
        "real": bytes_of(stream.pixels(x)),
        "y": y,
        "similarity of noise": quality(noise, x, stream.pixels),
    }
    for epoch in range(1, max(chosen.epochs) + 1):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
        if epoch in chosen.epochs:
            params = {
                k: p.detach()[None].clone() for k, p in net.named_parameters()
            }
            first = start(
                m,
                stream.shape,
                how.spread,
                torch.Generator().manual_seed(chosen.seed),
                x.dtype,
            )
            read = search(
                net,
                params,
                {},
                *(t[None] for t in first),
                labels(m, rows),
                rows,
                how,
            )
            nearest = read.x[0][pairs(read.x[0], x)]
            kept[f"read {epoch}"] = bytes_of(stretched(stream.pixels(nearest)))
            kept[f"similarity {epoch}"] = quality(read.x[0], x, stream.pixels)
            unseen = stream.batch(
                [0], stream.indices(0, 0, "test")[None], 0, "test"
            )
            kept[f"strangers {epoch}"] = strangers(
                kept[f"read {epoch}"] / 255,
                kept["real"] / 255,
                y,
                stream.pixels(unseen[0][0]),
                unseen[1][0],
            )
            similar = float(kept[f"similarity {epoch}"].mean())
            print(
                f"{epoch} epochs: loss {float(read.loss / read.size):.3f} of ‖θ‖², SSIM {similar:.3f}",
                flush=True,
            )

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
