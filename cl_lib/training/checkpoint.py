"""A learner between two tasks as one file: written whole or not at all, read back only by the same run."""

import json

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cl_lib.errors import InputError
from cl_lib.files import replacing
from cl_lib.seeds import flatten, hollow, unflatten


def save_checkpoint(learner, path) -> None:
    """Write the learner's state between two tasks to one file, whole or not at all."""
    state = learner.state_dict()
    tensors, empty = {name: t.cpu().contiguous() for name, t in flatten(state)}, json.dumps(list(hollow(state)))
    identity = json.dumps([learner.config(), learner.seeds], sort_keys=True, default=str)
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata={"format": "cl_lib checkpoint 1", "identity": identity, "empty": empty})


def load_checkpoint(learner, path) -> None:
    """Put a learner where :func:`save_checkpoint` left one with the same configuration and seeds.

    Raises ``InputError`` for a file that is no checkpoint, or that of another configuration.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is not a checkpoint, or it is damaged ({error}): delete it to start anew.") from error
    here = json.loads(json.dumps([learner.config(), learner.seeds], sort_keys=True, default=str))
    there = json.loads(header.get("identity", "[{}, []]"))
    if here != there:
        differing = sorted(k for k in {**here[0], **there[0]} if here[0].get(k) != there[0].get(k)) or ["seeds"]
        raise InputError(
            f"{path} is the checkpoint of another run: {', '.join(differing)} differ. Give the same "
            "settings, or another folder, or start anew."
        )
    learner.load_state_dict(unflatten(tensors, json.loads(header.get("empty", "[]"))))
