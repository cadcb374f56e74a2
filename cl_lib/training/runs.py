"""A whole stream at once: groups of seeds in processes, finished runs recognised, killed ones resumed."""

import contextlib
import glob
import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path

import joblib
import numpy as np
import torch

from cl_lib.errors import Diverged, InputError
from cl_lib.files import read_header, writable
from cl_lib.identity import as_kept, file_name, made
from cl_lib.results.result import Result
from cl_lib.training import needs
from cl_lib.training.callbacks import check as check_callbacks
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint
from cl_lib.training.learner import Learner
from cl_lib.training.progress import visible
from cl_lib.training.request import (
    Execution,
    check_seeds,
    check_stream,
    configuration,
    initial_network,
    reached,
    separate,
)


def run(
    method,
    stream,
    *,
    seeds=(0,),
    device="auto",
    seeds_at_once=None,
    jobs=1,
    out=None,
    fresh=False,
    progress=None,
    capture=None,
    callbacks=(),
    **options,
) -> Result:
    """Train a method on every task of a stream and measure it: a :class:`~cl_lib.results.result.Result`.

    Arguments:
        method: a registry key (``"ewc"``) or a :class:`~cl_lib.methods._base.Method`.
        stream: what ``cl_lib.split`` and its kin return.
        seeds: the seeds, or how many (5 means 0 … 4).
        device: ``"auto"`` (CUDA where there is one), ``"cpu"``, ``"cuda:1"`` …
        seeds_at_once: how many seeds are stacked on one device; all on CUDA, one on a CPU, unless stated.
        jobs: how many processes, of one thread each, share the seeds. Numbers depend on neither of the two.
        out: a folder for results. A run that finished there, by the same code, is loaded instead of repeated, which
            is said, and so are those of single seeds, of which the others are then run; one that was killed goes on
            after its last finished task; ``fresh=True`` starts anew.
        progress: whether to show how it goes, as a bar on a terminal and as a line now and then elsewhere; by default
            everywhere but in notebooks.
        capture: whether steps become CUDA graphs; by default on CUDA.
        callbacks: objects that are told of every step, epoch and task, see
            :class:`~cl_lib.training.callbacks.Callback`; with several ``jobs`` each process has copies.
        **options: training :class:`~cl_lib.training.options.Options` (``network``, ``hidden``, ``epochs``,
            ``batch_size``, ``lr``, ``optimizer``, ``momentum``, ``weight_decay``, ``schedule``, ``clip``,
            ``loss_over``, ``dtype``, ``patience``, ``on_divergence``) and the method's own parameters.

    Raises ``InputError`` for what cannot be meant and ``Diverged`` where a loss is no longer finite.
    """
    seeds = check_seeds(seeds)
    Execution(device, seeds_at_once, jobs, out, fresh, progress, capture)
    method, training = separate(method, options)
    check_stream(stream)
    settings = vars(training) | {
        "seeds_at_once": seeds_at_once,
        "device": device,
        "progress": visible(progress),
        "capture": capture,
        "callbacks": check_callbacks(callbacks),
    }
    code, uncovered = reached(method, stream, training, Learner)
    config = configuration(method, stream, training, code)
    name = lambda group: file_name(method.key, config, group)
    place = None if out is None else Path(out) / f"{name(seeds)}.safetensors"
    if place is not None:
        if uncovered:
            warnings.warn(
                f"A change in {', '.join(uncovered)} is not noticed when this run is recognised: give fresh=True then.",
                stacklevel=2,
            )
        if place.exists() and not fresh:
            result = _finished(place, config, seeds)
            _tell_of_lost(result)
            result.network = lambda: initial_network(method, stream, training, seeds[0])
            return result
        writable(place.parent)
        if not fresh:
            _tell_of_others(place, config)
    apart = {} if place is None or fresh or len(seeds) == 1 else _finished_apart(place.parent, name, config, seeds)
    left = tuple(seed for seed in seeds if seed not in apart)
    share = max(1, -(-len(left) // jobs))
    groups = [left[i : i + share] for i in range(0, len(left), share)]
    files = [place and place.with_name(f"{name(group)}.checkpoint") for group in groups]
    if fresh:
        for file in files:
            file and file.unlink(missing_ok=True)
    tasks = [(method, stream, group, settings, code, file) for group, file in zip(groups, files, strict=True)]
    if len(groups) > 1:
        results = processes(len(groups))(joblib.delayed(run_in_one_thread)(*task) for task in tasks)
    else:
        results = [run_group(*task) for task in tasks]
    result = Result.join([*results, *apart.values()], seeds)
    result.network = result.network or (lambda: initial_network(method, stream, training, seeds[0]))
    if np.isnan(result.R[:, -1, 0]).all():
        raise Diverged(f"{method.key}: every seed diverged. Lower lr or a strength, or bound the gradient with clip.")
    if len(groups) > 1 or apart:
        _tell_of_lost(result)
    if place is not None:
        result.save(place)
        for file in files:
            file.unlink(missing_ok=True)
    return result


def _finished(place: Path, config: dict, seeds: tuple[int, ...]) -> Result:
    """The result in a file, which says that it is one. Raises InputError where it is another run's."""
    result = Result.load(place)
    here, there = as_kept(config), result.config
    differing = sorted(k for k in {**here, **there} if here.get(k) != there.get(k))
    differing += ["seeds"] * (result.seeds != seeds)
    if differing:
        raise InputError(
            f"{place} holds another run, whose {', '.join(differing)} differ: move it to where it came from, or give "
            "fresh=True to replace it."
        )
    origin = made(result.provenance, place.stat().st_mtime)
    print(f"reused {place}, {origin}; fresh=True (--fresh) runs it again", file=sys.stderr)
    return result


def _finished_apart(folder: Path, name, config: dict, seeds: tuple[int, ...]) -> dict[int, Result]:
    """The results of single seeds of a run that are in its folder."""
    places = {seed: folder / f"{name((seed,))}.safetensors" for seed in seeds}
    found = {seed: _finished(place, config, (seed,)) for seed, place in places.items() if place.exists()}
    for result in found.values():
        result.config = config  # as it was before it was kept
    return found


def _tell_of_lost(result: Result) -> None:
    """Say which seeds are in no mean: a group of one was not there to say it, nor is a file."""
    if lost := result.lost():
        print(f"{result.method}: {lost}", file=sys.stderr)


def _tell_of_others(place: Path, config: dict) -> None:
    """Say that a result of the same settings is there, and which of its code has changed since."""
    alike = place.name.rpartition("-")[0]
    found = {path: path.stat().st_mtime for path in place.parent.glob(f"{glob.escape(alike)}*.safetensors")}
    for other in sorted(found, key=found.get)[-1:]:
        with contextlib.suppress(InputError, KeyError):  # a damaged one says nothing
            kept, now = json.loads(read_header(other)["plain"]), config["code"]
            origin, then = made(kept["provenance"], found[other]), kept["config"].get("code")
            why = "it is from before results told their code"
            if isinstance(then, dict):
                differing = [part for part in {**then, **now} if then.get(part) != now.get(part)]
                why = f"the code of its {' and '.join(differing)} differs"
            print(f"{other} is not reused but kept: {origin}, and {why}", file=sys.stderr)


def processes(jobs: int, **more) -> joblib.Parallel:
    """Worker processes that end when this one does, however it ends, and that find the modules that it finds.

    Those of an earlier call serve again, unless modules were looked for elsewhere then.
    """
    where = os.getcwd(), *sys.path
    return joblib.Parallel(n_jobs=jobs, initializer=follow, initargs=(os.getpid(), where), **more)


def follow(parent: int, where: tuple[str, ...] = ()) -> None:
    """End this process soon after its parent has died, be it before this is called; no other's child is ended.

    ``where`` is the parent's working directory and path: joblib starts new workers where it is another.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # in the middle of a step: what it writes appears whole or not at all

    if os.getppid() == parent:
        threading.Thread(target=watch, daemon=True).start()
    elif not _lives(parent):
        os._exit(1)


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def run_in_one_thread(*task) -> Result:
    torch.set_num_threads(1)
    return run_group(*task, alone=False)


def run_group(method, stream, seeds, settings, code: dict, checkpoint: Path | None, alone: bool = True) -> Result:
    """All tasks for some seeds in this process, with a checkpoint after each; ``alone`` if there are no others."""
    learner = Learner(method, stream, seeds=seeds, **settings)
    learner.code = code  # as the process has it that knows the run by it
    needs.check(learner)
    if checkpoint is not None and checkpoint.exists():
        load_checkpoint(learner, checkpoint)
    try:
        while learner.done < learner.stream.tasks:
            learner.learn()
            if checkpoint is not None and learner.done < learner.stream.tasks:
                save_checkpoint(learner, checkpoint)
    except Diverged:
        if learner.active or alone:
            raise  # else these seeds were dropped, and other processes may have better ones
    learner.progress.end()
    return learner.result()
