"""Where runs are computed: processes of this machine (joblib's loky), or the workers of a Dask or a Ray cluster.

Workers find the work themselves in the store, and write there what they found, so that nothing is lost with one that
dies: what it had begun is given out again.
"""

import contextlib
import importlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import joblib
import torch
from filelock import FileLock, Timeout

from cl_lib.errors import InputError, suggest
from cl_lib.extras import missing
from cl_lib.training.runs import processes

NAMES = ("loky", "ray", "dask")
LOST = {  # what a backend raises where a worker died, by class names
    "TerminatedWorkerError", "BrokenProcessPool", "KilledWorker", "WorkerCrashedError", "ActorDiedError",
    "RayActorError", "ActorUnavailableError", "NodeDiedError",
}  # fmt: skip
DEATHS = 3  # of workers one after another with nothing finished, until that is an error


@dataclass(frozen=True)
class Backend:
    """Where to compute: ``name`` of :data:`NAMES`, ``jobs`` at a time, a cluster's ``address``.

    ``gpus`` is the share of a GPU that a run takes: with 0.25 four run on each. A Dask cluster's workers then say how
    many they have, ``dask worker … --resources GPU=1``. Raises InputError for what cannot be meant.
    """

    name: str = "loky"
    jobs: int = 1
    address: str | None = None
    gpus: float | None = None

    def __post_init__(self):
        if self.name not in NAMES:
            raise suggest(self.name, NAMES, "backend")
        if self.jobs < 1:
            raise InputError(f"--jobs {self.jobs} must be a whole number, 1 or more.")
        if self.address is not None and self.name == "loky":
            raise InputError(f"--address {self.address} is a cluster's: say which kind, --backend ray or dask.")
        if self.gpus is not None and not 0 < self.gpus <= 1:
            raise InputError(f"--gpus-per-run {self.gpus} must be above 0, at most 1.")

    @property
    def alone(self) -> bool:
        """Whether runs are one after another in this process."""
        return self.name == "loky" and self.jobs == 1

    def each(self, function: Callable, tasks: Iterable[tuple]) -> Iterator:
        """What ``function(*task)`` returns for each task, as they end.

        Raises ``WorkerDied`` where a worker did, after which what has not come back may have been begun or not.
        """
        try:
            yield from getattr(self, f"_by_{self.name}")(function, tasks)
        except Exception as error:
            if type(error).__name__ in LOST:
                raise WorkerDied(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
            raise

    def _by_loky(self, function: Callable, tasks: Iterable[tuple]) -> Iterator:
        calls = (joblib.delayed(_on_gpu)(function, task, self.gpus) for task in tasks)
        yield from processes(self.jobs, return_as="generator_unordered")(calls)

    def _by_dask(self, function: Callable, tasks: Iterable[tuple]) -> Iterator:
        distributed = _needed("distributed", "--backend dask")
        here = {"n_workers": self.jobs, "threads_per_worker": 1, "dashboard_address": None}
        more = {"resources": {"GPU": self.gpus}} if self.gpus else {}
        with (
            distributed.Client(self.address) if self.address else distributed.Client(**here),
            joblib.parallel_config("dask", **more),
        ):
            yield from joblib.Parallel(return_as="generator_unordered")(joblib.delayed(function)(*t) for t in tasks)

    def _by_ray(self, function: Callable, tasks: Iterable[tuple]) -> Iterator:
        """Ray's own tasks: its backend of joblib's tells nothing before all have ended, and waits for dead workers."""
        ray = _needed("ray", "--backend ray")
        here = {} if self.address else {"num_cpus": self.jobs, "include_dashboard": False}
        ray.init(self.address or "local", log_to_driver=False, configure_logging=False, **here)
        try:
            call = ray.remote(num_cpus=1, num_gpus=self.gpus or 0, max_retries=DEATHS)(function)
            waiting = [call.remote(*task) for task in tasks]
            while waiting:
                ready, waiting = ray.wait(waiting)
                yield ray.get(ready[0])
        finally:
            ray.shutdown()


class WorkerDied(RuntimeError):
    """A worker of a backend is gone, with what it was at."""


def _needed(module: str, what: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise missing(error, f"`{what}`") or error from None


def _on_gpu(function: Callable, task: tuple, share: float | None):
    if share is not None and torch.cuda.is_available():
        torch.cuda.set_device(_gpu(share, torch.cuda.device_count()))
    return function(*task)


_HELD: list[tuple[FileLock, int]] = []  # this process's place on a GPU, until it ends


def _gpu(share: float, number: int) -> int:
    """The GPU on which this process has a place, of ``1/share`` on each; the first free one, or any where none is."""
    if not _HELD:
        for place in range(int(1 / share) * number):
            lock = FileLock(Path(tempfile.gettempdir()) / f"cl_lib-{os.getuid()}-gpu-{place}.lock", blocking=False)
            with contextlib.suppress(Timeout):
                lock.acquire()
                _HELD.append((lock, place % number))
                break
    return _HELD[0][1] if _HELD else os.getpid() % number
