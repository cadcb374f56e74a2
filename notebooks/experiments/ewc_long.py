"""Twenty permutations under EWC with each discount of old Fishers, for chapter 04.

What is kept of each run: the accuracy matrix, and the trace of the stiffness after each task. On the digits (a minute on
one processor core):

    python notebooks/experiments/ewc_long.py
"""

import argparse
from pathlib import Path

import cl_lib
import torch
from cl_lib.results.table import write_rows


def main():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--dataset", default="digits")
    p.add_argument("--tasks", type=int, default=20)
    p.add_argument("--per-class", type=int, default=50)
    p.add_argument("--seeds", type=int, default=5)
    p.add_argument("--strength", type=float, default=30.0, help="λ")
    p.add_argument("--decays", type=float, nargs="+", default=[1.0, 0.95, 0.5])
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--out", type=Path, default="data/results/ewc-long.json")
    chosen = p.parse_args()

    stream = cl_lib.permuted(
        chosen.dataset,
        tasks=chosen.tasks,
        identity_first=True,
        per_class=chosen.per_class,
    )
    rows = []
    for decay in (*chosen.decays, None):  # None: an anchor for each task
        learner = cl_lib.Learner(
            "ewc",
            stream,
            strength=chosen.strength,
            decay=decay,
            fisher_samples=200,
            optimizer="adam",
            lr=0.004,
            batch_size=50,
            hidden=[64, 64],
            epochs=chosen.epochs,
            seeds=chosen.seeds,
            seeds_at_once=chosen.seeds,
        )
        traces = []
        for _ in range(chosen.tasks):
            learner.learn()
            stiffness = learner.state.stiffness.values()
            traces.append(sum(K.flatten(1).sum(1) for K in stiffness))
        result = learner.result()
        rows.append(
            {
                "decay": decay,
                "seeds": result.seeds,
                "R": result.R.round(4).tolist(),
                "curves": {"stiffness": torch.stack(traces, 1).tolist()},
                "stored_bytes": result.stored_bytes,
            }
        )
        acc = result.metrics().acc.mean()
        print(f"decay {decay}: accuracy {acc:.3f}", flush=True)

    write_rows(chosen.out, rows, vars(chosen) | {"out": chosen.out.name})
    print(chosen.out)


if __name__ == "__main__":
    main()
