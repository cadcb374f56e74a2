"""The Fisher's spectrum after the first half of MNIST's classes, for chapter 03, a row for each seed.

The network and its training are the chapter's own. On MNIST (a minute on one processor core):

    python notebooks/experiments/fisher_spectrum.py
"""

import argparse
from pathlib import Path

import cl_lib
import numpy as np
from cl_lib import curvature
from cl_lib.results.table import write_rows


def straight(x, λ):
    """The share of log λ's variance that a straight line in x explains."""
    fit = np.polyval(np.polyfit(x, np.log(λ), 1), x)
    return float(1 - (np.log(λ) - fit).var() / np.log(λ).var())


def row(learner, position, samples, k):
    """What chapter 03 asks of a spectrum, of one network."""
    seed = learner.seeds[position]
    x = learner.stream.samples(0, seed)[0][:samples]
    net, classes = learner.net(position), learner.stream.outputs
    F = curvature.spectrum.gram(net, x, learner.masks(0).rows)
    bound = curvature.spectrum.rank_bound(len(x), classes)
    top, order = F.values[:k].cpu().numpy(), np.arange(1, k + 1)
    V = F.vectors(k)
    parts = curvature.spectrum.layer_shares(net, V)
    return {
        "seed": seed,
        "accuracy": float(learner.accuracy(0)[position]),
        "share": float(curvature.spectrum.share(F.values, 0.05, of=bound)),
        "hold": 1 + int((F.values.cumsum(0) < 0.8 * F.trace).sum()),
        "drop": 1 + int((top[:-1] / top[1:]).argmax()),
        "geometric": straight(order, top),
        "power law": straight(np.log(order), top),
        "layers": {name: float(v) / k for name, v in parts.items()},
    }


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--dataset", default="mnist")
    p.add_argument("--per-class", type=int, default=80)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--samples", type=int, default=200, help="images in F")
    p.add_argument("--leading", type=int, default=20, help="eigenvectors")
    p.add_argument(
        "--out", type=Path, default="data/results/fisher-spectrum.json"
    )
    chosen = p.parse_args()
    stream = cl_lib.split(
        chosen.dataset, tasks=2, scenario="domain", per_class=chosen.per_class
    )
    rows = []
    for seed in range(chosen.seeds):
        learner = cl_lib.Learner(
            "finetune",
            stream,
            seeds=(seed,),
            network="cnn",
            epochs=6,
            batch_size=32,
            lr=0.05,
        )
        learner.learn(0)
        rows.append(row(learner, 0, chosen.samples, chosen.leading))
        print(rows[-1], flush=True)
    write_rows(chosen.out, rows, vars(chosen) | {"out": chosen.out.name})
    print(chosen.out)


if __name__ == "__main__":
    main()
