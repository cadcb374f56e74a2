"""What a run is, so that equal runs have equal names, and where its numbers come from."""

import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import json
import platform
import re
import subprocess
import types
from pathlib import Path

import numpy as np
import torch
from torch import nn


def plain(value):
    """Numbers and arrays of NumPy and torch as Python's own, so that equal settings look alike."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def identify(value):
    """A plain value that is equal for equal settings: code for functions and classes, weights for modules."""
    value = plain(value)
    if isinstance(value, nn.Module):
        kinds = sorted(_text(_code(kind)) for kind in {type(m) for m in value.modules()})
        digest = hashlib.sha256(_text([repr(value), kinds]))
        for name, tensor in value.state_dict().items():
            digest.update(
                name.encode() + tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            )
        return f"{type(value).__name__}:{digest.hexdigest()[:16]}"
    if callable(value):
        name = f"{getattr(value, '__module__', '?')}.{getattr(value, '__qualname__', type(value).__name__)}"
        return f"{name}:{hashlib.sha256(_text(_code(value))).hexdigest()[:16]}"
    if isinstance(value, list | tuple):
        return [identify(v) for v in value]
    if isinstance(value, dict):
        return {k: identify(v) for k, v in value.items()}
    return value


def _text(value) -> bytes:
    """A representation without addresses in memory, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode()


def _code(value):
    """What a function, a class or a partial application does, without the place where it was written."""
    if isinstance(value, functools.partial):
        return [_code(value.func), identify(value.args), identify(value.keywords)]
    if isinstance(value, types.CodeType):
        return [value.co_code, value.co_names, [_code(c) for c in value.co_consts]]
    if isinstance(value, frozenset):
        return sorted(map(repr, value))
    if inspect.isclass(value):
        own = {k: f.__code__ for k, f in vars(value).items() if inspect.isfunction(f)}
        return [value.__qualname__, {k: _code(code) for k, code in own.items()}]
    if inspect.ismethod(value):
        return [_code(value.__func__), value.__self__]
    if inspect.isfunction(value):
        cells = [identify(c.cell_contents) for c in value.__closure__ or () if c.cell_contents is not value]
        return [_code(value.__code__), identify(value.__defaults__), identify(value.__kwdefaults__), cells]
    return value


def digest(config: dict, seeds: tuple[int, ...]) -> str:
    """A short name for a configuration: equal names, equal runs."""
    return hashlib.sha256(json.dumps([config, seeds], sort_keys=True, default=str).encode()).hexdigest()[:12]


def provenance(device="cpu") -> dict:
    """What a run stood on: versions, commit, device, threads, platform. No host name and no path."""
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cl_lib": _version(),
        **_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "platform": f"{platform.system()} {platform.machine()}",
    }


def _version() -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("cl_lib")


def _commit() -> dict:
    """The commit of the checkout that tracks this file, and whether anything changed since."""
    package = Path(__file__).resolve().parent

    def git(*command):
        done = subprocess.run(["git", "-C", package, *command], capture_output=True, text=True, timeout=10)
        return done.stdout.strip() if done.returncode == 0 else None

    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        if git("ls-files", "--error-unmatch", Path(__file__).name) is not None:  # else another project's
            changes = git("status", "--porcelain", "--untracked-files=no")
            return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}
    return {"commit": None, "dirty": None}
