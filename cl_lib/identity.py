"""What a run is, so that equal runs have equal names, and where its numbers come from."""

import contextlib
import copyreg
import dis
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import site
import subprocess
import sys
import sysconfig
import types
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import nn

# --- settings -----------------------------------------------------------------------------------------------


def plain(value):
    """Numbers and arrays of NumPy and torch as Python's own, so that equal settings look alike."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray | torch.Tensor) else value


def identify(value):
    """A plain value that is equal for equal settings: names for functions and classes, weights for modules.

    What a function does is told by :func:`code`.
    """
    value = plain(value)
    if isinstance(value, nn.Module):
        digest = hashlib.sha256(re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value)).encode())
        for name, tensor in {**dict(value.named_parameters()), **dict(value.named_buffers())}.items():
            digest.update(name.encode())
            digest.update(_bytes(tensor))
        return f"{type(value).__name__}:{digest.hexdigest()[:16]}"
    if isinstance(value, functools.partial):
        return [identify(value.func), identify(value.args), identify(value.keywords)]
    if isinstance(value, list | tuple):
        return [identify(v) for v in value]
    if isinstance(value, dict):
        return {k: identify(v) for k, v in value.items()}
    if isinstance(value, bool | int | float | str | None):
        return value
    return dotted(value)


def dotted(value) -> str:
    """The full name of a function or a class, or of the class of anything else."""
    named = value if hasattr(value, "__qualname__") else type(value)
    return f"{getattr(named, '__module__', None)}.{named.__qualname__}"


def digest(config: dict, seeds: tuple[int, ...]) -> str:
    """A short name for a configuration, whatever its code: equal names, equal settings."""
    return _short({k: v for k, v in config.items() if k != "code"}, seeds)


def file_name(key: str, config: dict, seeds: tuple[int, ...]) -> str:
    """The name of a run's files, without their ending: its method, its settings and seeds, its code."""
    return f"{key}-{digest(config, seeds)}-{_short(config['code'])[:6]}"


def as_kept(config):
    """A configuration as it comes back from a file."""
    return json.loads(json.dumps(config, default=str))


def made(provenance: dict, changed: float) -> str:
    """Where a result comes from, in words: ``made by commit 1a2b3c4 (with changes) on 2026-01-31``.

    ``changed`` is when its file was written, for one that does not say when it was made.
    """
    commit, date = provenance.get("commit"), provenance.get("date")
    by = f" by commit {commit[:7]}{' (with changes)' * bool(provenance.get('dirty'))}" if commit else ""
    return f"made{by} on {date[:10] if date else datetime.fromtimestamp(changed, UTC).date()}"


def _short(*what) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()[:12]


# --- code ---------------------------------------------------------------------------------------------------


def code(*roots, aside: tuple[str, ...] = ()) -> tuple[str, list[str]]:
    """A digest of what some functions, classes and objects do, and the names of what it could not cover.

    From the roots it follows what their code reaches: base classes and class attributes, defaults, closures, and the
    globals that a function names, through modules too; with the values of numbers, containers, tensors and objects.
    It stops at code that is installed (Python's library, torch, every package but the roots' own), which counts by its
    name, and at what ``aside`` names, the starts of full names. Comments, docstrings, line numbers and the file's own
    place do not count; two processes give the same digest.
    """
    reach = _Reach(roots, aside)
    return reach.digest(), sorted(reach.uncovered)


LIBRARIES = ("torch", "torchvision", "numpy")  # by name, also where they are run from their sources
MOST = 100_000  # values to look at, so that a run starts at once whatever a function names

_ATOMS = (type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented))
_ATOMS += (torch.dtype, torch.device, torch.layout, torch.memory_format)
_NOT_CODE = {  # of a class: words, places, and what has done its work when the class is there
    "__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__firstlineno__", "__annotations__",
    "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__", "__dataclass_fields__",
    "__dataclass_params__", "__orig_bases__", "__parameters__", "__type_params__", "__slotnames__", "_abc_impl",
    "__init_subclass__",
}  # fmt: skip


class _Reach:
    """A walk over what code reaches. Each thing gets a number when it is first met, so that circles are no matter."""

    def __init__(self, roots, aside: tuple[str, ...]):
        self.roots, self.aside = roots, aside
        tops = {dotted(root).partition(".")[0] for root in (*roots, identify)}
        self.packages = {top for top in tops if top not in LIBRARIES and top not in sys.stdlib_module_names}
        self.numbers: dict[int, int] = {}  # by id: where in `met`
        self.met: list = []  # (thing, its name); what is listed stays alive, so an id stays its own
        self.uncovered: set[str] = set()
        self.looked = 0

    def digest(self) -> str:
        name = lambda root: dotted(root) if hasattr(root, "__qualname__") else ""
        total = hashlib.sha256(repr([self.token(root, name(root)) for root in self.roots]).encode())
        at = 0
        while at < len(self.met):
            thing, name = self.met[at]
            try:
                told = self._describe(thing, name)
            except Exception:  # whatever an object does when it is asked for its state
                told = self._cannot(thing, name)
            total.update(repr(told).encode())
            at += 1
        return total.hexdigest()[:12]

    def token(self, value, name: str):
        """What stands for a value: itself where it is plain, else its number."""
        self.looked += 1
        if isinstance(value, _ATOMS):
            return type(value).__name__, repr(value)
        if isinstance(value, tuple):
            return type(value).__name__, [self.token(v, name) for v in value]
        if self.looked > MOST:
            self.uncovered.add(f"what comes after the first {MOST} values")
            return "…"
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.met)
            self.met.append((value, name))
        return self.numbers[id(value)]

    def _cannot(self, thing, name: str):
        self.uncovered.add(f"{name} ({type(thing).__name__})")
        return type(thing).__name__

    def _describe(self, thing, name: str):
        token = lambda *values: [self.token(v, name) for v in values]
        match thing:
            case types.FunctionType():
                return self._function(thing, name)
            case type():
                return self._class(thing)
            case types.ModuleType():  # one of ours that is handed on, so that nobody knows what is taken from it
                return self._cannot(thing, name) if self._ours(thing.__name__, thing.__name__) else thing.__name__
            case types.MethodType():
                return token(thing.__func__, thing.__self__)
            case staticmethod() | classmethod():
                return [type(thing).__name__, *token(thing.__func__)]
            case property():
                return token(thing.fget, thing.fset, thing.fdel)
            case functools.cached_property():
                return token(thing.func)
            case functools.partial():
                return token(thing.func, thing.args, thing.keywords)
            case dict() if type(thing) is dict:
                return [(self.token(k, name), self.token(v, f"{name}.{k}".strip("."))) for k, v in thing.items()]
            case set() | frozenset():
                return sorted(repr(self._apart(v, name)) for v in thing)
            case types.MappingProxyType():
                return token(dict(thing))
            case torch.Tensor():
                return str(thing.dtype), list(thing.shape), hashlib.sha256(_bytes(thing)).hexdigest()
            case np.ndarray() if not thing.dtype.hasobject:
                return str(thing.dtype), thing.shape, hashlib.sha256(np.ascontiguousarray(thing)).hexdigest()
            case nn.Module():
                usual = vars(nn.Module())
                own = {k: v for k, v in vars(thing).items() if k not in usual or v}
                return token(type(thing), *own.items())
            case types.MemberDescriptorType() | types.GetSetDescriptorType():
                return thing.__name__
            case _ if hasattr(thing, "__wrapped__"):  # functools.cache, …
                return type(thing).__name__, *token(thing.__wrapped__)
        reduce = copyreg.dispatch_table.get(type(thing))  # what pickle would keep
        state = reduce(thing) if reduce else thing.__reduce_ex__(4)
        if isinstance(state, str):
            return type(thing).__name__, state
        rest = [None if part is None else list(part) for part in state[3:5]]
        return token(*state[:3], *(tuple(part or ()) for part in rest))

    def _apart(self, value, name: str):
        """A value described alone: for what has no order."""
        if isinstance(value, _ATOMS):
            return self.token(value, name)
        inner = _Reach((value,), self.aside)
        inner.packages, inner.looked = self.packages, self.looked
        result = inner.digest()
        self.uncovered |= inner.uncovered
        self.looked = inner.looked
        return result

    def _ours(self, module: str, full_name: str) -> bool:
        top = module.partition(".")[0]
        return not full_name.startswith(self.aside) and (top in self.packages or not _installed(top))

    # --- functions and classes ---------------------------------------------------------------------------

    def _class(self, cls: type):
        if not self._ours(cls.__module__ or "", dotted(cls)):
            return dotted(cls)
        bases = [self.token(base, dotted(base)) for base in cls.__bases__]
        own = {k: v for k, v in sorted(vars(cls).items()) if k not in _NOT_CODE}
        return cls.__name__, bases, [(k, self.token(v, f"{cls.__qualname__}.{k}")) for k, v in own.items()]

    def _function(self, function: types.FunctionType, name: str):
        module = str(function.__globals__.get("__name__"))  # a decorator's, say, whatever it calls itself
        cells = [_content(cell) for cell in function.__closure__ or ()]
        more = dict(sorted(vars(function).items()))  # what it wraps, or was given as an attribute
        if not self._ours(module, f"{module}.{function.__qualname__}"):
            kinds = (types.FunctionType, types.MethodType, type, functools.partial, *_ATOMS)
            cells = [cell for cell in cells if isinstance(cell, kinds)]
            more = {k: v for k, v in more.items() if k == "__wrapped__"}
            return dotted(function), [self.token(v, name) for v in (*cells, *more.values())]
        text, chains, imports = _read(function.__code__)
        free = [self.token(v, f"{name}.{k}") for k, v in zip(function.__code__.co_freevars, cells, strict=True)]
        given = [self.token(v, name) for v in (function.__defaults__, function.__kwdefaults__)]
        named = [self._named(function.__globals__, chain) for chain in chains]
        named += [self._imported(function, *what) for what in imports]
        return text, given, free, named, [(k, self.token(v, name)) for k, v in more.items()]

    def _named(self, scope: dict, chain: tuple[str, ...]):
        """What a name, or ``module.name``, means to a function; None for Python's own and for what is not there."""
        name, *attributes = chain
        if name not in scope or name.startswith("__"):  # __name__ and __file__ say where, not what
            return None
        return self._through(scope[name], attributes, f"{scope.get('__name__')}.{name}")

    def _through(self, value, attributes, full_name: str):
        if not self._ours(full_name.rpartition(".")[0], full_name):
            return full_name
        while isinstance(value, types.ModuleType) and attributes:
            if not self._ours(value.__name__, full_name := f"{value.__name__}.{attributes[0]}"):
                return full_name
            attribute, *attributes = attributes
            if not hasattr(value, attribute):
                return None
            value = getattr(value, attribute)
        return self.token(value, full_name)

    def _imported(self, function, module: str, level: int, names: tuple[str, ...], used: tuple[str, ...]):
        """What a function imports when it is called, whether or not that has happened yet."""
        if level:
            module = importlib.util.resolve_name("." * level + module, function.__globals__.get("__package__") or "")
        wanted = {name: f"{module}.{name}" for name in names or used}
        if not self._ours(module, module) or not any(self._ours(module, full) for full in wanted.values()):
            return module
        try:
            found = importlib.import_module(module)
        except Exception as error:
            if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
                return module  # it is not there, so nothing of it is reached
            return self._cannot(function, f"the import of {module}")
        return [self._through(found, [name], module) for name in wanted if names or hasattr(found, name)]


@functools.cache
def _read(body: types.CodeType) -> tuple[str, tuple, tuple]:
    """What a function's body says, the globals that it names as chains of attributes, and what it imports."""
    arguments = body.co_varnames[: body.co_argcount + body.co_kwonlyargcount]
    text, chains, imports = [arguments, body.co_posonlyargcount, body.co_flags & 0x3FF, body.co_exceptiontable], {}, {}
    steps = list(dis.get_instructions(body))
    for at, (step, after) in enumerate(zip(steps, [*steps[1:], None], strict=True)):
        said = after.argval if after is not None and after.opname == "STORE_NAME" else None
        if step.opname == "LOAD_CONST" and said in ("__doc__", "__firstlineno__"):
            continue
        if step.opname == "STORE_NAME" and step.argval in ("__doc__", "__firstlineno__"):
            continue
        value = step.argval
        if isinstance(value, types.CodeType):
            value, inner_chains, inner_imports = _read(value)
            chains |= dict.fromkeys(inner_chains)
            imports |= dict.fromkeys(inner_imports)
        elif isinstance(value, frozenset):
            value = sorted(map(repr, value))
        text.append((step.opname, repr(value)))
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"):
            chain = [step.argval]
            for following in steps[at + 1 :]:
                if following.opname not in ("LOAD_ATTR", "LOAD_METHOD"):
                    break
                chain.append(following.argval)
            chains[tuple(chain)] = None
        elif step.opname == "IMPORT_NAME":
            level, names = steps[at - 2].argval, steps[at - 1].argval
            imports[step.argval, level, tuple(names or ()), () if names else body.co_names] = None
    return hashlib.sha256(repr(text).encode()).hexdigest()[:16], tuple(chains), tuple(imports)


def _content(cell):
    try:
        return cell.cell_contents
    except ValueError:  # a variable that has no value yet
        return None


def _bytes(tensor: torch.Tensor):
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()


@functools.cache
def _places() -> tuple[str, ...]:
    """The folders of Python's library and of installed packages."""
    paths = [sysconfig.get_path(kind) for kind in ("stdlib", "platstdlib", "purelib", "platlib")]
    return tuple({f"{Path(p).resolve()}/" for p in [*paths, *site.getsitepackages(), site.getusersitepackages()]})


@functools.cache
def _installed(package: str) -> bool:
    """Whether a package, or module, is somebody else's: part of Python, or put where packages are installed."""
    if package in LIBRARIES or package in sys.builtin_module_names:
        return True
    if package == "__main__":  # in a worker process that is the worker's own
        return False
    module = sys.modules.get(package)
    try:
        spec = getattr(module, "__spec__", None) or importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    file = getattr(module, "__file__", None) or (spec and spec.origin)
    if spec is not None and file is None:  # a folder without __init__.py
        file = next(iter(spec.submodule_search_locations or ()), None)
    return file is not None and (file == "frozen" or f"{Path(file).resolve()}".startswith(_places()))


# --- where numbers come from ---------------------------------------------------------------------------------


def provenance(device="cpu") -> dict:
    """What a run stood on: versions, commit, date, device, threads, platform. No host name and no path."""
    device = torch.device(device)
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cl_lib": _version(),
        **_commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
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
