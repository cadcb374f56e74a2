"""Avalanche on the bench's workload: `avalanche_peer.py DATA.pt`, run by the Python of `.venv-avalanche`.

Reads one request a line, `{"method": "ewc", "seed": 0, "kind": …}`, and answers each with one line of JSON: the
seconds of training and of the ends of tasks, those of the bare loop, task by task in turn, and the mean accuracy.

Two kinds. "as its guide sets it up": images that become float and normalised as they are loaded, which is what its
SplitMNIST does, and its default evaluator. "resident tensors, no metrics": the least that Avalanche asks for.

Settings make the same loss where conventions differ and that is possible: EWC without ½ takes λ/2, LwF without τ²
takes λτ². What stays its own: EWC squares gradients of mini-batches, replay takes the mean over the joined batch from a
buffer that is refilled when a task ends.
"""

import json
import sys
import time

import bare
import torch

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its CUDA build beside a CPU-only torch: only its Python half is needed
    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import avalanche
from avalanche.benchmarks import nc_benchmark
from avalanche.core import SupervisedPlugin
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
from avalanche.training.plugins.evaluation import default_evaluator
from avalanche.training.supervised import AGEM, EWC, LwF, Naive
from torchvision.transforms import Compose, Normalize

GUIDE, LEAN = "as its guide sets it up", "resident tensors, no metrics"


class Clock(SupervisedPlugin):
    """Notes when the last epoch of an experience is over: what follows is the end of the task."""

    def after_training_epoch(self, strategy, **_):
        self.trained = time.perf_counter()


def strategy(method: str, s: dict, plugins: list, **common):
    batch = s["batch_size"]
    if method == "finetune":
        return Naive(**common, plugins=plugins)
    if method == "ewc":
        return EWC(**common, plugins=plugins, ewc_lambda=s["ewc_strength"] / 2)
    if method == "lwf":
        return LwF(**common, plugins=plugins, alpha=s["strength"] * s["temperature"] ** 2, temperature=s["temperature"])
    if method == "er":
        replay = ReplayPlugin(s["memory"], batch_size=batch, batch_size_mem=s["replay_batch"])
        return Naive(**common, plugins=[*plugins, replay])
    if method == "agem":
        share = s["memory"] // s["tasks"]
        return AGEM(**common, plugins=plugins, patterns_per_exp=share, sample_size=s["replay_batch"])
    raise KeyError(method)


class Images(torch.utils.data.Dataset):
    """Images [n, height, width] in memory, handed out one by one as those of Avalanche's own SplitMNIST are."""

    def __init__(self, x, y, transform):
        self.data, self.targets, self.transform = x, y.tolist(), transform

    def __len__(self):
        return len(self.data)

    def __getitem__(self, i):
        return self.transform(self.data[i].float().unsqueeze(0) / 255), self.targets[i]


def experiences(data: dict, kind: str):
    """The class-incremental stream, made as Avalanche's guide makes it."""
    s, parts = data["settings"], data["train"]
    if kind == GUIDE:
        images = Images(**data["images"], transform=Compose([Normalize((s["mean"],), (s["std"],))]))
    else:
        x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        images = torch.utils.data.TensorDataset(x, y)
        images.targets = y.tolist()
    order = torch.cat([y.unique() for _, y in parts]).tolist()
    made = nc_benchmark(images, images, n_experiences=len(parts), task_labels=False, fixed_class_order=order)
    return made.train_stream


def run(method: str, seed: int, kind: str, data: dict, streams: dict) -> dict:
    s, train, test, stream = data["settings"], data["train"], data["test"], streams[kind]
    torch.manual_seed(seed)
    models = [bare.mlp(train[0][0].shape[1], s["hidden"], s["outputs"]) for _ in "ab"]
    models[1].insert(0, torch.nn.Flatten())
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=s["lr"]) for m in models)
    clock = Clock()
    learner = strategy(
        method,
        s,
        [clock],
        model=models[1],
        optimizer=theirs,
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=s["batch_size"],
        train_epochs=1,
        evaluator=default_evaluator() if kind == GUIDE else EvaluationPlugin(),
    )
    seconds = {"bare": 0.0, "train": 0.0, "task_end": 0.0}
    for (x, y), experience in zip(train, stream, strict=True):
        start = time.perf_counter()
        bare.train(models[0], ours, x, y, s["batch_size"])
        seconds["bare"] += time.perf_counter() - start
        start = time.perf_counter()
        learner.train(experience)
        seconds["train"] += clock.trained - start
        seconds["task_end"] += time.perf_counter() - clock.trained
    models[1].eval()
    return {**seconds, "accuracy": bare.accuracy(models[1], test)}


def main():
    torch.set_num_threads(1)
    data = torch.load(sys.argv[1], weights_only=True)
    streams = {kind: experiences(data, kind) for kind in (GUIDE, LEAN)}
    answers, sys.stdout = sys.stdout, sys.stderr  # what the library prints is not an answer
    answer = lambda numbers: print(json.dumps(numbers), file=answers, flush=True)
    answer({"avalanche": avalanche.__version__, "avalanche_torch": torch.__version__})
    for line in sys.stdin:
        answer(run(**json.loads(line), data=data, streams=streams))


if __name__ == "__main__":
    main()
