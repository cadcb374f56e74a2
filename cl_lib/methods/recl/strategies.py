"""How good a reconstruction is, and the search for its settings: pairs, structural similarity, strategies."""

import dataclasses
import math

from cl_lib import _torchvision  # noqa: F401, torchmetrics imports torchvision
from cl_lib.identity import digest
from cl_lib.methods.recl.similarity import quality
from cl_lib.search import optimise
from cl_lib.seeds import Bag

RANGES = {  # Janetzky et al., appendix B.3
    "spread": {"log": (1e-6, 0.1)},
    "rate": {"log": (1e-4, 1.0)},
    "lambda_rate": {"log": (1e-4, 1.0)},
    "lambda_min": {"log": (0.01, 0.5)},
    "alpha": {"between": (10.0, 500.0)},
}


# --- the search ----------------------------------------------------------------------------------------------


def tuned(method, learner, task: int, position: int, search):
    """One seed's reconstruction with the settings that its study finds best: ReCL's strategies of §4.3."""
    settings, supervised = method.settings(), method.strategy == "supervised"
    if supervised:
        kept = learner.state.stored
        images = learner.seen(Bag({k: t[position][None] for k, t in kept.items() if k != "seen"}), (position,))[0]
        references = images[: int(min(kept.seen[position], method.references))]
    best = (-math.inf, {}, None)  # what this process has found: its merit, settings, samples

    def value(chosen):
        nonlocal best
        found = search(dataclasses.replace(settings, **chosen))
        if supervised:
            merit = result = float(quality(found.x[0].to(references.dtype), references, learner.stream.pixels).mean())
        else:
            merit = -(result := float(found.loss[0]))
        if merit > best[0]:
            best = merit, chosen, found
        return result

    config = learner.config()
    config["parameters"] = {k: v for k, v in config["parameters"].items() if k not in ("study", "trials")}
    code = config.pop("code")  # other code is another study, and draws the same numbers
    draws = f"recl-{digest(config, (learner.seeds[position],))}-seed{learner.seeds[position]}-task{task}"
    name, direction = f"{draws}-{digest(code, ())}", "maximize" if supervised else "minimize"
    chosen = optimise(value, RANGES, method.trials, method.study, name, direction, draws)
    return best[2] if chosen == best[1] else search(dataclasses.replace(settings, **chosen))
