"""A second device, whose tensors keep their numbers in CPU memory, with an emulation of CUDA graphs on it.

What it shows without a GPU: tensors of two devices that meet, operations that wait for the device, steps that cannot be
recorded, recordings that read stale values, memory that is not let go. What it cannot show: rounding, speed, memory.

It uses parts of torch that are not public, so it is bound to the versions in ``KNOWN``.
"""

import collections
import contextlib
import sys
import weakref

import torch
from torch.utils import _mode_utils as modes
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

KNOWN = ("2.13.",)
NAME = "emu"
# operations whose result is known to the host, or whose shape depends on values
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "multinomial", "equal", "is_nonzero",
    "_linalg_eigh", "_linalg_svd", "linalg_eigvalsh",
}  # fmt: skip
MOVING = {"_to_copy", "copy_"}  # operations that may have tensors of both devices


class There(torch.Tensor):
    """A tensor on the second device; its numbers lie in ``host``."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __new__(cls, host):
        self = torch.Tensor._make_wrapper_subclass(
            cls, host.size(), strides=host.stride(), storage_offset=host.storage_offset(), dtype=host.dtype,
            device=f"{NAME}:0",
        )  # fmt: skip
        self.host = host
        return self

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        return DEVICE.__torch_dispatch__(op, types, args, kwargs)

    def __deepcopy__(self, memo):
        return torch.nn.Parameter(There(self.host.clone()), self.requires_grad)

    def data_ptr(self):
        return self.host.data_ptr()

    def tolist(self):
        return self.cpu().tolist()


class Device(TorchDispatchMode):
    """Carries out what is asked of its tensors, counts ``waits`` by operation and line, writes tapes."""

    def __init__(self):
        super().__init__()
        self.tape, self.undo, self.launches, self.waits = None, None, 0, collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, op._schema.name.removeprefix("aten::")
        flat, spec = pytree.tree_flatten((args, kwargs))
        here, there = ([t for t in flat if isinstance(t, torch.Tensor) and isinstance(t, There) == on] for on in (0, 1))
        to = kwargs.get("device")
        result_there = bool(there) if to is None else torch.device(to).type == NAME
        moves = bool(there) != result_there if name == "_to_copy" else bool(there) and any(t.dim() for t in here)
        if moves and name not in MOVING:
            raise AssertionError(f"{name}: tensors of two devices meet at {where()}")
        masks = name in ("index", "index_put_", "index_put") and any(t.dtype == torch.bool for t in there[1:])
        if moves or (there and name in WAITING) or (masks and name == "index"):
            if self.tape is not None:
                raise RuntimeError(f"{name} waits for the device while a graph is recorded")
            self.waits[name, where()] += 1
        if self.tape is not None and torch.Tag.nondeterministic_seeded in op.tags:
            raise RuntimeError(f"{name} draws random numbers while a graph is recorded")
        if torch.Tag.inplace_view in op.tags and there:
            with modes.no_dispatch():
                op(*args, **kwargs)
        as_host = lambda v: (
            v.host if isinstance(v, There) else torch.device("cpu") if isinstance(v, torch.device) else v
        )
        own_args, own_kwargs = pytree.tree_unflatten([as_host(v) for v in flat], spec)
        if self.tape is not None:
            self._remember(op, own_args, own_kwargs)
        out = op(*own_args, **own_kwargs)
        if self.tape is not None and torch.Tag.inplace_view not in op.tags:
            as_it_is = lambda t: t.detach()  # what is done to its shape later is not done to the tape
            self.tape.append((op, *pytree.tree_map_only(torch.Tensor, as_it_is, (own_args, own_kwargs, out))))
        self.launches += result_there and not op.is_view
        known = {id(t.host): t for t in there} | {id(t): t for t in here}
        placed = lambda t: known.get(id(t), There(t) if result_there else t)
        return pytree.tree_map_only(torch.Tensor, placed, out)

    def _remember(self, op, args, kwargs) -> None:
        """What an operation is about to overwrite: recording a graph computes nothing."""
        for i, argument in enumerate(op._schema.arguments):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            # these write although their schemas do not say so
            if writes or (argument.name.startswith("running_") and "batch_norm" in op._schema.name):
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                self.undo += [(t.detach(), t.clone()) for t in pytree.tree_leaves(value) if isinstance(t, torch.Tensor)]


DEVICE = Device()


def where() -> str:
    """The nearest line of the library."""
    frame = sys._getframe(1)
    while frame and "cl_lib/" not in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('cl_lib/')[2]}:{frame.f_lineno}" if frame else "a test"


class Graph:
    """A list of operations on tensors at fixed addresses."""

    alive: "weakref.WeakSet[Graph]" = weakref.WeakSet()
    recorded = 0

    def __init__(self):
        self.tape = []
        Graph.alive.add(self)

    def replay(self):
        DEVICE.launches += 1
        with _disable_current_modes(), torch.no_grad():
            for op, args, kwargs, out in self.tape:
                for old, new in zip(pytree.tree_leaves(out), pytree.tree_leaves(op(*args, **kwargs)), strict=True):
                    if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


@contextlib.contextmanager
def recording(graph, pool=None, stream=None):
    DEVICE.tape, DEVICE.undo = graph.tape, []
    try:
        yield
        Graph.recorded += 1
    finally:
        undo, DEVICE.tape, DEVICE.undo = DEVICE.undo, None, None
        with _disable_current_modes(), torch.no_grad():
            for tensor, before in reversed(undo):
                tensor.copy_(before)


class Stream:
    def __init__(self, device=None):
        pass

    def wait_stream(self, other):
        pass

    def is_capturing(self):
        return DEVICE.tape is not None


def _prepare():
    import torch.utils.backend_registration as registration

    registration._setup_privateuseone_for_python_backend(NAME)
    type(torch.emu).get_amp_supported_dtype = lambda self: [torch.bfloat16]


if torch.__version__.startswith(KNOWN):
    _prepare()


@contextlib.contextmanager
def second_device(patch):
    """Within, ``device="emu"`` is a device that records graphs; ``patch`` is pytest's monkeypatch. Gives the device."""
    from cl_lib.training import request

    torch._C._set_only_lift_cpu_tensors(True)
    nothing = lambda *_: contextlib.nullcontext()
    names = {
        "CUDAGraph": Graph, "graph": recording, "Stream": Stream, "current_stream": Stream, "stream": nothing,
        "device": nothing, "synchronize": lambda *_: None, "graph_pool_handle": lambda: (0, 1),
    }  # fmt: skip
    for name, new in names.items():
        patch.setattr(torch.cuda, name, new)
    patch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    patch.setattr(torch.accelerator, "current_stream", Stream)
    kinds = [torch.Tensor, torch.nn.Parameter, There]
    patch.setattr(sys.modules["torch.optim.optimizer"], "_foreach_supported_types", kinds)
    patch.setitem(request.KINDS, NAME, True)
    DEVICE.waits.clear()
    DEVICE.launches = Graph.recorded = 0
    try:
        with DEVICE:
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
