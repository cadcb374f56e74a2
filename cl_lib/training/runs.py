"""A whole stream at once: groups of seeds in processes, finished runs recognised, killed ones resumed."""

from pathlib import Path

import joblib
import numpy as np
import torch

from cl_lib.errors import Diverged
from cl_lib.files import writable
from cl_lib.identity import digest
from cl_lib.results.result import Result
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint
from cl_lib.training.learner import Learner
from cl_lib.training.progress import visible
from cl_lib.training.request import Execution, check_seeds, check_stream, configuration, initial_network, separate


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
        out: a folder for results. A run that finished there is loaded instead of repeated, one that was killed
            goes on after its last finished task; ``fresh=True`` starts anew.
        progress: whether to show how it goes, as a bar on a terminal and as a line now and then elsewhere; by default
            everywhere but in notebooks.
        capture: whether steps become CUDA graphs; by default on CUDA.
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
    }
    config = configuration(method, stream, training)
    place = None if out is None else Path(out) / f"{method.key}-{digest(config, seeds)}.safetensors"
    if place is not None and place.exists() and not fresh:
        result = Result.load(place)
        result.network = lambda: initial_network(method, stream, training, seeds[0])
        return result

    if place is not None:
        writable(place.parent)
    jobs = min(jobs, len(seeds))
    share = -(-len(seeds) // jobs)
    groups = [seeds[i : i + share] for i in range(0, len(seeds), share)]
    files = [place and place.with_name(f"{method.key}-{digest(config, group)}.checkpoint") for group in groups]
    if fresh:
        for file in files:
            file and file.unlink(missing_ok=True)
    tasks = [(method, stream, group, settings, file) for group, file in zip(groups, files, strict=True)]
    if len(groups) == 1:
        results = [run_group(*tasks[0])]
    else:
        results = joblib.Parallel(n_jobs=jobs)(joblib.delayed(run_in_one_thread)(*task) for task in tasks)
    result = Result.join(results, seeds)
    if np.isnan(result.R[:, -1, 0]).all():
        raise Diverged(f"{method.key}: every seed diverged. Lower lr or a strength, or bound the gradient with clip.")
    if place is not None:
        result.save(place)
        for file in files:
            file.unlink(missing_ok=True)
    return result


def run_in_one_thread(*task) -> Result:
    torch.set_num_threads(1)
    return run_group(*task, alone=False)


def run_group(method, stream, seeds, settings: dict, checkpoint: Path | None, alone: bool = True) -> Result:
    """All tasks for some seeds in this process, with a checkpoint after each; ``alone`` if there are no others."""
    learner = Learner(method, stream, seeds=seeds, **settings)
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
