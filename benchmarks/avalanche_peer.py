"""Avalanche on the bench's workload, in an environment of its own: `avalanche_peer.py DATA.pt` runs in `.venv-avalanche`.

Reads one request a line, `{"method": "ewc", "seed": 0}`, and answers each with one line of JSON: the seconds of
training and of the ends of tasks, those of the bare loop, task by task in turn with it, and the mean accuracy.

Avalanche as it comes, on tensors in memory (its data loader gathers them sample by sample), without loggers and
metrics, which would only slow it down. Its losses differ from ours where its conventions do; what is given here makes
the same loss where that is possible: EWC without ½ takes λ/2, LwF without τ² takes λτ². Its EWC squares the
gradients of mini-batches; its replay takes the mean over the joined batch, half of the sum that ER states.
"""

import json
import sys
import time
import warnings

import torch

warnings.simplefilter("ignore")
sys.path.insert(0, __file__.rsplit("/", 1)[0])
import bare  # noqa: E402

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its CUDA build beside a CPU-only torch: only its Python half is needed
    operators = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        operators.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")

import avalanche  # noqa: E402
from avalanche.benchmarks import nc_benchmark  # noqa: E402
from avalanche.core import SupervisedPlugin  # noqa: E402
from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin  # noqa: E402
from avalanche.training.supervised import AGEM, EWC, LwF, Naive  # noqa: E402


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
        return LwF(**common, plugins=plugins, alpha=s["lwf_strength"] * s["temperature"] ** 2, temperature=s["temperature"])
    if method == "er":
        replay = ReplayPlugin(s["memory"], batch_size=batch, batch_size_mem=s["replay_batch"])
        return Naive(**common, plugins=[*plugins, replay])
    if method == "agem":
        share = s["memory"] // s["tasks"]
        return AGEM(**common, plugins=plugins, patterns_per_exp=share, sample_size=s["replay_batch"])
    raise KeyError(method)


def experiences(parts):
    """The stream made as Avalanche's guide makes class-incremental ones, over one data set of resident tensors."""
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    data = torch.utils.data.TensorDataset(x, y)
    data.targets = y.tolist()
    order = torch.cat([y.unique() for _, y in parts]).tolist()
    return nc_benchmark(data, data, n_experiences=len(parts), task_labels=False, fixed_class_order=order).train_stream


def run(method: str, seed: int, s: dict, train, test, stream) -> dict:
    torch.manual_seed(seed)
    models = [bare.mlp(train[0][0].shape[1], s["hidden"], s["outputs"]) for _ in "ab"]
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=s["lr"]) for m in models)
    clock = Clock()
    learner = strategy(
        method, s, [clock], model=models[1], optimizer=theirs, criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=s["batch_size"], train_epochs=1, evaluator=EvaluationPlugin(),
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
    settings, train, test = data["settings"], data["train"], data["test"]
    stream, answers = experiences(train), sys.stdout
    sys.stdout = sys.stderr  # what the library prints is not an answer
    print(json.dumps({"avalanche": avalanche.__version__, "torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        answer = run(**json.loads(line), s=settings, train=train, test=test, stream=stream)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
