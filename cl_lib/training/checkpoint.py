"""A learner between two tasks as one file: written whole or not at all, read back only by the same run."""

import json

from cl_lib.errors import InputError
from cl_lib.files import read_tensors, write_tensors
from cl_lib.identity import as_kept
from cl_lib.seeds import flatten, hollow, unflatten

FORMAT = "cl_lib checkpoint"


def save_checkpoint(learner, path) -> None:
    """Write the learner's state between two tasks to one file, whole or not at all."""
    state = learner.state_dict()
    identity = json.dumps(as_kept([learner.config(), learner.seeds]))
    header = {"identity": identity, "empty": json.dumps(list(hollow(state)))}
    write_tensors(path, {name: t.cpu() for name, t in flatten(state)}, FORMAT, header)


def load_checkpoint(learner, path) -> None:
    """Put a learner where :func:`save_checkpoint` left one with the same configuration and seeds.

    Raises ``InputError`` for a file that is no checkpoint, that is damaged, or that of another configuration.
    """
    tensors, header = read_tensors(path, FORMAT)
    here, there = as_kept([learner.config(), learner.seeds]), json.loads(header["identity"])
    if here != there:
        differing = sorted(k for k in {**here[0], **there[0]} if here[0].get(k) != there[0].get(k)) or ["seeds"]
        raise InputError(
            f"{path} is the checkpoint of another run: {', '.join(differing)} differ. Give the same "
            "settings, or another folder, or start anew."
        )
    learner.load_state_dict(unflatten(tensors, json.loads(header["empty"])))
