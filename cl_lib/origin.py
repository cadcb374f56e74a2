"""Where numbers come from."""

import contextlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


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
