"""How good a reconstruction is, and the search for its settings: pairs, structural similarity, stored studies."""

import dataclasses
import hashlib
import math
import warnings

import torch
from torch import Tensor

from cl_lib import _torchvision  # noqa: F401, torchmetrics imports torchvision
from cl_lib.errors import InputError
from cl_lib.reconstruction import Settings

RANGES = {  # of Janetzky et al., appendix B.3, all but α's logarithmic
    "spread": (1e-6, 0.1),
    "rate": (1e-4, 1.0),
    "lambda_rate": (1e-4, 1.0),
    "lambda_min": (0.01, 0.5),
    "alpha": (10.0, 500.0),
}


def pairs(reconstructed: Tensor, references: Tensor) -> Tensor:
    """The nearest of m reconstructions ``[m, …]`` to each of n references ``[n, …]``: row numbers ``[n]``.

    Both are standardised, the references by their own mean and deviation over all pixels and images, the
    reconstructions by theirs; the distance is Euclidean (Janetzky et al., appendix D.5).
    """
    r, x = (t.flatten(1) for t in (references, reconstructed))
    r, x = ((t - t.mean()) / t.std().clamp_min(1e-12) for t in (r, x))
    return torch.cdist(r, x).argmin(1)


def stretched(images: Tensor) -> Tensor:
    """Each image ``[n, …]`` scaled to run from 0 to 1."""
    low, high = (f(images.flatten(1), 1) for f in (torch.amin, torch.amax))
    wide = lambda t: t.reshape(-1, *[1] * (images.dim() - 1))
    return (images - wide(low)) / wide(high - low).clamp_min(1e-12)


def similarity(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of n pairs of images ``[n, C, H, W]`` within 0 and 1, ``[n]`` (Wang et al., 2004).

    The window is Gaussian, of σ = 1.5 pixels as usual, 0.5 for images under 16 pixels.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    sigma = 1.5 if min(images.shape[-2:]) >= 16 else 0.5
    values = ssim(images.float(), references.float(), sigma=sigma, data_range=1.0, reduction="none")
    return values.reshape(len(images))


def quality(reconstructed: Tensor, references: Tensor, pixels) -> Tensor:
    """SSIM of each reference and its nearest reconstruction, both inputs of a network, ``[n]``.

    ``pixels`` turns inputs into pixels within 0 and 1 (:meth:`Stream.pixels`); reconstructions are stretched.
    """
    chosen = reconstructed[pairs(reconstructed, references)]
    return similarity(stretched(pixels(chosen)), pixels(references).clamp(0, 1))


# --- studies ----------------------------------------------------------------------------------------------


def _optuna():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its progress bars ask for widgets
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def study_of(place: str | None, name: str, direction: str):
    """The Optuna study of that name, kept in memory (None), in a file, or in a database (a URL)."""
    optuna = _optuna()
    storage = place
    if place is not None and "://" not in place:
        from optuna.storages.journal import JournalFileBackend

        try:
            storage = optuna.storages.JournalStorage(JournalFileBackend(str(place)))
        except OSError as error:
            raise InputError(f"study={place!r} cannot be opened ({error}): give a file that can be written.") from error
    return optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)


def optimise(objective, settings: Settings, trials: int, place: str | None, name: str, direction: str) -> Settings:
    """The best settings of ``trials`` by ``objective(settings) -> number``, Bayesian search over ``RANGES``.

    A study that is there already goes on: what was tried counts. Each trial's random numbers depend on the study's
    name and the trial's number only, so that a killed search ends as an uninterrupted one.
    """
    optuna, study = _optuna(), study_of(place, name, direction)

    def trial_value(trial):
        chosen = {k: trial.suggest_float(k, *bounds, log=k != "alpha") for k, bounds in RANGES.items()}
        value = objective(dataclasses.replace(settings, **chosen))
        if not math.isfinite(value):
            raise optuna.TrialPruned
        return value

    counted = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)  # not those that were killed
    while (done := len(study.get_trials(deepcopy=False, states=counted))) < trials:
        seed = int.from_bytes(hashlib.sha256(f"{name}:{done}".encode()).digest()[:4], "little")
        study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(1, trials // 3))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Optuna's own, of features it calls experimental
            study.optimize(trial_value, n_trials=1)
    if not study.get_trials(deepcopy=False, states=counted[:1]):
        raise InputError(f"None of {trials} trials of {name} gave a finite value: raise trials or steps.")
    return dataclasses.replace(settings, **study.best_params)


def tuned(method, learner, task: int, position: int, search):
    """One seed's reconstruction with the settings that its study finds best: ReCL's strategies of §4.3."""
    from cl_lib.runs import digest

    def loss(settings):
        return float(search(settings).loss[0])

    def likeness(settings):
        return float(quality(search(settings).x[0].to(references.dtype), references, learner.stream.pixels).mean())

    if method.strategy == "supervised":
        kept = learner.memory.stored
        references = kept.x[position, : int(min(kept.seen[position], method.references))]
    config = learner.config()
    config["parameters"] = {k: v for k, v in config["parameters"].items() if k not in ("study", "trials")}
    name = f"recl-{digest(config, (learner.seeds[position],))}-seed{learner.seeds[position]}-task{task}"
    supervised = method.strategy == "supervised"
    best = optimise(
        likeness if supervised else loss, method.settings(), method.trials, method.study, name,
        "maximize" if supervised else "minimize",
    )  # fmt: skip
    return search(best)
