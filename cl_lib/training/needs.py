"""What training needs of memory, counted from shapes, and what becomes of a run that cannot have it."""

from torch.utils import _pytree as pytree

from cl_lib.errors import InputError
from cl_lib.nets import memory

LARGE = 2**31  # bytes of which a run tells before it starts


def needs(learner) -> dict[str, int]:
    """Bytes by what for: what :mod:`cl_lib.nets.memory` says of a sample, the optimiser's moments and the gradients of
    every seed, what the method keeps now, the data."""
    own = sum(t.nbytes for t in (*learner.params.values(), *learner.buffers.values()))
    trained = sum(t.nbytes for t in learner.params.values())
    o, data = learner.options, learner.stream.data
    moments = 2 if callable(o.optimizer) or o.optimizer != "sgd" else 1 if o.momentum else 0
    share = learner.seeds_at_once / len(learner.seeds)
    samples = learner.method.samples_a_step(o.batch_size) * learner.seeds_at_once
    return {
        "networks": own,
        "optimiser": int(trained * (moments + 2 * share)),
        "method": sum(t.nbytes for t in pytree.tree_leaves(learner.state)),
        "a step": int(1.5 * samples * learner.of_a_sample.kept),
        "data": sum(t.nbytes for t in (data.x, data.y, data.x_test, data.y_test)),
    }


def check(learner) -> None:
    """Say what a large run needs; raise InputError before it starts where the device has less."""
    wants, there = needs(learner), memory.free(learner.device)
    total, named = sum(wants.values()), [f"{name} {memory.told(size)}" for name, size in wants.items()]
    about = f"about {memory.told(total)} of memory ({', '.join(named)})"
    wanted = wants["optimiser"] + wants["a step"] if learner.device.type == "cuda" else total  # the rest is there
    if wanted > there:
        fewer = f"seeds_at_once={max(1, learner.seeds_at_once // 2)}, " if learner.seeds_at_once > 1 else ""
        raise InputError(
            f"{learner.method.key} needs {about}, and {learner.device} has {memory.told(there)} left: give {fewer}"
            f"a smaller batch_size than {learner.options.batch_size}, or a smaller network."
        )
    if total > LARGE:
        learner.progress.say(f"{learner.method.key}: {about}")
