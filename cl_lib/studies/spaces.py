"""What of every method is tuned, and in which range: the learning rate, and what weighs the old against the new.

``{"log": [low, high]}`` is searched on a logarithmic scale, ``{"between": [low, high]}`` on a plain one, and
``{"among": [one, another]}`` by trying them. Memories are no settings to be tuned: who may keep more does better.
"""

from cl_lib.errors import InputError
from cl_lib.methods._registry import find, registry

LR = {"lr": {"log": [1e-3, 0.3]}}
TEMPERATURE = {"temperature": {"among": [1.0, 2.0, 4.0]}}


def strength(low: float, high: float) -> dict:
    """The weight of a method's term in the loss, or of the old samples."""
    return {"strength": {"log": [low, high]}}


SPACES: dict[str, dict[str, dict]] = {
    "adapters": {**LR},
    "agem": {**LR},
    "bic": {**LR, **TEMPERATURE},
    "der": {**LR, **strength(0.05, 5.0)},
    "derpp": {**LR, **strength(0.05, 5.0), "label_strength": {"log": [0.05, 5.0]}},
    "dgr": {**LR, **TEMPERATURE, "generator_rate": {"log": [3e-4, 3e-3]}},
    "eidetic": {**LR, "step": {"among": [0.05, 0.1, 0.2]}, "tolerance": {"among": [0.003, 0.01, 0.03]}},
    "er": {**LR, **strength(0.1, 10.0)},
    "er_ace": {**LR, **strength(0.1, 10.0)},
    "ewc": {**LR, **strength(1.0, 1e5)},
    "ewc_kfac": {**LR, **strength(0.1, 1e4)},
    "ewc_topk": {**LR, **strength(0.1, 1e4)},
    "finetune": {**LR},
    "flashback": {**LR, "host.strength": {"log": [1.0, 1e5]}, "plasticity": {"log": [1e-3, 1.0]}},
    "gdumb": {"top_rate": {"log": [0.01, 0.3]}},  # its own rates take the place of lr
    "gem": {**LR, "margin": {"between": [0.0, 1.0]}},
    "gpm": {**LR, "threshold": {"among": [0.9, 0.95, 0.97, 0.99]}},
    "hat": {**LR, **strength(0.1, 2.0), "slope": {"log": [50.0, 800.0]}},
    "icarl": {**LR},
    "joint": {**LR},
    "lucir": {**LR, **strength(1.0, 20.0), "balanced_rate": {"log": [1e-3, 0.1]}},
    "lwf": {**LR, **strength(0.1, 10.0), **TEMPERATURE},
    "lwf_mc": {**LR},
    "mas": {**LR, **strength(1e-3, 1e2)},
    "mer": {**LR, "across": {"between": [0.1, 1.0]}},
    "mir": {**LR, **strength(0.1, 10.0)},
    "ncm": {**LR},
    "oml": {**LR, "inner_rate": {"log": [3e-3, 0.1]}},
    "packnet": {**LR, "prune": {"among": [0.5, 0.75, 0.9]}},
    "pnn": {**LR},
    "ranpac": {**LR, "ridge": {"log": [1e-2, 1e4]}},
    "recl": {**LR, "spread": {"log": [1e-3, 0.1]}},
    "si": {**LR, **strength(1e-2, 1e2)},
    "slda": {**LR, "shrinkage": {"log": [1e-6, 0.1]}},
    "supsup": {**LR, "keep": {"among": [0.3, 0.5, 0.7]}},
    "upgd": {**LR, "noise": {"log": [1e-4, 1e-2]}, "weight_decay": {"log": [1e-5, 1e-2]}},
    "wa": {**LR, **TEMPERATURE},
    "xder": {**LR, **strength(0.1, 5.0), "contrast": {"log": [5e-3, 0.5]}},
}


def space(method: str) -> dict[str, dict]:
    """What of a method is searched. Raises InputError for one of which nobody has said it."""
    key = find(method).key
    if key not in SPACES:
        raise InputError(f"No ranges are known for {key}: name what to search, such as lr='{{\"log\": [0.001, 0.1]}}'.")
    return SPACES[key]


def serving(scenario: str) -> list[str]:
    """The library's own methods that serve a scenario, which is what ``all`` means."""
    own = {key: cls for key, cls in registry().items() if cls.__module__.startswith("cl_lib.")}
    return [key for key, cls in own.items() if scenario in cls.scenarios]
