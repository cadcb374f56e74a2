"""The kinds of stream by name, what each may be told, and one made from words: for a command line or a file."""

from typing import Any

from cl_lib.data.datasets import NAMES as NAMES
from cl_lib.data.datasets import Dataset, load
from cl_lib.data.stream import Stream
from cl_lib.data.streams import permuted, rotated, shifted, split
from cl_lib.errors import InputError, suggest
from cl_lib.naming import is_named, resolve
from cl_lib.signatures import Option, options, parameters, takes_any

DECIDED = "view", "labels", "rule", "pretrain_classes"  # what a kind of stream tells Stream itself
KINDS = {kind.__name__: kind for kind in (split, permuted, rotated, shifted)}


def kind_of(name: str):
    """The function that makes a kind of stream: ``"split"``, or ``module:name`` of one's own (or a Stream)."""
    if is_named(name):
        found = resolve(name)
        if not callable(found) and not isinstance(found, Stream):
            raise InputError(f"{name} is no stream but {type(found).__name__}: give a function that makes one.")
        return found
    if name not in KINDS:
        raise suggest(name, KINDS, "stream")
    return KINDS[name]


def options_of(name: str) -> dict[str, Option]:
    """What a kind of stream may be told besides its data; what it passes on to ``Stream`` too."""
    make = kind_of(name)
    if isinstance(make, Stream):
        return {}
    own, common = options(make), {k: v for k, v in options(Stream).items() if k not in DECIDED}
    for option in [option for k, option in own.items() if k in common]:
        own[option.name] = Option(option.name, option.hint, option.default, common[option.name].help)
    return own | ({k: v for k, v in common.items() if k not in own} if takes_any(make) else {})


def all_options() -> dict[str, dict[str, Option]]:
    """Every option that some kind of stream has: name -> kind -> option."""
    found: dict[str, dict[str, Option]] = {}
    for kind in KINDS:
        for name, option in options_of(kind).items():
            found.setdefault(name, {})[kind] = option
    return found


def refuse_unknown(kind: str, names) -> None:
    """Raise InputError for a name that is no option of a kind of stream, naming the kinds that have it."""
    known = options_of(kind)
    for name in names:
        if name in known:
            continue
        if having := all_options().get(name):
            raise InputError(f"{name} is an option of {', '.join(having)}, not of {kind}: leave it out.")
        raise suggest(name, known, f"option of the stream {kind}")


def dataset_of(name: str, root=None) -> Dataset:
    """A data set by its name, or by ``module:name`` of one's own: a Dataset or a function that gives one."""
    if not is_named(name):
        return load(name, root=root)
    found = resolve(name)
    if callable(found) and all(p.default is not p.empty for p in parameters(found).values()):
        found = found()
    if not isinstance(found, Dataset):
        raise InputError(
            f"{name} is no data set but {type(found).__name__}: give a Dataset, or a function that gives one."
        )
    return found


def make_stream(kind: str = "split", dataset: str | None = None, root=None, /, **given: Any) -> Stream:
    """A stream of a kind over a data set (``digits`` unless named), with options as :func:`options_of` lists them.

    A kind of one's own is a function ``(data, **options)`` or ``(**options)`` that returns a Stream, or a Stream.
    Raises InputError for what is not known, cannot be meant or is no stream.
    """
    make = kind_of(kind)
    refuse_unknown(kind, given)
    reads = callable(make) and "data" in parameters(make)
    if dataset is not None and not reads:
        raise InputError(f"{kind} takes no data set: leave {dataset!r} out.")
    data = [dataset_of(dataset or "digits", root)] if reads else []
    stream = make(*data, **given) if callable(make) else make
    if not isinstance(stream, Stream):
        raise InputError(
            f"{kind} gives {type(stream).__name__}, not a stream: return what cl_lib.split and its kin return."
        )
    return stream
