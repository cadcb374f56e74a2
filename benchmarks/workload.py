"""What is trained in the bench: the data, the bare loop and the library's learner, with equal settings."""

import functools
import sys
import time

import bare
import torch

import cl_lib

# What the settings of the workload are for a method that has them, and what they are for one method alone.
SHARED = {"memory": 500, "replay_batch": 128}
SETTINGS = {
    "ewc": {"strength": 100.0},
    "er": {"joined": True},
    "lwf": {"strength": 1.0, "temperature": 2.0},
    "si": {"strength": 1.0},
    "mas": {"strength": 0.1},
    "der": {"strength": 0.5},
    "derpp": {"strength": 1.0, "label_strength": 0.5},
    "gem": {"margin": 0.5},
    "recl": {"iterations": 20},
    "flashback": {"primary_epochs": 1, "flashback_epochs": 1},
    "eidetic": {"step": 0.3, "recovery": 1, "router_epochs": 1},
    "packnet": {"retrain": 0.0},  # the cost of a step: how many more retraining takes is a figure of its own
}


class Workload:
    """The data, as a stream and as resident tensors, and how both are trained on."""

    def __init__(self, arguments):
        self.tiny = arguments.tiny
        self.hidden, self.batch_size, self.lr = ((16, 16) if self.tiny else (400, 400)), 128, 0.05
        self.data = self._data(arguments)
        self.options = {
            "network": "mlp",
            "hidden": self.hidden,
            "epochs": 1,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "loss_over": "all",
        }
        self.stream = functools.cache(lambda scenario: cl_lib.split(self.data, tasks=5, scenario=scenario))
        self.train, self.test = self.resident("train"), self.resident("test")

    def _data(self, arguments):
        if not self.tiny:
            try:
                return cl_lib.load("mnist", arguments.data)
            except cl_lib.InputError as error:
                print(f"{error}\nSo noise of MNIST's size stands in: speed only.", file=sys.stderr)
        g = torch.Generator().manual_seed(0)
        noise = lambda n: torch.randint(256, (n, 1, 28, 28), dtype=torch.uint8, generator=g)
        labels = lambda n: torch.arange(n) % 10
        n, m = (1280, 100) if self.tiny else (60_000, 10_000)
        return cl_lib.Dataset("noise", noise(n), labels(n), noise(m), labels(m), tuple("0123456789"))

    def resident(self, part: str):
        """Each task as tensors x [n, 784] and y [n]."""
        stream = self.stream("class")
        pairs = [stream.batch([0], stream.indices(0, t, part)[None], t, part) for t in range(stream.tasks)]
        return [(x[0].flatten(1).clone(), y[0].clone()) for x, y in pairs]

    def bare(self):
        model = bare.mlp(self.train[0][0].shape[1], self.hidden, 10)
        return model, torch.optim.SGD(model.parameters(), lr=self.lr)

    def learner(self, key: str, seeds=(0,), **more):
        about = next(m for m in cl_lib.methods() if m["key"] == key)
        known = {k: v for k, v in SHARED.items() if k in about["parameters"]} | SETTINGS.get(key, {})
        scenario = "class" if "class" in about["scenarios"] else about["scenarios"][0]
        more = {"stream": self.stream(scenario), "device": "cpu"} | more
        return cl_lib.Learner(key, seeds=seeds, progress=False, **self.options | known | more)


def timed(function, *arguments) -> float:
    start = time.perf_counter()
    function(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
