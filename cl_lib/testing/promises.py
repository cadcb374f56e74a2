"""What every method promises. A docstring's first paragraph is the promise, the second where to look if it breaks."""

import itertools
import random
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

from cl_lib.data.streams import from_datasets
from cl_lib.errors import InputError
from cl_lib.methods._base import SCENARIOS, fields_of
from cl_lib.methods._registry import registry
from cl_lib.results.result import Result
from cl_lib.seeds import flatten
from cl_lib.testing.material import (
    LONGER,
    NETWORKS,
    SHORT,
    close,
    differences,
    digits,
    equal,
    fine_tuned,
    larger,
    pair,
    unequal,
    weights,
)
from cl_lib.testing.promise import QUICK, DoesNotApply, applies, held, promise
from cl_lib.training.checkpoint import load_checkpoint, save_checkpoint
from cl_lib.training.learner import Learner
from cl_lib.training.options import Options


@promise()
def declares_what_there_is(method):
    """What it declares of itself is so: its scenarios, parameters, ``neutral``, ``helps`` and ``poor``.

    Write ``@dataclass`` above the class, or its annotated names are no parameters.
    """
    kind, own = type(method.given), fields_of(type(method.given))
    served = method.given.scenarios
    held(
        isinstance(served, tuple) and served and set(served) <= set(SCENARIOS),
        f"scenarios = {served!r} is not a tuple of some of {SCENARIOS}",
    )
    named = {name for name, hint in vars(kind).get("__annotations__", {}).items() if "ClassVar" not in str(hint)}
    held(named <= set(own), f"{', '.join(sorted(named - set(own)))} is annotated, but it is no parameter")
    hidden = sorted(set(own) & set(Options.__dataclass_fields__))
    held(not hidden, f"{', '.join(hidden)} is a parameter and an option of training: call yours differently")
    neutral, helps = method.given.neutral or {}, method.given.helps
    unknown = sorted(name for some in (neutral, *helps.values()) for name in some if name not in own)
    held(not unknown, f"neutral or helps name {', '.join(unknown)}, which is no parameter")
    strange = sorted({*helps, *method.given.poor} - set(SCENARIOS))
    held(not strange, f"helps or poor name {', '.join(strange)}, which is none of {SCENARIOS}")


@promise()
def is_documented(method):
    """It is documented: an equation in its docstring, a citation and a cost.

    Write the equation after ``.. math::``, and state ``citation`` and ``cost`` in the class.
    """
    kind = type(method.given)
    applies(kind.__module__.startswith("cl_lib."), "only the library's own methods are held to it")
    held(".. math::" in (kind.__doc__ or ""), "there is no equation")
    held(bool(method.given.citation), "there is no citation")
    held(bool(method.given.cost), "there is no cost")


@promise(scenario=SCENARIOS[::-1])
def serves_what_it_declares(method, scenario):
    """It runs in every scenario that it declares, and refuses the others in a sentence.

    ``scenarios`` names those that it can serve.
    """
    if scenario in method.given.scenarios:
        R = method.once(digits(scenario)).R
        held(np.isfinite(np.diagonal(R, axis1=1, axis2=2)).all(), "R has no accuracy for some task just learned")
        return
    try:
        method.run(digits(scenario))
    except InputError as error:
        held(f"{scenario}-incremental" in str(error), f"it is refused without naming the scenario ({error})")
    else:
        raise AssertionError(f"it does not declare {scenario}-incremental learning and is not refused")


@promise(scenario=SCENARIOS[::-1])
def warns_where_it_is_poor(method, scenario):
    """It warns once, before any training, in a scenario in which it says that it does poorly.

    ``poor`` says where and why; the learner warns.
    """
    applies(bool(method.given.poor), "it declares no `poor`")
    applies(scenario in method.given.poor, f"it does not say that it does poorly in {scenario}-incremental learning")
    method.must_serve(scenario)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Learner(method.new(), digits(scenario), **QUICK)
    kinds = [w.category.__name__ for w in caught]
    held(kinds == ["PoorPairing"], f"what was warned of is {kinds}, not PoorPairing once")


@promise(scenario=SCENARIOS[::-1])
def neutral_is_fine_tuning(method, scenario):
    """With its ``neutral`` parameters it is exactly fine-tuning, bit for bit, and as it was given it is not.

    A term that is multiplied by 0 may still be nan or round: return 0.0 before it is computed. Random numbers that
    training needs are not to be drawn for what is not used.
    """
    neutral = method.given.neutral
    applies(neutral is not None, "it declares no `neutral`")
    method.must_serve(scenario)
    plain, other = fine_tuned(digits(scenario), **QUICK), method.run(digits(scenario), neutral)
    equal(weights(plain, 0), weights(other, 0), "beside fine-tuning")
    held(np.array_equal(plain.R, other.R), "the weights are those of fine-tuning, the accuracies are not")
    if neutral:
        usual = method.once(digits(scenario))
        held(bool(differences(weights(plain, 0), weights(usual, 0))), "as it was given it is fine-tuning too")


@promise()
def same_seed_same_bits(method):
    """The same seed gives the same bits, and another seed gives others.

    Draw from ``learner.random(positions)`` or ``task.generator`` only, and keep nothing on ``self`` or the class.
    """
    stream = digits(method.scenario)
    first, again, other = method.once(stream), method.run(stream), method.run(stream, seeds=(5,))
    equal(weights(first, 0), weights(again, 0), "run twice")
    held(np.array_equal(first.losses, again.losses, equal_nan=True), "run twice, the losses differ")
    held(bool(differences(weights(first, 0), weights(other, 5))), "seeds 0 and 5 give the same network")


@promise()
def leaves_global_randomness_alone(method):
    """It leaves the global generators of torch, numpy and Python as they were.

    Draw from ``learner.random(positions)`` or ``task.generator``: a run then does not depend on what ran before it.
    """
    states = lambda: {
        "torch": torch.get_rng_state().tolist(),
        "numpy": [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002, what is watched
        "Python": random.getstate(),
    }
    before = states()
    method.run(digits(method.scenario))
    moved = [name for name, state in states().items() if state != before[name]]
    held(not moved, f"the generator of {' and '.join(moved)} moved")


@promise(scenario=SCENARIOS[::-1])
def stored_result_answers(method, scenario):
    """A stored result answers as its R says, also after it was saved and loaded.

    ``predict`` may use its arguments only: what it needs belongs into ``state``. ``build`` may ask of the stream its
    ``scenario``, ``tasks``, ``outputs``, ``rows`` and ``shape``.
    """
    method.must_serve(scenario)
    stream, seeds = unequal(scenario), (0, 1, 2)
    result = method.once(stream, seeds=seeds, seeds_at_once=1, **SHORT)
    known = registry().get(method.key) is type(method.given) or "+" in method.key
    with tempfile.TemporaryDirectory() as folder:
        loaded = Result.load(result.save(Path(folder) / "result"))
    asked = {"the result": (result, {}), "the loaded one": (loaded, {} if known else {"method": method.new()})}
    for (i, seed), task in itertools.product(enumerate(seeds), range(stream.tasks)):
        x, y = stream.samples(task, seed, "test")
        for name, (answers, how) in asked.items():
            right = float((answers.predict(x.cpu(), seed, task, **how) == y.cpu()).double().mean())
            said = f"of seed {seed} in task {task} R says {result.R[i, -1, task]:.4f}, {name} {right:.4f}"
            held(abs(right - result.R[i, -1, task]) < 1e-6, said)


@promise(killed_after=(2, 0))
def resumed_is_uninterrupted(method, killed_after):
    """Killed after a task and resumed from its checkpoint, it ends with the same bits as uninterrupted.

    What the next task needs belongs into ``state``, as tensors: a checkpoint holds nothing that is kept on ``self``.
    """
    stream, seeds = digits(method.scenario), (0, 3)
    first, second = (Learner(method.new(), stream, seeds=seeds, **QUICK) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(killed_after + 1):
            first.learn()
        save_checkpoint(first, Path(folder) / "checkpoint")
        load_checkpoint(second, Path(folder) / "checkpoint")
    while second.done < stream.tasks:
        second.learn()
    resumed, whole = second.result(), method.once(stream, seeds=seeds)
    for seed in seeds:
        equal(weights(resumed, seed), weights(whole, seed), f"beside the uninterrupted run of seed {seed}")
    held(np.array_equal(resumed.R, whole.R), "the weights are those of the uninterrupted run, the accuracies are not")


@promise(scenario=SCENARIOS[::-1], at_once=(3, 2, 1))
def seed_alone_is_seed_among_others(method, scenario, at_once):
    """A seed alone is the same seed among others, to rounding, whatever the others' tasks.

    ``task``, ``penalty`` and ``direct`` are mapped over the seeds; the hooks over all seeds see ``[G, …]``, of the
    seeds at ``batch.positions``, each with a generator of its own. State ``stacked = False`` where that cannot be.
    """
    method.must_serve(scenario)
    applies(at_once == 1 or method.given.stacked, "its seeds run one after another")
    stream = unequal(scenario)
    together = method.once(stream, seeds=(0, 1, 2), seeds_at_once=at_once, **SHORT)
    alone = method.once(stream, seeds=(1,), **SHORT)
    close(weights(together, 1), weights(alone, 1), "beside seed 1 alone")
    apart = np.abs(together.R[1] - alone.R[0]).max()
    held(apart <= 0.02, f"the weights are those of seed 1 alone, the accuracies differ by up to {apart:.3f}")


@promise()
def seeds_may_stop_early(method):
    """With Adam, and with seeds that stop early, a seed alone is still the same seed among others.

    A seed that has stopped is not in ``batch.positions``: do nothing for it.
    """
    applies(method.given.stacked, "its seeds run one after another")
    stream, seeds = unequal(method.scenario, tasks=2), (0, 1, 2)
    how = {"optimizer": "adam", "lr": 0.003, "epochs": 4, "patience": 1, "batch_size": 64}
    how["dtype"] = "float64"  # Adam divides by the gradient's size, rounding included
    together = method.run(stream, seeds=seeds, seeds_at_once=3, **how)
    for i, seed in enumerate(seeds):
        alone = method.run(stream, seeds=(seed,), **how)
        close(weights(together, seed), weights(alone, seed), f"beside seed {seed} alone")
        same = np.allclose(together.losses[i], alone.losses[0], rtol=1e-4, atol=0, equal_nan=True)
        held(same, f"the losses differ from those of seed {seed} alone")


@promise(network=NETWORKS)
def works_with_networks(method, network):
    """It works with an MLP, a CNN and a batch-norm network, or refuses one before any training.

    ``net.params`` and ``net.buffers`` are what the network has: name no layer, and pass inputs ``[B, …]`` as they are.
    Refuse what cannot be served by an ``InputError`` in ``check`` or ``build``.
    """
    stream = digits(method.scenario, tasks=2, per_class=4)
    how = QUICK | {"network": NETWORKS[network], "epochs": 1, "batch_size": 16, "lr": 0.01, "dtype": "float64"}
    at_once = 2 if method.given.stacked else 1
    try:
        Learner(method.new(), stream, seeds=(0, 1), seeds_at_once=at_once, **how)
    except InputError as refused:
        raise DoesNotApply(f"it refuses a {network} ({refused})") from None
    together = method.run(stream, seeds=(0, 1), seeds_at_once=at_once, **how)
    alone = method.run(stream, seeds=(1,), **how)
    close(weights(together, 1), weights(alone, 1), "beside seed 1 alone")
    held(np.isfinite(together.R).all(), "R has no number for some task")


@promise(scenario=SCENARIOS[::-1])
def goes_on_when_a_task_is_appended(method, scenario):
    """It goes on when a task is appended to its stream, and what it had learned stays as it was.

    What it keeps by parameter grows by itself; write ``grow`` for tables over tasks or output rows, and raise an
    ``InputError`` there if the tasks have to be known beforehand.
    """
    method.must_serve(scenario)
    stream = from_datasets([pair(0), pair(2)], scenario, name="begun", normalise="centre")
    learner = Learner(method.new(), stream, seeds=(0, 1), **QUICK)
    learner.learn()
    learner.learn()
    x, outputs = stream.samples(0, 0, "test")[0].to(learner.device), stream.outputs

    def told() -> dict[str, torch.Tensor]:
        """What is known of the tasks before: the old output rows, and the accuracies."""
        logits = {f"what seed {seed} gives": learner.net(seed)(x)[:, :outputs].detach() for seed in range(2)}
        return logits | {f"the accuracy on task {task}": learner.accuracy(task) for task in range(2)}

    before, R = told(), learner.result().R
    try:
        learner.extend(*pair(4))
    except InputError as refused:
        raise DoesNotApply(f"it refuses that ({refused})") from None
    close(before, told(), "when it was appended", rtol=1e-5, atol=1e-6)
    learner.learn()
    result = learner.result()
    held(np.isfinite(result.R[:, 2]).all(), "R has no number for some task after it")
    held(np.array_equal(result.R[:, :2, :2], R), "what R says of the tasks before it changed")
    lost = [name for name, tensor in flatten(learner.state) if not tensor.isfinite().all()]
    held(not lost, f"nan or infinity is kept in {', '.join(lost)}")


@promise()
def needs_no_boundary_or_is_refused(method):
    """On a stream that does not say where tasks begin it runs, or is refused in a sentence.

    Who writes ``before_task``, ``after_task`` or ``fit`` has to be told, and is refused; nobody else may need it.
    """
    scenario = next((s for s in SCENARIOS[::-1] if s != "task" and s in method.given.scenarios), None)
    applies(scenario is not None, "it is always told the task")
    told = [hook for hook in ("before_task", "after_task", "fit") if method.given.has(hook)]
    try:
        R = method.run(digits(scenario, boundaries=False)).R
    except InputError as refused:
        held(bool(told), f"it is refused, though it has none of the hooks that are told ({refused})")
    else:
        held(not told, f"it has {', '.join(told)} and is not refused")
        held(np.isfinite(R).all(), "R has no number for some task")


@promise()
def captured_is_eager(method):
    """On a GPU, steps that are captured as a graph give the numbers of steps that are not.

    What changes from step to step has to be a tensor: a number that a hook reads in Python is recorded once.
    """
    applies(torch.cuda.is_available(), "there is no CUDA device here")
    how = {"seeds": (0, 1), "device": "cuda", "optimizer": "adam"}
    eager, captured = (method.run(digits(method.scenario), capture=capture, **how) for capture in (False, True))
    for seed in (0, 1):
        close(weights(captured, seed), weights(eager, seed), f"beside seed {seed} without capture")


@promise(scenario=SCENARIOS[::-1])
def beats_fine_tuning(method, scenario):
    """Where it says that it helps, it makes clearly fewer errors than fine-tuning.

    ``helps`` names the scenario, and parameters with which it is so on a small stream.
    """
    applies(bool(method.given.helps), "it declares no `helps`")
    parameters = method.given.helps.get(scenario)
    applies(parameters is not None, f"it does not say that it helps in {scenario}-incremental learning")
    method.must_serve(scenario)
    stream, how = larger(scenario), LONGER | {"seeds": (0, 1)}
    error = lambda result: 1 - float(result.metrics()["acc"].mean())
    plain, own = error(fine_tuned(stream, **how)), error(method.run(stream, parameters, **how))
    held(own < 0.93 * plain, f"it errs in {100 * own:.1f} % of its answers, fine-tuning in {100 * plain:.1f} %")
