"""Training steps as CUDA graphs: recorded once, replayed without Python or launch overhead.

What a recorded step reads and writes must stay where it is: parameters, buffers, the method's state and the optimiser's
are updated in place, the batch is copied into fixed tensors, learning rates are tensors. What it reads on the host (the
number of the task, say) is noted while it is recorded: another value asks for another recording, and nothing is baked
in without a word.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from cl_lib.seeds import Bag
from cl_lib.training.batch import Batch

MOST = 8  # recordings of one kind, before it is asked whether they are worth it


class Noted(Batch):
    """A batch that notes which of its entries are read, and so do those that are made of it, see :func:`noting`."""

    names: set = set()

    def __getitem__(self, name):
        self.names.add(name)
        return super().__getitem__(name)

    def __getattr__(self, name):
        self.names.add(name)
        return super().__getattr__(name)

    def get(self, name, default=None):
        self.names.add(name)
        return super().get(name, default)


@contextlib.contextmanager
def noting() -> Iterator[set]:
    """The names of the entries of noted batches that are read meanwhile. Nothing of them stays with the class."""
    Noted.names = names = set()
    try:
        yield names
    finally:
        Noted.names = set()


class Recording:
    """One kind of step: what it read on the host, and its graph as soon as it came a second time."""

    def __init__(self, read: dict):
        self.read, self.graph, self.uses = read, None, 0

    def fits(self, host: dict) -> bool:
        return all(host.get(name) == value for name, value in self.read.items())

    def replay(self, tensors: list[Tensor]) -> Bag:
        for fixed, at in self.slots:
            torch._foreach_copy_(fixed, [tensors[i] for i in at])
        self.graph.replay()
        return self.results


class Recorder:
    """The recorded steps of a learner, kept over its tasks, in one pool of memory.

    Arguments:
        device: a CUDA device, made the current one while a step is recorded.
    """

    def __init__(self, device: torch.device):
        self.device, self.pool, self.stream = device, None, None
        self.kinds: dict[tuple, list[Recording]] = {}
        self.refused: set[tuple] = set()
        self.places: dict[tuple, list] = {}
        self.optimizers: dict[tuple, torch.optim.Optimizer] = {}
        #: how many steps were recorded, replayed, and run as they are
        self.recorded = self.replayed = self.eager = 0

    def clear(self) -> None:
        """Forget everything: what was read lies elsewhere now."""
        self.kinds.clear()
        self.refused.clear()
        self.places.clear()
        self.optimizers.clear()

    def settle(self, who: tuple, tree) -> None:
        """Forget what was recorded for ``who`` where the tensors that its steps read and write lie elsewhere now."""
        places = [(t.data_ptr(), t.shape, t.dtype) for t in pytree.tree_leaves(tree)]
        if self.places.get(who) != places:
            self.forget(who)
            self.places[who] = places

    def forget(self, who: tuple) -> None:
        self.places.pop(who, None)
        self.optimizers.pop(who, None)
        self.refused = {key for key in self.refused if key[0] != who}
        self.kinds = {key: kinds for key, kinds in self.kinds.items() if key[0] != who}

    def optimizer(self, who: tuple, make: Callable) -> torch.optim.Optimizer:
        """The optimiser of some leaves as if it were new, in the places that earlier recordings read."""
        if who not in self.optimizers:
            self.optimizers[who] = make()
            return self.optimizers[who]
        kept, new = self.optimizers[who], make()
        for own, fresh in zip(kept.param_groups, new.param_groups, strict=True):
            own["lr"].copy_(fresh["lr"])
            own.pop("initial_lr", None)
        for moments in kept.state.values():
            for moment in moments.values():
                if isinstance(moment, Tensor):
                    moment.zero_()
        return kept

    def __call__(self, who: tuple, what: tuple, batch: Batch, step: Callable[[Batch], Bag]) -> Bag:
        """``step(batch)`` -> a Bag of tensors, which are overwritten when the step is replayed the next time.

        ``who`` trains, see :meth:`settle`; ``what`` tells one of its steps from another.
        """
        tensors, host = [], {}
        for name, value in batch.items():
            host[name] = _apart(value, tensors)
        key = (who, what, tuple(batch), tuple((t.shape, t.dtype) for t in tensors))
        if key in self.refused:
            self.eager += 1
            return step(batch)
        kinds = self.kinds.setdefault(key, [])
        found = next((kind for kind in kinds if kind.fits(host)), None)
        if found is None:
            return self._first(key, kinds, host, batch, step)
        if found.graph is None and not self._record(key, found, batch, tensors, host, step):
            return step(batch)
        found.uses += 1
        self.replayed += 1
        return found.replay(tensors)

    def _first(self, key, kinds, host: dict, batch: Batch, step: Callable) -> Bag:
        """Run a step as it is, which also readies the libraries for a recording; note what it reads on the host."""
        if len(kinds) == MOST:
            uses, kinds[:] = sum(kind.uses for kind in kinds), kinds[1:]
            if uses < MOST**2:
                self._refuse(key, f"it reads what changes on the host ({', '.join(_differing(kinds))})")
        self.eager += 1
        noted = Noted(batch)
        with noting() as names, self._beside():
            out = step(noted)
        kinds.append(Recording({n: host[n] for n in names if n in host and host[n] is not _TENSOR}))
        return out

    def _record(self, key, kind: Recording, batch: Batch, tensors: list, host: dict, step: Callable) -> bool:
        fixed = [t.clone() for t in tensors]
        parts = iter(fixed)
        own = Batch({name: _together(host[name], parts) for name in batch})
        by_type: dict[torch.dtype, list[int]] = {}
        for i, t in enumerate(fixed):
            by_type.setdefault(t.dtype, []).append(i)
        kind.slots = [([fixed[i] for i in at], at) for at in by_type.values()]
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self.device):
                self.pool = self.pool or torch.cuda.graph_pool_handle()
                with torch.cuda.graph(graph, pool=self.pool, stream=self._stream()):
                    kind.results = step(own)
        except RuntimeError as error:
            torch.cuda.synchronize(self.device)
            self._refuse(key, str(error))
            return False
        kind.graph = graph
        self.recorded += 1
        return True

    def _refuse(self, key, why: str) -> None:
        self.refused.add(key)
        self.kinds.pop(key, None)
        warnings.warn(f"This step is not recorded as a CUDA graph and runs as it is, slower: {why}.", stacklevel=2)

    def _stream(self):
        self.stream = self.stream or torch.cuda.Stream(self.device)
        return self.stream

    def _beside(self):
        return _Beside(self.device, self._stream())


class _Beside:
    """What is done within runs on another stream of the device, after what came before and before what follows."""

    def __init__(self, device, stream):
        self.device, self.stream, self.on = device, stream, torch.cuda.stream(stream)

    def __enter__(self):
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self.on.__enter__()

    def __exit__(self, *error):
        self.on.__exit__(*error)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


_TENSOR = object()  # stands for a tensor


def _apart(value, tensors: list[Tensor]):
    """A value of a batch with its tensors taken out, in their order, into ``tensors``."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return _TENSOR
    if isinstance(value, dict):
        return {name: _apart(part, tensors) for name, part in value.items()}
    return [_apart(part, tensors) for part in value] if isinstance(value, list) else value


def _together(value, tensors):
    """The inverse of :func:`_apart`."""
    if value is _TENSOR:
        return next(tensors)
    if isinstance(value, dict):
        return Bag({name: _together(part, tensors) for name, part in value.items()})
    return [_together(part, tensors) for part in value] if isinstance(value, list) else value


def _differing(kinds: list[Recording]) -> list[str]:
    names = {name for kind in kinds for name in kind.read}
    return sorted(n for n in names if len({str(kind.read.get(n)) for kind in kinds}) > 1)
