"""Bayesian search for settings, in studies of Optuna that resume and that several workers can share.

A setting to be searched is written as a range: ``{"log": [1e-4, 0.1]}`` (logarithmic), ``{"between": [10, 100]}``
(whole numbers where both ends are), ``{"among": [0.9, 0.99]}``.
"""

import contextlib
import hashlib
import math
import os
import tempfile
import warnings
from pathlib import Path

from cl_lib.errors import InputError
from cl_lib.files import claimed

KINDS = ("log", "between", "among")


def is_range(value) -> bool:
    """Whether a setting is a range to search. Raises InputError for one that cannot be meant."""
    if not isinstance(value, dict) or "milestones" in value:  # a schedule is a mapping that means itself
        return False
    kind, bounds = next(iter(value.items()), (None, None))
    number = lambda v: type(v) in (int, float) and math.isfinite(v)
    usable = isinstance(bounds, list | tuple) and len(value) == 1 and kind in KINDS and len(bounds) > 0
    if usable and kind != "among":
        usable = len(bounds) == 2 and all(map(number, bounds)) and bounds[0] <= bounds[1]
        usable = usable and (kind == "between" or bounds[0] > 0)
    if not usable:
        raise InputError(
            f"{value!r} is no range to search: give {{log: [low, high]}} above 0, {{between: [low, high]}} or "
            "{among: [one, another]}."
        )
    return True


def drawn(trial, name: str, span: dict):
    """What an Optuna trial takes from a range."""
    ((kind, bounds),) = span.items()
    if kind == "among":
        return trial.suggest_categorical(name, list(bounds))
    whole = all(type(bound) is int for bound in bounds)
    return (trial.suggest_int if whole else trial.suggest_float)(name, *bounds, log=kind == "log")


def storage_of(place: str | None):
    """Where Optuna keeps its studies: in memory (None), in a file, or in a database (a URL).

    Raises InputError for a place that cannot be used.
    """
    optuna = _optuna()
    from optuna.storages.journal import JournalFileBackend

    try:
        if _is_file(place):
            backend = JournalFileBackend(str(place))
            _end_last_line(str(place))
            return optuna.storages.JournalStorage(backend)
        return optuna.storages.get_storage(place)
    except Exception as error:  # of the file system, of the database's own driver, of Optuna
        raise _unusable(place, error) from error


def _is_file(place: str | None) -> bool:
    return place is not None and "://" not in str(place)


def _end_last_line(path: str) -> None:
    """Take away the half line that a full disk left, so that the next line is not joined to it."""
    from optuna.storages.journal import JournalFileSymlinkLock

    lock = JournalFileSymlinkLock(path)
    lock.acquire()
    try:
        with open(path, "rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()


def study_of(place: str | None, name: str, direction: str):
    """The Optuna study of that name, kept at a place as :func:`storage_of` has it."""
    storage = storage_of(place)
    try:
        return _optuna().create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
    except Exception as error:  # a database that opens and cannot be written
        raise _unusable(place, error) from error


def _unusable(place, error) -> InputError:
    reason = str(error).partition("\n")[0]
    return InputError(
        f"study={place!r} cannot be opened ({reason}): give a file that can be written, or a database's URL."
    )


def optimise(
    objective,
    ranges: dict,
    trials: int,
    place: str | None,
    name: str,
    direction: str,
    draws: str | None = None,
    prune: bool = False,
    after=lambda: None,
) -> dict:
    """The best of ``trials`` settings by ``objective(settings) -> number``, within ``ranges`` by name.

    A study that is there already goes on: what was tried counts. What a trial draws depends on the study's name, the
    trials that count and how many they are, so that a killed search ends as an uninterrupted one. A value that is not
    finite makes a trial count, but never win. One process at a time searches; whoever names the same study meanwhile
    waits for what it finds (on another machine: where both name the same file).

    Arguments:
        place: where the study is kept, see :func:`study_of`.
        direction: ``"minimize"`` or ``"maximize"``.
        draws: what the random numbers go by, where that is not the study's name.
        prune: give up hopeless trials. The objective is then called as ``objective(settings, told)``, says how it
            stands by ``told(stage, value)``, and is left there where it is worse than the median of the trials that
            finished: such a trial counts, and never wins. The first third of the trials is never given up.
        after: called after each trial.

    Raises InputError if no trial gave a finite value.
    """
    optuna, study = _optuna(), study_of(place, name, direction)
    states = optuna.trial.TrialState
    counted = (states.COMPLETE, states.PRUNED)

    def trial_value(trial):
        def told(stage, value):
            trial.report(value, stage)
            if trial.should_prune():
                raise optuna.TrialPruned

        value = objective({key: drawn(trial, key, span) for key, span in ranges.items()}, *[told] * prune)
        if not math.isfinite(value):
            raise optuna.TrialPruned
        return value

    warm = max(1, trials // 3)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=warm) if prune else optuna.pruners.NopPruner()
    with contextlib.nullcontext() if place is None else claimed(_claim_of(place, name), wait=True):
        for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
            study.tell(trial.number, state=states.FAIL)  # nobody else searches: whose it was, was killed
        while (done := len(study.get_trials(deepcopy=False, states=counted))) < trials:
            seed = int.from_bytes(hashlib.sha256(f"{draws or name}:{done}".encode()).digest()[:4], "little")
            study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=warm)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna's own, of features it calls experimental
                study.optimize(trial_value, n_trials=1)
            after()
    if not study.get_trials(deepcopy=False, states=counted[:1]):
        raise InputError(f"None of {trials} trials of {name} gave a finite value: raise trials, or narrow the ranges.")
    return dict(study.best_params)


def record(place: str | None, name: str, direction: str) -> dict[str, float | int]:
    """What a search came to: ``score``, its best value, ``trials``, how many counted, and ``pruned``, how many of
    these were given up or diverged."""
    optuna, study = _optuna(), study_of(place, name, direction)
    pruned = len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.PRUNED,)))
    complete = len(study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)))
    return {"score": study.best_value, "trials": complete + pruned, "pruned": pruned}


def _claim_of(place: str, name: str) -> Path:
    """The file that whoever searches holds: beside the study's own, or on this machine where that is a database."""
    short = lambda text: hashlib.sha256(text.encode()).hexdigest()[:12]
    if _is_file(place):
        return Path(place).parent / f".{Path(place).name}.{short(name)}.claim"
    return Path(tempfile.gettempdir()) / f"cl_lib-{os.getuid()}-{short(f'{place} {name}')}.claim"


def _optuna():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its progress bars ask for widgets
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
